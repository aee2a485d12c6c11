"""Llumnix (arXiv 2406.03243, OSDI'24): balance decodes by freeness, the steps a batch can still run before memory ends.

Written for mixed replicas; here its dispatch and migration rules govern the decode instances, prefills go where they
will be done first. Freeness = (capacity - resident - promised tokens) / (running + promised requests), in steps, since
each request adds one token a step. The paper counts only the head of the queue as demand; the published Python code
counts all that wait, and so do we.

The paper gives no thresholds. The Python code's -3.0 makes a source only of an instance that already lacks blocks,
while its tests use +3: we take +3 steps, the reading that fits the paper. Request choice (shortest first) and the test
against swinging back are the code's; the test looks at the request that would really move (the code looks at the
last one running). Left out: priorities and their headroom, queued-request migration, autoscaling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.types import Slo
from penstock.policy.latency import PrefillFit
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Choice, DecodePlacement, Move, Policy, Rescheduler, Running
from penstock.policy.placement import LeastPrefillWork, least_with_room
from penstock.policy.view import ClusterView, RequestRecord

LLUMNIX_OPTIONS = (
    Option("threshold", 3.0, "steps of freeness below which an instance sheds requests", "code (tests)", low=0.0),
    Option("interval", 0.05, "seconds between two looks", "code", low=0.001),
    Option(
        "choice",
        "shortest",
        "which request moves: the shortest, the longest, or the latest to come",
        "code",
        words=("shortest", "longest", "latest"),
    ),
)

_ALMOST_NONE = 1e-9
"""Added to a request count so that an empty instance has a huge freeness, larger with more memory, and no 0/0."""


def freeness(view: ClusterView, rows: Any, now_s: float) -> Any:
    """Decode steps that ``rows`` (intp[k]) can still run before memory is full; float64[k], negative if overbooked."""
    free = view.capacity_tokens[rows] - view.resident_tokens(now_s, rows)
    return free / (view.decode_requests(rows) + _ALMOST_NONE)


class HighestFreeness(DecodePlacement):
    """Dispatch to the instance with the highest freeness."""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`."""
        rows = view.decodes
        return least_with_room(view, rows, -freeness(view, rows, now_s), request.context_tokens())


class FreenessRescheduler(Rescheduler):
    """Pair the least free instances with the freest; each sheds one request, unless that swings the balance back."""

    def __init__(self, threshold: float = 3.0, interval_s: float = 0.05, choice: str = "shortest") -> None:
        self.threshold = threshold
        self.interval_s = interval_s
        self.choice = choice

    def moves(self, running: Running, view: ClusterView, now_s: float) -> list[Move]:
        """See :class:`Rescheduler`. One migration in or out per instance at a time."""
        rows = view.decodes if len(view.decodes) > 0 else view.mixed
        if len(rows) < 2:
            return []
        steps = freeness(view, rows, now_s)
        out_of_memory = view.preemptions[rows] > 0.0
        idle = view.moving[rows] == 0.0
        sheds = (steps < self.threshold) | out_of_memory
        sources = np.flatnonzero(idle & sheds)
        if len(sources) == 0:
            return []
        targets = np.flatnonzero(idle & ~sheds)
        sources = sources[steps[sources].argsort(kind="stable")]
        targets = targets[(-steps[targets]).argsort(kind="stable")]
        found: list[Move] = []
        for k in range(min(len(sources), len(targets))):
            source, target = int(rows[sources[k]]), int(rows[targets[k]])
            move = self._move(running, view, source, target, now_s)
            if move is not None:
                found.append(move)
        return found

    def _move(self, running: Running, view: ClusterView, source: int, target: int, now_s: float) -> Move | None:
        """The request of ``source`` that goes to ``target``, or None if the move would not help."""
        there = np.flatnonzero(running.instances == source)
        if len(there) == 0:
            return None
        context = running.prompt[there] + running.generated[there]
        if self.choice == "shortest":
            pick = int(context.argmin())
        elif self.choice == "longest":
            pick = int(context.argmax())
        else:
            pick = int(running.generated[there].argmin())
        tokens = float(context[pick])
        pair = np.array([source, target])
        free = view.capacity_tokens[pair] - view.resident_tokens(now_s, pair)
        count = view.decode_requests(pair)
        if count[1] + 1.0 > view.max_running[target]:
            return None
        before = free[1] / (count[1] + _ALMOST_NONE) - free[0] / (count[0] + _ALMOST_NONE)
        target_after = (free[1] - tokens) / (count[1] + 1.0)
        after = target_after - (free[0] + tokens) / (max(count[0] - 1.0, 0.0) + _ALMOST_NONE)
        # The gap must shrink and keep its sign: a move that turns it round would be undone at the next look.
        if target_after < self.threshold or not 0.0 < after < before:
            return None
        return Move(int(running.requests[there[pick]]), source, target, "freeness")


def llumnix(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``llumnix``."""
    rescheduler = FreenessRescheduler(
        number(options, "threshold"), number(options, "interval"), word(options, "choice")
    )
    return Policy("llumnix", LeastPrefillWork(PrefillFit(beliefs)), HighestFreeness(), rescheduler=rescheduler)
