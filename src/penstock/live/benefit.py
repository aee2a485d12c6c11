"""What moves have been good for, seen from the end of the request. The definition is ours.

For the rest of the moved request's life, up to its next move: the mean time per token on the source less that on the
target (over all decodes there), times the tokens that the request got after the move, less the pause of the move. It
is the decoding time that the request would have spent in addition had it stayed, if its coming and going changed
nothing for the others. Where the source had nothing to decode any more there is no knowing, and the difference counts
as none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from penstock.core.types import MigrationLevel
from penstock.live.histogram import Histogram
from penstock.live.instance import Instance

if TYPE_CHECKING:
    from penstock.live.carried import CarriedSession

BOUNDS = (-10.0, -3.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Benefit:
    """One move whose request still runs where it moved to. ``pause_s`` is filled in when the client has seen it."""

    def __init__(self, source: Instance, target: Instance, level: MigrationLevel, reason: str, generated: int) -> None:
        self.level = level
        self.reason = reason
        self.pause_s = 0.0
        self._generated = generated
        self._source = _Pace(source)
        self._target = _Pace(target)

    def realised_s(self, generated: int) -> float:
        """Seconds gained until now, when the request has ``generated`` output tokens."""
        source, target = self._source.mean_s(), self._target.mean_s()
        gained = source - target if source > 0.0 and target > 0.0 else 0.0
        return gained * (generated - self._generated) - self.pause_s


class _Pace:
    """Mean time per token of an instance's streams from now on."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._decoded, self._seconds = instance.decoded, instance.decoding_s

    def mean_s(self) -> float:
        """Seconds; 0 where it has decoded nothing."""
        decoded = self._instance.decoded - self._decoded
        return (self._instance.decoding_s - self._seconds) / decoded if decoded else 0.0


class Benefits:
    """Realised benefits of moves, by level and reason."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], Histogram] = {}
        self.better: Counter[tuple[str, str]] = Counter()

    def open(
        self, session: CarriedSession, source: Instance, target: Instance, level: MigrationLevel, reason: str
    ) -> Benefit:
        """A move is complete: its account begins, and that of an earlier one of the same request ends."""
        self.close(session)
        session.benefit = Benefit(source, target, level, reason, session.generated)
        return session.benefit

    def close(self, session: CarriedSession) -> None:
        """The request has ended, or moves again. Does nothing for one that has not moved."""
        benefit, session.benefit = session.benefit, None
        if benefit is None:
            return
        key = (benefit.level.name.lower(), benefit.reason)
        gained_s = benefit.realised_s(session.generated)
        self.seconds.setdefault(key, Histogram(BOUNDS)).add(gained_s)
        self.better[key] += gained_s > 0.0

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        labels = ["level", "reason"]
        seconds = HistogramMetricFamily(
            "penstock:migration_benefit_seconds",
            "Decoding time saved for the moved request (docs/live.md)",
            labels=labels,
        )
        # Prometheus leaves out the sum of a histogram that has values below 0.
        net = GaugeMetricFamily("penstock:migration_benefit_net_seconds", "Sum of the same", labels=labels)
        better = CounterMetricFamily("penstock:migrations_worthwhile", "Moves with a benefit above 0", labels=labels)
        for key, histogram in self.seconds.items():
            seconds.add_metric(list(key), histogram.buckets(), histogram.total)
            better.add_metric(list(key), self.better[key])
            net.add_metric(list(key), histogram.total)
        yield seconds
        yield net
        yield better
