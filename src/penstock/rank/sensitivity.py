"""Which input moves an arrangement's goodput most: one input at a time, by its own uncertainty.

Step times are off by the mean relative error of the profile or of the roofline (``plan.sources``), the KV links by
their assumed efficiency, arrivals by another draw (the interval over seeds, which is not searched again here).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.core.types import Role
from penstock.experiment.build import build_cluster
from penstock.experiment.goodput import goodput
from penstock.experiment.setup import Setup, replace
from penstock.plan.sources import errors
from penstock.rank.spread import Spread
from penstock.report.repeat import Interval
from penstock.sim.cluster import Fault, FaultKind

LINK_ERROR = 0.2
"""The links' efficiency of 0.8 is an assumption (``perf.transfer``): as wrong as this."""


class Swing(msgspec.Struct, frozen=True):
    """Goodput (requests/s) with one input worse and better than assumed by the relative ``error``."""

    input: str
    error: float
    worse_rps: float
    better_rps: float

    @property
    def width_rps(self) -> float:
        """How far the answer moves."""
        return abs(self.better_rps - self.worse_rps)


def swings(
    setup: Setup, seed: int, goal: float, tolerance: float, spread: Spread, arrivals: Interval | None = None
) -> list[Swing]:
    """The swings of a setup at one seed, the widest first; ``arrivals`` is the goodput over seeds.

    Raises PenstockError as the search does.
    """
    varied = _variants(setup)
    tasks = [(one, seed, goal, tolerance) for _, _, worse, better in varied for one in (worse, better)]
    rates = [found.rate_rps or 0.0 for found in spread(goodput, tasks)]
    found = [Swing(name, error, rates[2 * i], rates[2 * i + 1]) for i, (name, error, _, _) in enumerate(varied)]
    if arrivals is not None and arrivals.half_width is not None and arrivals.mean > 0:
        half = arrivals.half_width
        found.append(
            Swing("arrivals and lengths drawn", half / arrivals.mean, arrivals.mean - half, arrivals.mean + half)
        )
    return sorted(found, key=lambda swing: -swing.width_rps)


def _variants(setup: Setup) -> list[tuple[str, float, Setup, Setup]]:
    """(input, error, setup with it worse, setup with it better)."""
    cluster = build_cluster(setup)
    roles = [spec.role for spec in cluster.instances]
    prefill_error, decode_error = errors(setup.cluster.profile)
    found: list[tuple[str, float, Setup, Setup]] = []

    def steps(name: str, wanted: Sequence[Role], error: float) -> None:
        if error > 0:
            rows = [i for i, role in enumerate(roles) if role in wanted]
            found.append((name, error, _slowed(setup, rows, 1 + error), _slowed(setup, rows, 1 - error)))

    if Role.MIXED in roles:
        steps("step times", [Role.MIXED], max(prefill_error, decode_error))
        return found
    steps("prefill step times", [Role.PREFILL], prefill_error)
    steps("decode step times", [Role.DECODE], decode_error)
    rate = min(spec.link_bytes_per_s for spec in cluster.instances)
    worse, better = (
        replace(setup, cluster=replace(setup.cluster, link_bytes_per_s=rate * factor))
        for factor in (1 - LINK_ERROR, 1 + LINK_ERROR)
    )
    found.append(("KV link rate", LINK_ERROR, worse, better))
    return found


def _slowed(setup: Setup, instances: Sequence[int], factor: float) -> Setup:
    """Steps of these instances take ``factor`` times as long, from the beginning; the policy is told."""
    slow = tuple(Fault(0.0, i, FaultKind.SLOW, factor) for i in instances)
    return replace(setup, truth=replace(setup.truth, faults=(*slow, *setup.truth.faults)))
