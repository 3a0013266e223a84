"""One writer per folder: who holds a lock is named, and a dead owner is no obstacle."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qalora.errors import InputError
from qalora.locking import locked


def test_a_second_writer_is_refused_and_a_killed_one_is_no_obstacle(tmp_path):
    lock = tmp_path / "new" / "folder" / ".lock"
    code = (
        "import sys, time; from pathlib import Path; from qalora.locking import locked\nwith "
        "locked(Path(sys.argv[1]), 'x'):\n  print('in', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert holder.stdout.readline() == b"in\n"
    with pytest.raises(InputError, match=rf"run: in use by process {holder.pid} on .* since 20"), locked(lock, "run"):
        pass
    assert json.loads(lock.read_text())["pid"] == holder.pid  # who asked in vain changed nothing
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.exists()
    with locked(lock, "run"), pytest.raises(InputError, match=rf"process {os.getpid()} "), locked(lock, "run"):
        pass
    assert not lock.exists()
    shutil.rmtree(tmp_path / "new")
    with locked(lock, "run"):
        pass
    assert not list(tmp_path.iterdir())  # nor the folders that were made for it


def test_a_lock_of_another_machine_is_said(tmp_path):
    host = "elsewhere" * 50  # longer than what takes its place
    (tmp_path / ".lock").write_text(json.dumps({"pid": 7, "host": host, "since": "yesterday"}))
    said: list[str] = []
    with locked(tmp_path / ".lock", "run", say=said.append):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert said == [f"run: process 7 on {host} left its lock there; if it still runs, stop one of the two"]


def test_a_lock_file_that_its_owner_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between the opening and the locking of it; a third process would make a new one, and lock that."""
    lock, flock, calls = tmp_path / ".lock", fcntl.flock, []

    def late(handle, how):
        if not calls:
            lock.unlink()
        calls.append(how)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(lock, "run"), pytest.raises(InputError, match="in use"), locked(lock, "run"):
        pass
