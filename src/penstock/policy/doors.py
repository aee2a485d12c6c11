"""The waiting room of ``auto``: who may still be on time goes first, and as many of them as possible.

Requests wait with the controller until an instance can take them, so that one queue feeds all (late binding) and the
order can change until the last moment. The order is Moore and Hodgson's (Management Science 15, 1968): by deadline,
and where somebody would be late, whoever costs most of those before is put off; on one machine that is the fewest late
jobs possible. Here the machines are taken as one that is as fast as all together. Whoever can no longer be on time is
served when nobody else waits, and refused after ``patience_s``.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import islice
from math import inf
from typing import Protocol

from penstock.core.events import Event, Finished, PrefillDone
from penstock.policy.parts import Part, WaitingRoom
from penstock.policy.view import ClusterView, RequestRecord

REPLAN_S = 0.02
"""The order is worked out again after so long, or when it is used up."""
SURPRISE, LEAST_SURPRISE_S = 4.0, 0.2
"""A lag counts with at most so many deviations and seconds: one outage must not make everybody late."""
BATCH = 8
"""Requests offered at once; the next event offers more."""


class Capacity(Protocol):
    """What the room asks of the placement it serves."""

    def open_rate(self, view: ClusterView, now_s: float) -> float:
        """Prefill tokens/s of all instances together; 0 while none of them takes anybody."""
        ...

    def prefill_s(self, tokens: int) -> float:
        """Seconds that a prompt of ``tokens`` is likely to take where nothing is before it."""
        ...


class Lag(Part):
    """How much longer than its prefill it takes from dispatch to the first token: mean and deviation, learnt."""

    observes = True

    def __init__(self, deviations: float, gain: float = 0.05) -> None:
        self.deviations = deviations
        self.gain = gain
        self.mean_s = 0.0
        self.deviation_s = 0.0
        self._sent: dict[int, tuple[float, float]] = {}

    def safe_s(self) -> float:
        """What to allow for."""
        return self.mean_s + self.deviations * self.deviation_s

    def misses(self, request: RequestRecord, prefill_s: float, now_s: float) -> bool:
        """Would the first token come too late, if the request were dispatched now?"""
        return request.generated == 0 and now_s + self.safe_s() + prefill_s > _deadline_s(request)

    def send(self, request: int, now_s: float, prefill_s: float) -> None:
        """A request was dispatched."""
        self._sent[request] = (now_s, prefill_s)

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Part`."""
        if isinstance(event, PrefillDone | Finished):
            sent = self._sent.pop(event.request, None)
            if sent is not None:
                off = now_s - sent[0] - sent[1] - self.mean_s
                most_s = SURPRISE * self.deviation_s + LEAST_SURPRISE_S
                off = min(max(off, -most_s), most_s)
                self.mean_s += self.gain * off
                self.deviation_s += self.gain * (abs(off) - self.deviation_s)

    def forget(self, request: int, now_s: float) -> None:
        """See :class:`Part`."""
        self._sent.pop(request, None)


class Doors(WaitingRoom):
    """``sort=False``: first come, first served. The plan counts on the share ``caution`` of the capacity's rate.

    A plan that promises all there is puts nobody off until it is too late for somebody.
    """

    def __init__(
        self, capacity: Capacity, lag: Lag, patience_s: float, sort: bool = True, caution: float = 1.0
    ) -> None:
        self.capacity = capacity
        self.lag = lag
        self.patience_s = patience_s
        self.sort = sort
        self.caution = caution
        self.waiting: dict[int, RequestRecord] = {}
        self.late: dict[int, RequestRecord] = {}
        self._plan: deque[RequestRecord] = deque()
        self._planned_s = self._aside_s = -inf

    def enter(self, request: RequestRecord) -> None:
        """See :class:`WaitingRoom`."""
        self.waiting[request.request] = request

    def leave(self, request: RequestRecord) -> None:
        """See :class:`WaitingRoom`."""
        self.waiting.pop(request.request, None)
        self.late.pop(request.request, None)

    def order(self, view: ClusterView, now_s: float) -> list[RequestRecord]:
        """See :class:`WaitingRoom`."""
        rate = self.capacity.open_rate(view, now_s)
        if rate <= 0.0:
            return []
        if not self.sort:
            return list(self.waiting.values())
        plan = self._plan
        while plan and plan[0].request not in self.waiting:  # placed, or gone
            plan.popleft()
        if not plan or now_s > self._planned_s + REPLAN_S:
            self._set_late_aside(now_s)
            self._plan = plan = deque(self._worked_out(rate, now_s + self.lag.safe_s()))
            self._planned_s = now_s
        first = [record for record in islice(plan, BATCH) if record.request in self.waiting]
        return first if first else list(islice(self.late.values(), BATCH))

    def _set_late_aside(self, now_s: float) -> None:
        self._aside_s = now_s
        late = [
            record
            for record in self.waiting.values()
            if self.lag.misses(record, self.capacity.prefill_s(record.context_tokens()), now_s)
        ]
        for record in late:
            del self.waiting[record.request]
            self.late[record.request] = record

    def _worked_out(self, rate: float, ready_s: float) -> list[RequestRecord]:
        """Whose answer broke off goes first, then who can be on time."""
        broken = [record for record in self.waiting.values() if record.generated > 0]
        return broken + on_time(
            [record for record in self.waiting.values() if record.generated == 0], rate * self.caution, ready_s
        )

    def hopeless(self, view: ClusterView, now_s: float) -> list[RequestRecord]:
        """See :class:`WaitingRoom`."""
        if self.sort and now_s > self._aside_s + REPLAN_S:  # also while nobody is open
            self._set_late_aside(now_s)
        gone: list[RequestRecord] = []
        for record in (self.late if self.sort else self.waiting).values():  # nearly in the order of their deadlines
            if now_s <= _deadline_s(record) + self.patience_s or record.generated > 0:
                break
            gone.append(record)
        return gone


def on_time(waiting: list[RequestRecord], rate: float, now_s: float) -> list[RequestRecord]:
    """Moore and Hodgson: the largest set that can be on time at ``rate`` tokens/s, by deadline.

    If there is somebody, somebody is returned: whoever comes first would be on time alone.
    """
    chosen: list[RequestRecord] = []
    dropped: set[int] = set()
    by_cost: list[tuple[int, int]] = []
    end_s = now_s
    for record in sorted(waiting, key=_deadline):
        tokens = record.context_tokens()
        end_s += tokens / rate
        heappush(by_cost, (-tokens, record.request))
        chosen.append(record)
        while end_s > _deadline_s(record) and len(by_cost) > 1:
            tokens, request = heappop(by_cost)
            end_s += tokens / rate  # negative
            dropped.add(request)
    return [record for record in chosen if record.request not in dropped]


def _deadline(record: RequestRecord) -> tuple[float, int]:
    return _deadline_s(record), record.request


def _deadline_s(record: RequestRecord) -> float:
    return record.arrival_s + record.slo.ttft_s
