"""What joins the instances of a fleet: who is there, and transfers over links that are shared as in the simulator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import zmq

from penstock.live.emulated.clock import Clock
from penstock.sim.network import DECODE, Flow, Network

if TYPE_CHECKING:
    from penstock.live.emulated.transfers import Transfers


class Fabric:
    """Instances by NIXL engine id, and the transfers between them in real time."""

    def __init__(self, bytes_per_s: list[float], latency_s: float, handshake_s: float, speed: float) -> None:
        self.network = Network(bytes_per_s, latency_s, handshake_s)
        self.clock = Clock(speed)
        self.members: dict[str, Transfers] = {}
        self.origins: dict[tuple[int, int], int] = {}  # see ``foresight``
        self.sockets: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._size = len(bytes_per_s)
        self._under_way: dict[Flow, Callable[[], None]] = {}
        self._timer: asyncio.Handle | None = None
        self._count = 0

    def acquainted(self, source: int, target: int) -> bool:
        """Have two instances shaken hands?"""
        return source * self._size + target in self.network.known

    def pull(self, source: int, target: int, size_bytes: float, done: Callable[[], None]) -> Flow:
        """Begin a transfer; ``done`` is called when it has ended."""
        self._count += 1
        flow = self.network.start(self._count, DECODE, source, target, size_bytes, self.clock.now())
        self._under_way[flow] = done
        self._rearm()
        return flow

    def cancel(self, flow: Flow) -> None:
        """Stop a transfer; does nothing if it has ended."""
        if self._under_way.pop(flow, None) is not None:
            self.network.end(flow, self.clock.now())
            self._rearm()

    def leave(self, engine_id: str, index: int) -> None:
        """An instance has gone."""
        self.members.pop(engine_id, None)
        self.network.forget(index)

    def close(self) -> None:
        """All instances have gone."""
        self.sockets.destroy(linger=0)

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        flow = self.network.soonest()
        self._timer = None if flow is None else self.clock.call_at(flow.done_s, partial(self._ended, flow))

    def _ended(self, flow: Flow) -> None:
        done = self._under_way.pop(flow)
        self.network.end(flow, max(self.clock.now(), flow.done_s))
        self._rearm()
        done()
