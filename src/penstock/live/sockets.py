"""ZeroMQ sockets on an asyncio event loop, any kind of loop: callbacks for what comes, no tasks and no threads.

ZeroMQ signals through a descriptor that tells of changes only, so whoever is woken reads until there is nothing left;
sending may swallow a signal, so it is followed by a look as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

Frames = list[bytes]
MOST_AT_ONCE = 64
"""Messages read before others on the event loop have their turn."""


class LoopSocket:
    """Calls ``heard`` for every message that ``socket`` gets, until ``close``."""

    def __init__(self, socket: zmq.Socket[bytes], heard: Callable[[Frames], None]) -> None:
        self._socket = socket
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._read)
        self._loop.call_soon(self._read)

    def send(self, frames: Frames) -> bool:
        """Send without waiting; False if there is no room for the message, or nobody to take it."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        self._loop.call_soon(self._read)
        return True

    def close(self) -> None:
        """Close at once; what was not sent is thrown away. May be called twice."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._descriptor)
            self._socket.close(linger=0)

    def _read(self) -> None:
        for _ in range(MOST_AT_ONCE):
            if not self._open or self._socket.closed:  # its context may have closed it
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._heard(frames)
        self._loop.call_soon(self._read)


def next_port(address: str) -> str:
    """The address one port above ``tcp://HOST:PORT``, where commands go."""
    head, _, port = address.rpartition(":")
    return f"{head}:{int(port) + 1}"
