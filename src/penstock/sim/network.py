"""KV transfers over links that are shared fairly."""

from __future__ import annotations

from typing import Final

# What a transfer is for.
DECODE: Final = 0  # from the prefill instance to the decode instance
STAGE_COPY: Final = 1  # first stage of a migration: the source goes on decoding
LAST_COPY: Final = 2  # the rest of a migration


class Flow:
    """One transfer between two instances. ``lead_s`` is latency (and, at first contact, the handshake)."""

    def __init__(self, request: int, purpose: int, source: int, target: int, size_bytes: float, lead_s: float) -> None:
        self.request = request
        self.purpose = purpose
        self.source = source
        self.target = target
        self.size_bytes = size_bytes
        self.lead_s = lead_s
        self.left_bytes = size_bytes
        self.rate = 0.0
        self.updated_s = 0.0
        self.done_s = 0.0


class Network:
    """Every instance has one full-duplex link; a flow gets the smaller of its shares at both ends.

    Shares are equal splits of a link's bandwidth, recomputed when a flow starts or ends. This is not max-min fair:
    what a flow cannot use because its other end is busier is not given to its neighbours (an honest lower bound).
    Times of others change with every start and end, so only the :meth:`soonest` is worth a timer.
    """

    def __init__(self, bytes_per_s: list[float], latency_s: float, handshake_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.handshake_s = handshake_s
        self.leaving: list[list[Flow]] = [[] for _ in bytes_per_s]
        self.entering: list[list[Flow]] = [[] for _ in bytes_per_s]
        self.known: set[int] = set()
        self.bytes_in = [0.0 for _ in bytes_per_s]
        self.bytes_out = [0.0 for _ in bytes_per_s]

    def start(self, request: int, purpose: int, source: int, target: int, size_bytes: float, now: float) -> Flow:
        """Start a transfer."""
        lead = self.latency_s
        pair = source * len(self.bytes_per_s) + target
        if pair not in self.known:
            self.known.add(pair)
            lead += self.handshake_s
        flow = Flow(request, purpose, source, target, size_bytes, lead)
        flow.updated_s = now
        self.leaving[source].append(flow)
        self.entering[target].append(flow)
        self.bytes_out[source] += size_bytes
        self.bytes_in[target] += size_bytes
        self._reshare(source, target, now)
        return flow

    def end(self, flow: Flow, now: float) -> None:
        """Take a finished or cancelled flow off its links."""
        if now < flow.done_s:  # cancelled: what has not been sent is not counted
            unsent = max(0.0, flow.left_bytes - flow.rate * (now - flow.updated_s))
            self.bytes_out[flow.source] -= unsent
            self.bytes_in[flow.target] -= unsent
        self.leaving[flow.source].remove(flow)
        self.entering[flow.target].remove(flow)
        self._reshare(flow.source, flow.target, now)

    def soonest(self) -> Flow | None:
        """The transfer that ends first as things stand; None if nothing is under way."""
        first: Flow | None = None
        for flows in self.leaving:
            for flow in flows:
                if first is None or flow.done_s < first.done_s:
                    first = flow
        return first

    def quiet(self) -> bool:
        """Is nothing under way?"""
        return not any(self.leaving)

    def touching(self, instance: int) -> list[Flow]:
        """Flows from or to an instance."""
        return self.leaving[instance] + self.entering[instance]

    def forget(self, instance: int) -> None:
        """An instance restarted: everyone must shake hands with it again."""
        n = len(self.bytes_per_s)
        self.known = {p for p in self.known if p // n != instance and p % n != instance}

    def _reshare(self, source: int, target: int, now: float) -> None:
        for flow in self.leaving[source]:
            self._rerate(flow, now)
        for flow in self.entering[target]:
            if flow.source != source:
                self._rerate(flow, now)

    def _rerate(self, flow: Flow, now: float) -> None:
        """Give a flow its present share, unless all its bytes are out, so that only its latency is left."""
        sent = flow.rate * (now - flow.updated_s)
        if flow.rate > 0.0 and sent >= flow.left_bytes:
            return
        flow.left_bytes -= sent
        flow.updated_s = now
        flow.rate = min(
            self.bytes_per_s[flow.source] / len(self.leaving[flow.source]),
            self.bytes_per_s[flow.target] / len(self.entering[flow.target]),
        )
        flow.done_s = now + flow.left_bytes / flow.rate + flow.lead_s
