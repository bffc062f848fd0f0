"""A proxy between a service and its Redis, which cuts connections in the middle of an append."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress

APPENDS = b"HEXISTS"
"""Stands in the script that appends, and in no other command of the ledger."""


class Proxy:
    """Passes on what is sent to the Unix socket of a Redis, and what that answers."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._mutex = threading.Lock()
        self._cuts: list[int] = []
        self.cut = 0
        """How many connections were cut so far."""
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listening.getsockname()[1]}/0"

    def cut_appends(self, *after: int) -> None:
        """Cut the next appends, each after so many bytes of the reply; −1: in the middle of the request."""
        with self._mutex:
            self._cuts = list(after)

    def close(self) -> None:
        """Let go of the port. Connections end with the service that made them."""
        self._listening.shutdown(socket.SHUT_RDWR)  # to close it would not wake who accepts
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                accepted, _ = self._listening.accept()
                threading.Thread(target=self._pass_on, args=(accepted,), daemon=True).start()

    def _pass_on(self, service: socket.socket) -> None:
        with service, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.connect(self._path)
            left: int | None = None
            while True:
                for source in select.select([service, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is service:
                        if left is None and APPENDS in data:
                            left = self._next_cut()
                        if left == -1:
                            server.sendall(data[: len(data) // 2])
                            return
                        server.sendall(data)
                    elif left is None:
                        service.sendall(data)
                    else:
                        # Where an answer is to be cut behind its end, there is one more to wait for.
                        service.sendall(data[:left])
                        if len(data) >= left:
                            return
                        left -= len(data)

    def _next_cut(self) -> int | None:
        with self._mutex:
            if not self._cuts:
                return None
            self.cut += 1
            return self._cuts.pop(0)
