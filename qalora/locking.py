"""One writer per folder: a lock that ends with its process, whatever ended it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qalora.errors import InputError

LOCK = ".qalora.lock"


@contextmanager
def locked(file: Path, what: str, *, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Holds a lock file from here to the end of the block; the file, and folders that were made for it, go with it.

    The kernel gives up a lock when its process dies, so one that was killed is no obstacle to the next.

    Args:
        file: the lock; its folders are made where they are missing.
        what: what is locked, and begins the error.
        say: told of a lock that another machine left behind, for not every network file system passes locks on.

    Raises:
        InputError: another process holds it; names the process and its host.
    """
    made = [folder for folder in file.parents if not folder.exists()]
    handle = _opened(file, what)
    try:
        left = _owner(handle)
        if left and left.get("host") not in (None, socket.gethostname()):
            say(
                f"{what}: process {left.get('pid')} on {left['host']} left its lock there; if it still runs, stop one "
                "of the two"
            )
        _write_owner(handle)
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(handle)
        for folder in made:
            with suppress(OSError):  # not empty: the work left its result there
                folder.rmdir()


def _opened(file: Path, what: str) -> int:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(
                f"{what}: nothing can be written to {file.parent} ({error.strerror}); choose another place."
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle) or {}
            os.close(handle)
            raise InputError(
                f"{what}: in use by process {owner.get('pid', '?')} on {owner.get('host', 'this machine')} since "
                f"{owner.get('since', 'a moment ago')}; wait for its end, stop it, or choose another folder."
            ) from None
        except OSError:
            return handle  # a file system without locks: what it holds is all there is to know
        with suppress(OSError):
            if os.stat(file).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # its owner removed it between the two calls


def _owner(handle: int) -> dict[str, object] | None:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_owner(handle: int) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
