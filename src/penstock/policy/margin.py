"""What to keep from a TPOT target so that requests really meet it, learnt from those that end.

Believed step times are off, and steps vary. A request that took ``r`` times its target when the share ``m`` of it was
used would have met it with ``m / r``. The share is kept below that for all but a few of the requests, by stochastic
approximation of the quantile (Robbins and Monro 1951), for each target by itself. Since every request counts with the
share of its own time, late news does not push it too far.
"""

from __future__ import annotations

from math import exp, inf

from penstock.core.events import Event, Finished, MigrationDone, Preempted, PrefillDone
from penstock.policy.parts import Part
from penstock.policy.view import ClusterView

GAIN = 0.02
LEAST = 0.3
MOST_TARGETS = 1000


class Margin(Part):
    """Shares of TPOT targets, ``LEAST`` to 1. ``misses`` is the share of requests that may miss (0: all are 1)."""

    observes = True

    def __init__(self, misses: float) -> None:
        self._up = exp(GAIN * misses)
        self._down = exp(GAIN * (misses - 1.0))
        self.learns = misses > 0.0
        self._share: dict[float, float] = {}
        self._target: dict[int, float] = {}
        self._begun: dict[int, tuple[float, float]] = {}

    def of(self, tpot_s: float) -> float:
        """The share of a target that may be used."""
        return self._share.get(tpot_s, 1.0)

    def send(self, request: int, tpot_s: float) -> None:
        """A request was dispatched for its first token."""
        if self.learns and tpot_s < inf:
            self._target[request] = tpot_s

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Part`. Who was moved or preempted says nothing of the pace."""
        if isinstance(event, PrefillDone):
            target_s = self._target.get(event.request)
            if target_s is not None:
                self._begun[event.request] = (now_s, self.of(target_s))
        elif isinstance(event, Finished):
            begun = self._begun.get(event.request)
            if begun is not None and event.generated > 1:
                target_s = self._target[event.request]
                self._learn(target_s, begun[1], (now_s - begun[0]) / (event.generated - 1) / target_s)
        elif isinstance(event, MigrationDone | Preempted):
            self.forget(event.request, now_s)

    def forget(self, request: int, now_s: float) -> None:
        """See :class:`Part`."""
        self._target.pop(request, None)
        self._begun.pop(request, None)

    def _learn(self, target_s: float, share: float, took: float) -> None:
        now = self.of(target_s)
        if len(self._share) >= MOST_TARGETS:  # clients may ask for any
            self._share.clear()
        changed = now * (self._up if share >= now * took else self._down)
        self._share[target_s] = min(max(changed, LEAST), 1.0)
