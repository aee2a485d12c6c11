"""TTFT of prompts that queue: M/M/1, M/D/1, M/G/1 and several instances behind one queue, as means or percentiles.

The mean of M/M/1 is the planner's of arXiv 2603.04716, section "TTFT"; its percentile follows from the exponential
sojourn. The others are textbook (Pollaczek and Khinchine; Lee and Longton for several servers; Allen and Cunneen for
arrivals that are not Poisson). Percentiles come from the geometric compound of residual services, summed up on a grid
by a Fourier transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from penstock.core.errors import PenstockError
from penstock.perf.lookup import unknown_name
from penstock.workload.trace import F64

KINDS = ("mm1", "md1", "mg1", "pooled")
"""``mm1``, ``md1``, ``mg1``: each instance has a queue of its own (exponential, equal, or the given service times).
``pooled``: a prompt goes where it will be done first, so that all instances share one queue (M/G/k)."""
GRID = 4096
"""Points of the grid of a percentile; the error in time is about 1/4096 of twice the target."""
_DAMPING = 1e-8  # what the transform folds back from beyond the grid is smaller by this factor
_HALVINGS = 40


@dataclass(frozen=True)
class PrefillQueue:
    """The prompts' way through the prefill instances.

    Attributes
    ----------
    kind : str
        One of ``KINDS``.
    service_s : float64[n]
        Seconds of single prompts on an idle instance, ascending: a sample of their distribution (one value: the mean).
    arrival_cv : float
        Coefficient of variation of the gaps between arrivals; 1 is Poisson.
    shared_s : float64[n] or None
        What the same prompts add to a step that others fill, ascending; None where prompts go one at a time.
    step_s : float
        Seconds of a full step of several prompts; 0 where prompts go one at a time.
    """

    kind: str
    service_s: F64
    arrival_cv: float = 1.0
    shared_s: F64 | None = None
    step_s: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("queue", self.kind, list(KINDS))

    @property
    def queued_s(self) -> F64:
        """Seconds that prompts cost while others wait, ascending, float64[n]: the sample that load is made of."""
        return self.service_s if self.shared_s is None else self.shared_s

    @cached_property
    def mean_s(self) -> float:
        """Mean service time under load, seconds: its inverse is the rate at which one instance saturates."""
        return float(self.queued_s.mean())

    @cached_property
    def alone_s(self) -> float:
        """Mean service time on an idle instance, seconds."""
        return float(self.service_s.mean())

    @cached_property
    def residual_s(self) -> float:
        """Mean seconds left of the service that an arrival finds in progress, ``E[S²] / 2 E[S]``."""
        if self.kind == "mm1":
            return self.mean_s
        if self.kind == "md1":
            return self.mean_s / 2
        return float(np.mean(self.queued_s**2) / (2 * self.mean_s))

    def floor_s(self, percentile: float | None = None) -> float:
        """TTFT at hardly any load: what no number of instances can beat."""
        if self.kind == "mm1":
            return self.alone_s * _tail(percentile)
        if percentile is None or self.kind == "md1":
            return self.alone_s
        # The first that more than this share are within: one within exactly this share is exceeded by any wait at all.
        return float(self.service_s[int(len(self.service_s) * percentile / 100)])

    def ttft_s(self, rate_rps: float, servers: int, percentile: float | None = None) -> float:
        """Mean (or percentile) of queueing and prefill, seconds, at ``rate_rps`` over ``servers``; inf if unstable."""
        if rate_rps * self.mean_s >= servers:
            return math.inf
        if self._is_plain:
            return _tail(percentile) / (1 / self.mean_s - rate_rps / servers)
        if percentile is None:
            return self.alone_s + self._wait_s(rate_rps, servers)
        high = self.alone_s + self._wait_s(rate_rps, servers)
        while self._share_within(high, rate_rps, servers) < percentile / 100:
            high *= 2
        low = 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._share_within(middle, rate_rps, servers) < percentile / 100:
                low = middle
            else:
                high = middle
        return high

    def highest_rps(self, servers: int, ttft_s: float, percentile: float | None = None) -> float:
        """The highest rate that keeps the mean (or percentile) within ``ttft_s``; 0 where no rate does.

        M/M/1, mean: ``servers × (1 / s - 1 / TTFT)`` (arXiv 2603.04716, its effective throughput over input length).
        """
        if ttft_s <= self.floor_s(percentile):
            return 0.0
        if not math.isfinite(ttft_s):
            return servers / self.mean_s
        if self.kind != "pooled" and servers > 1:
            return servers * self.highest_rps(1, ttft_s, percentile)
        if self._is_plain:
            return servers * (1 / self.mean_s - _tail(percentile) / ttft_s)
        low, high = 0.0, servers / self.mean_s
        for _ in range(_HALVINGS):
            rate = (low + high) / 2
            if self._keeps(ttft_s, rate, servers, percentile):
                low = rate
            else:
                high = rate
            if high - low <= 1e-9 * high:
                break
        return low

    @property
    def _is_plain(self) -> bool:
        """M/M/1 as the paper has it, with a closed form for the percentile too."""
        return self.kind == "mm1" and self.arrival_cv == 1 and self.shared_s is None

    def _keeps(self, ttft_s: float, rate_rps: float, servers: int, percentile: float | None) -> bool:
        if percentile is None:
            return self.ttft_s(rate_rps, servers) <= ttft_s
        return self._share_within(ttft_s, rate_rps, servers) >= percentile / 100

    def _load(self, rate_rps: float, servers: int) -> tuple[int, float, float]:
        """Servers of one queue, their utilisation, and the probability that all are busy."""
        k = servers if self.kind == "pooled" else 1
        load = rate_rps * self.mean_s / servers
        return k, load, erlang_c(k, k * load)

    def _wait_s(self, rate_rps: float, servers: int) -> float:
        k, load, busy = self._load(rate_rps, servers)
        plain = busy * self.residual_s / (k * (1 - load))
        return plain * self._stretch(plain, load)

    def _stretch(self, plain_s: float, load: float) -> float:
        """Factor on the wait: arrivals that are not Poisson, and steps that end for all their prompts at once.

        Where prompts share steps, an engine is a queue with gated batches, each with a setup (what a step costs
        besides its prompts). A prompt then waits for the rest of one batch and all of its own: ``(1 + 2 ρ) / (1 + ρ)``
        times the wait, plus ``(1/2 + ρ) setup / (1 - ρ)`` when the engine is busy. Neither lasts longer than full
        steps do (ours, after the gated M/G/1 with vacations).
        """
        if plain_s <= 0:
            return 1.0
        bursts = 1.0
        if self.arrival_cv != 1:
            variability = 2 * self.residual_s / self.mean_s - 1  # squared coefficient of variation of the service
            bursts = (self.arrival_cv**2 + variability) / (1 + variability)
        if self.shared_s is None:
            return bursts
        together = min(plain_s * load / (1 + load), max(self.step_s - self.mean_s, 0.0) / 2)
        setup = max(self.alone_s - self.mean_s, 0.0)
        busy = min(load * self.alone_s / self.mean_s, 1.0)
        together += busy * (0.5 + load) * min(setup / (1 - load), self.step_s)
        return bursts * (1 + together / plain_s)

    def _share_within(self, limit_s: float, rate_rps: float, servers: int) -> float:
        """Share of the prompts whose queueing and prefill take at most ``limit_s``."""
        k, load, busy = self._load(rate_rps, servers)
        if load >= 1:
            return 0.0
        plain = busy * self.residual_s / (k * (1 - load))
        stretch = self._stretch(plain, load) / k
        width = 2 * limit_s / GRID
        damp = _DAMPING ** (np.arange(GRID) / GRID)
        step = np.fft.rfft(self._residual_mass(width, stretch) * damp)
        positive = step * (1 - load) / (1 - load * step)
        total = (1 - busy + busy * positive) * np.fft.rfft(self._service_mass(width) * damp)
        mass = np.fft.irfft(total, GRID) / damp
        # Half of the cell at the limit itself lies beyond it.
        inside = GRID // 2
        return float(min(mass[:inside].sum() + 0.5 * mass[inside], 1.0))

    def _residual_mass(self, width: float, stretch: float) -> F64:
        """Probability that the residual service, times ``stretch``, falls into each cell of the grid."""
        edges = np.concatenate([[0.0], (np.arange(GRID) + 0.5) * width]) / stretch
        if self.kind == "mm1":
            below: F64 = 1 - np.exp(-edges / self.mean_s)
            return np.diff(below)
        services = np.array([self.mean_s]) if self.kind == "md1" else self.queued_s
        sums = np.concatenate([[0.0], np.cumsum(services)])
        count = np.searchsorted(services, edges)
        shortened = (sums[count] + edges * (len(services) - count)) / len(services)  # E[min(S, edge)]
        mass: F64 = np.diff(shortened) / services.mean()
        return mass

    def _service_mass(self, width: float) -> F64:
        if self.kind == "mm1":
            edges = np.concatenate([[0.0], (np.arange(GRID) + 0.5) * width])
            return np.diff(1 - np.exp(-edges / self.alone_s))
        services = np.array([self.alone_s]) if self.kind == "md1" else self.service_s
        # Split between two cells so that the mean stays.
        place = services / width
        cell = np.floor(place).astype(np.int64)
        part = place - cell
        mass = np.zeros(GRID + 1)
        for cells, weight in ((cell, 1 - part), (cell + 1, part)):
            inside = cells < GRID
            mass += np.bincount(cells[inside], weights=weight[inside], minlength=GRID + 1)
        return mass[:GRID] / len(services)


def erlang_c(servers: int, offered: float) -> float:
    """Probability that all of ``servers`` are busy, at ``offered`` Erlangs (below ``servers``), Poisson arrivals."""
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    load = offered / servers
    return blocked / (1 - load + load * blocked)


def check_percentile(percentile: float | None) -> None:
    """Raises PenstockError unless the percentile is None (mean) or between 0 and 100."""
    if percentile is not None and not 0 < percentile < 100:
        raise PenstockError(f"percentile {percentile:g} is not between 0 and 100", "give --percentile 90, or leave it")


def _tail(percentile: float | None) -> float:
    """An exponential's mean (1) or percentile, in units of its mean."""
    return 1.0 if percentile is None else -math.log1p(-percentile / 100)
