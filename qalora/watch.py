"""How the processes of a run notice that one of them is gone: a connection of each to process 0. Torch-free.

The kernel closes it when its process dies, whatever either of them is doing.

An exchange would notice too, but only when it comes to one, and on GPUs not for many minutes.
"""

from __future__ import annotations

import hmac
import os
import selectors
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

BYE = b"."
GONE = b"!"
PATIENCE = 30.0  # seconds for all to connect
TOKEN = 16  # bytes that a connection begins with, and the rank after them


class Watch:
    """Ends this process when another one is gone without a word, and says once which it was.

    Args:
        rank, size: of this process.
        address: of process 0's machine.
        first_says: (what process 0 says) → what it said, in every process.
    """

    def __init__(self, rank: int, size: int, address: str, first_says: Callable[[object], object]):
        self.rank, self.size = rank, size
        self.peers: dict[int, socket.socket] = {}
        server = socket.create_server(("", 0), backlog=size) if rank == 0 else None
        said: Any = first_says((server.getsockname()[1], os.urandom(TOKEN)) if server else None)
        port, token = said
        with suppress(OSError):  # a network that lets nothing through: an exchange notices in the end
            if server is not None:
                self._accept(server, token)
            else:
                self._connect(address, port, token)
        if server is not None:
            server.close()
        Thread(target=self._watch, daemon=True, name="watch").start()

    def close(self, *, said: bool) -> None:
        """Ends the watch.

        Args:
            said: the others know that this process ends.
        """
        for peer in self.peers.values():
            with suppress(OSError):
                if said:
                    peer.sendall(BYE)

    def _connect(self, address: str, port: int, token: bytes) -> None:
        peer = socket.create_connection((address, port), timeout=PATIENCE)
        peer.sendall(token + self.rank.to_bytes(4))
        self.peers[0] = _kept_alive(peer)

    def _accept(self, server: socket.socket, token: bytes) -> None:
        server.settimeout(PATIENCE)
        while len(self.peers) < self.size - 1:
            peer, _ = server.accept()
            peer.settimeout(PATIENCE)
            said = b""
            with suppress(OSError):
                said = peer.recv(TOKEN + 4, socket.MSG_WAITALL)
            if hmac.compare_digest(said[:TOKEN], token) and len(said) == TOKEN + 4:
                self.peers[int.from_bytes(said[TOKEN:])] = _kept_alive(peer)
            else:
                peer.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    said = b""
                    with suppress(OSError):
                        said = key.fileobj.recv(1)  # type: ignore[union-attr]
                    if said != BYE:
                        self._end(key.data, told=said == GONE)
                    selector.unregister(key.fileobj)

    def _end(self, gone: int, *, told: bool) -> None:
        """Ends this process at once, for its main thread may wait for the one that is gone.

        Args:
            told: by process 0, which has said it.
        """
        for peer in self.peers.values():
            with suppress(OSError):
                peer.sendall(GONE)
        if not told and self.rank == (0 if gone else 1):
            sys.stderr.write(
                f"\nerror: process {gone} of {self.size} has ended, and so the run ends; what it said itself stands "
                "above. Continue with the same command and --resume-from-checkpoint auto.\n"
            )
            sys.stderr.flush()
        os._exit(1)


def _kept_alive(peer: socket.socket) -> socket.socket:
    """A connection that also ends within half a minute where the other machine is gone."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
