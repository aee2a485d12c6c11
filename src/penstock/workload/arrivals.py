"""Arrival processes. All vectorised: a million arrivals take some tens of milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from penstock.core.errors import PenstockError
from penstock.workload.trace import F64

Gaps = Callable[[int], F64]


@dataclass(frozen=True)
class Phase:
    """A stretch of time with one arrival rate.

    Attributes
    ----------
    duration_s : float
        Seconds, above 0.
    rate_rps : float
        Mean requests per second, 0 (silence) or more.
    cv : float
        Coefficient of variation of the gaps: 1 is Poisson, 0 is a metronome, above 1 comes in bursts.
    """

    duration_s: float
    rate_rps: float
    cv: float = 1.0


def check_rate(rate_rps: float) -> None:
    """Raise PenstockError unless the rate is a finite number above 0."""
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise PenstockError(f"rate {rate_rps:g} requests/s is not positive", "give a rate above 0")


def constant_arrivals(n: int, rate_rps: float) -> F64:
    """``n`` arrivals at equal distance, float64[n] seconds from 0."""
    check_rate(rate_rps)
    return np.arange(n, dtype=np.float64) / rate_rps


def poisson_arrivals(n: int, rate_rps: float, rng: np.random.Generator) -> F64:
    """``n`` arrivals of a Poisson process, float64[n] seconds, the first at 0."""
    return gamma_arrivals(n, rate_rps, 1.0, rng)


def gamma_arrivals(n: int, rate_rps: float, cv: float, rng: np.random.Generator) -> F64:
    """``n`` arrivals with gamma-distributed gaps, float64[n] seconds, the first at 0.

    The usual model of bursty traffic (AlpaServe, Mooncake, ServeGen; vLLM's ``--burstiness`` is 1/cv²): mean gap
    ``1 / rate_rps``, coefficient of variation ``cv``.

    Raises
    ------
    PenstockError
        For a rate that is not above 0 or a cv that is negative or not finite.
    """
    check_rate(rate_rps)
    gaps = _gamma_gaps(cv, rng)(n) / rate_rps
    gaps[:1] = 0.0
    return np.cumsum(gaps)


def phased_arrivals(phases: tuple[Phase, ...], rng: np.random.Generator) -> tuple[F64, list[int]]:
    """Arrivals of consecutive phases.

    Returns
    -------
    arrival_s : float64[n]
        Seconds since the start of the first phase (so the first arrival is usually above 0).
    counts : list of int
        Arrivals per phase, summing to n.
    """
    start_s, parts = 0.0, []
    for phase in phases:
        if not (math.isfinite(phase.duration_s) and phase.duration_s > 0):
            raise PenstockError(f"a phase of {phase.duration_s:g} s", "give each phase a duration above 0")
        parts.append(start_s + window_arrivals(phase.duration_s, phase.rate_rps, _gamma_gaps(phase.cv, rng)))
        start_s += phase.duration_s
    counts = [len(part) for part in parts]
    return (np.concatenate(parts) if parts else np.empty(0)), counts


def window_arrivals(duration_s: float, rate_rps: float, gaps: Gaps) -> F64:
    """Arrivals of a renewal process within ``[0, duration_s)``, float64[n] ascending.

    Parameters
    ----------
    gaps : callable
        ``gaps(n)`` draws n gaps with mean 1 (they are divided by ``rate_rps`` here).

    Notes
    -----
    The process starts before the window, so that it is already stationary at 0: a renewal process that starts *at* 0
    has on average (cv² - 1) / 2 arrivals too many in the window, which is far from nothing at the cv of 20 that
    production clients show.
    """
    if not (math.isfinite(rate_rps) and rate_rps >= 0):
        raise PenstockError(f"rate {rate_rps:g} requests/s is negative or not finite", "give a rate of 0 or more")
    if rate_rps == 0:
        return np.empty(0)
    warm_up = 64.0
    end = warm_up + duration_s * rate_rps  # time in mean gaps
    size = int(end * 1.05 + 4 * math.sqrt(end)) + 16
    total, parts = 0.0, []
    while total < end:
        part = total + np.cumsum(gaps(size))
        total = float(part[-1])
        parts.append(part)
    arrival = np.concatenate(parts) - warm_up
    arrival = arrival[(arrival >= 0) & (arrival < end - warm_up)] / rate_rps
    # Division may round the last one up to the end itself.
    return arrival[arrival < duration_s]


def _gamma_gaps(cv: float, rng: np.random.Generator) -> Gaps:
    """A drawer of gamma gaps with mean 1."""
    if not (math.isfinite(cv) and cv >= 0):
        raise PenstockError(f"coefficient of variation {cv:g}", "give 0 (regular), 1 (Poisson) or more (bursts)")
    if cv == 0:
        return np.ones
    if cv == 1:
        return rng.standard_exponential  # the same distribution, ten times faster
    shape = 1 / cv**2
    return lambda n: rng.standard_gamma(shape, n) / shape
