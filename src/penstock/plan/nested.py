"""Nested WAIT's memory (arXiv 2504.11320, section 5): output lengths unknown, segments of stages, a buffer at each.

All requests have the same prompt. Segment k holds the stages after ``ends[k-1]`` up to ``ends[k]`` (the first one stage
0 as well), ``thresholds[k]`` requests at each. Who survives a segment queues at the entrance of the next one, with the
KV it has: that queue is random, and the bound says how much memory it needs but with probability delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import exp, inf, log, log1p
from typing import Final

import msgspec

from penstock.core.errors import PenstockError
from penstock.plan.fluid import MARGIN, Flow, StepCost

_WIDEST: Final = 1e6
"""Largest decay rate that a root is looked for at."""
_MOST_STARTS: Final = 100_000


class Segments(msgspec.Struct, frozen=True):
    """Requests of ``prompt`` tokens that end after stage ``ends[k]`` at ``rates[k]`` requests/s, ascending."""

    prompt: float
    ends: tuple[float, ...]
    rates: tuple[float, ...]

    def flows(self) -> list[Flow]:
        """The same as types of WAIT, one a segment."""
        return [Flow(self.prompt, end, rate) for end, rate in zip(self.ends, self.rates, strict=True)]

    def survival(self) -> tuple[float, ...]:
        """p_2 .. p_m: of those who enter segment k - 1, the share that enters segment k."""
        tails = [sum(self.rates[k:]) for k in range(len(self.rates))]
        return tuple(tails[k] / tails[k - 1] for k in range(1, len(tails)))

    def stages(self) -> tuple[float, ...]:
        """delta_k: stages in each segment."""
        return tuple(end - start for end, start in zip(self.ends, (-1.0, *self.ends), strict=False))

    def middles(self) -> tuple[float, ...]:
        """The mean stage of each segment."""
        starts = (0.0, *(end + 1.0 for end in self.ends[:-1]))
        return tuple(0.5 * (start + end) for start, end in zip(starts, self.ends, strict=True))


class Bound(msgspec.Struct, frozen=True):
    """What Nested WAIT needs.

    ``batch_tokens`` is M_pi, the fullest batch, and ``batch_s`` its step; ``gather_s`` what the first threshold takes
    to gather; ``keeps_up`` says that every queue drains faster than it fills. ``thetas`` are the decay rates of the
    queues at the entrances of segments 2 .. m, ``floors`` their closed lower bounds, ``buffer_tokens`` what these
    queues hold at most, but with probability delta, ``memory_tokens`` both together.
    """

    batch_tokens: float
    batch_s: float
    gather_s: float
    keeps_up: bool
    thetas: tuple[float, ...]
    floors: tuple[float, ...]
    buffer_tokens: float
    memory_tokens: float


def decay_rate(before: float, here: float, survival: float) -> float:
    """The theta > 0 with ``exp(-theta here) (1 - p + p e^theta)^before = 1``.

    Batches of ``before`` requests arrive thinned by p = ``survival``, ``here`` leave: the queue's tail falls as
    ``e^(-theta x)``.

    Raises
    ------
    PenstockError
        No root: the queue grows without bound (``here <= before p``) or is never longer than a batch (``here >=
        before``).
    """
    _require(before, here, survival)
    from scipy.optimize import brentq

    def growth(theta: float) -> float:
        # log(1 - p + p e^theta), written so that a large theta does not overflow
        spread = log(survival) + theta + log1p((1.0 - survival) / survival * exp(-theta))
        return before * spread - here * theta

    high = floor = decay_floor(before, here, survival)
    while growth(high) < 0.0:
        high *= 2.0
        if high > _WIDEST:
            raise PenstockError(f"no decay rate for thresholds {before:g} and {here:g}", "bring them further apart")
    if growth(0.5 * floor) >= 0.0:  # so small that rounding hides the dip: then the floor is the root
        return floor
    return float(brentq(growth, 0.5 * floor, high, xtol=1e-14))


def decay_floor(before: float, here: float, survival: float) -> float:
    """The lower bound of :func:`decay_rate`: ``8 (here - before p) / before`` (Hoeffding)."""
    return 8.0 * (here - before * survival) / before


def _require(before: float, here: float, survival: float) -> None:
    if not 0.0 < survival < 1.0:
        raise PenstockError(f"a survival of {survival:g}", "it must lie between 0 and 1")
    if not before * survival < here < before:
        raise PenstockError(
            f"threshold {here:g} after {before:g} where {survival:.4g} of the requests go on",
            f"choose it between {before * survival:g} and {before:g}, both excluded",
        )


def batch_tokens(segments: Segments, thresholds: Sequence[float]) -> float:
    """M_pi: KV tokens of a batch with n_k requests at every stage of segment k."""
    shape = zip(thresholds, segments.middles(), segments.stages(), strict=True)
    return sum(n * (segments.prompt + middle) * stages for n, middle, stages in shape)


def batch_seconds(segments: Segments, cost: StepCost, thresholds: Sequence[float]) -> float:
    """Seconds of the step with n_k requests at every stage of segment k."""
    total = cost.base_s + cost.per_token_s * batch_tokens(segments, thresholds)
    if cost.per_prompt_token_s >= 0.0:
        total += thresholds[0] * segments.prompt * (cost.per_prompt_token_s - cost.per_token_s)
    decodes = sum(n * stages for n, stages in zip(thresholds, segments.stages(), strict=True)) - thresholds[0]
    return total + cost.per_request_s * decodes


def whole_thresholds(segments: Segments, cost: StepCost, eta: float = 0.05, margin: float = MARGIN) -> tuple[int, ...]:
    """The smallest whole thresholds that keep up: ``n_k`` near ``n_(k-1) min(p_k + eta, 0.99)``, as the practical rule.

    The first is tried upwards until its batch takes ``1 + margin`` times less than it takes to gather. Ours.

    Raises
    ------
    PenstockError
        None up to 100,000 does: unstable, or too many segments for so few requests a step.
    """
    rate = sum(segments.rates)
    survival = segments.survival()
    for first in range(1, _MOST_STARTS):
        found = [first]
        for p in survival:
            here = max(int(found[-1] * p) + 1, round(found[-1] * min(p + eta, 0.99)))
            if here >= found[-1]:
                break
            found.append(here)
        batch_s = batch_seconds(segments, cost, found) if len(found) > len(survival) else inf
        if (1.0 + margin) * batch_s <= first / rate:
            return tuple(found)
    raise PenstockError(
        f"no thresholds keep up with {rate:g} requests/s in {len(survival) + 1} segments",
        "give a lower rate, fewer segments or a smaller eta",
    )


def bound(
    segments: Segments, cost: StepCost, thresholds: Sequence[float], horizon_s: float, delta: float, zeta: float = 1.0
) -> Bound:
    """The memory that Nested WAIT needs in ``horizon_s`` seconds, but with probability ``delta``.

    ``zeta`` scales rates and speed together (the paper's heavy traffic limit).

    Raises
    ------
    PenstockError
        Lengths that do not ascend, thresholds that violate ``p_k < n_k / n_(k-1) < 1``, or a delta that is none.
    """
    count = len(segments.ends)
    ends = segments.ends
    if count == 0 or len(segments.rates) != count or len(thresholds) != count:
        raise PenstockError(
            f"{count} segments, {len(segments.rates)} rates, {len(thresholds)} thresholds", "give as many of each"
        )
    if ends[0] < 0 or any(b <= a for a, b in pairwise(ends)) or min(segments.rates) <= 0.0:
        raise PenstockError("segments must end one after the other", "give ascending output lengths, rates above 0")
    if not 0.0 < delta < 1.0 or horizon_s <= 0.0:
        raise PenstockError(f"delta {delta:g} over {horizon_s:g} s", "delta must lie in (0, 1), the time above 0")
    batch = batch_tokens(segments, thresholds)
    batch_s = batch_seconds(segments, cost, thresholds)
    gather_s = thresholds[0] / sum(segments.rates)
    thetas, floors, buffer = [], [], 0.0
    spread = log(count * (1.0 + zeta * horizon_s / cost.base_s) / delta)
    for k, p in enumerate(segments.survival(), start=1):
        theta = decay_rate(thresholds[k - 1], thresholds[k], p)
        thetas.append(theta)
        floors.append(decay_floor(thresholds[k - 1], thresholds[k], p))
        buffer += (segments.prompt + ends[k - 1]) * (thresholds[k] + spread / theta)
    return Bound(
        batch_tokens=batch,
        batch_s=batch_s,
        gather_s=gather_s,
        keeps_up=batch_s < gather_s,
        thetas=tuple(thetas),
        floors=tuple(floors),
        buffer_tokens=buffer,
        memory_tokens=batch + buffer,
    )
