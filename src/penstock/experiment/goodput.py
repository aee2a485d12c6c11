"""Goodput: the highest request rate at which the SLO is met by at least 90 % of the requests.

Found by bracketing and bisection on the logarithm of the rate. Every rate sees the same requests in the same pattern,
only closer together (common random numbers), so attainment falls with the rate nearly without noise; it is assumed to
fall, not checked. With several seeds the search is made once a seed, and the answers give mean and interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.types import Role
from penstock.experiment.binding import GOAL, Diagnosis, explain
from penstock.experiment.build import build_cluster, run
from penstock.experiment.floors import prefill_alone_s
from penstock.experiment.setup import Setup
from penstock.experiment.traffic import build_trace, slos
from penstock.report.metrics import Verdicts, summarize
from penstock.sim.result import SimResult

BELOW_BOUND = 0.7
"""Where a search starts that has a bound, as a share of it."""
WIDEST = 2.0**14
"""The search gives up this factor below and above its first guess."""


class Evaluation(msgspec.Struct, frozen=True):
    """One rate tried (requests/s) and the attainment there."""

    rate_rps: float
    attainment: float


class Search(msgspec.Struct, frozen=True):
    """What a search found.

    ``rate_rps`` is the highest rate tried that met the goal, None if the lowest did not either; ``above_rps`` the
    lowest tried that did not, None if every rate met it (the goal holds at any rate of this finite trace).
    ``evaluations`` are in order.
    """

    rate_rps: float | None
    above_rps: float | None
    evaluations: list[Evaluation]


class Goodput(msgspec.Struct, frozen=True):
    """The goodput of one policy and seed.

    ``attainment`` is that at ``rate_rps``. ``limit`` is the target missed most just above it (or at the lowest rate
    tried), and ``diagnosis`` says which resource binds there.
    """

    policy: str
    seed: int
    instances: int
    goal: float
    rate_rps: float | None
    attainment: float | None
    limit: str
    diagnosis: Diagnosis
    evaluations: list[Evaluation]


def highest_rate(
    attainment: Callable[[float], float],
    start_rps: float,
    goal: float = GOAL,
    tolerance: float = 0.02,
    widest: float = WIDEST,
    lowest_rps: float = 0.0,
    above_rps: float = math.inf,
) -> Search:
    """The highest rate with ``attainment(rate) >= goal``, for an attainment that falls with the rate.

    Doubles or halves from ``start_rps`` until the answer is bracketed (at most a factor ``widest`` either way, and not
    below ``lowest_rps``), then bisects until the bracket is narrower than ``1 + tolerance``. ``above_rps`` is a rate
    from which on the goal is known to be missed; it bounds the search from the beginning, untried.

    Raises
    ------
    PenstockError
        A goal outside (0, 1] or a tolerance that is not above 0.
    """
    if not 0 < goal <= 1:
        raise PenstockError(f"attainment goal {goal:g} is not in (0, 1]", "give --goal as a share, as 0.9")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise PenstockError(f"tolerance {tolerance:g} is not positive", "give --tolerance above 0, as 0.02 for 2 %")
    tried: list[Evaluation] = []

    def meets(rate: float) -> bool:
        tried.append(Evaluation(rate, attainment(rate)))
        return tried[-1].attainment >= goal

    low: float | None = None
    high: float | None = above_rps if math.isfinite(above_rps) else None
    rate = min(start_rps, above_rps)
    while low is None or high is None:
        if meets(rate):
            low = rate
            if high is None and rate >= start_rps * widest:
                return Search(low, None, tried)
            rate *= 2
        else:
            high = rate
            if low is None and rate <= max(start_rps / widest, lowest_rps):
                return Search(None, high, tried)
            rate = max(rate / 2, min(lowest_rps, rate))
    while high > low * (1 + tolerance):
        rate = math.sqrt(low * high)
        if meets(rate):
            low = rate
        else:
            high = rate
    return Search(low, high, tried)


def goodput(
    setup: Setup,
    seed: int,
    goal: float = GOAL,
    tolerance: float = 0.02,
    done: Callable[[int], None] | None = None,
    bound_rps: float = math.inf,
) -> Goodput:
    """Search the goodput of the setup's policy for one seed. ``done`` is told the number of runs so far.

    The lowest rate tried leaves each request alone in the cluster: an SLO missed there is missed at any rate.
    ``bound_rps`` is a rate from which on the goal is known to be missed; the search starts below it.

    Raises
    ------
    PenstockError
        As :func:`penstock.experiment.build.run`, and for goal and tolerance out of range.
    """
    base = setup.at_rate(1.0)
    cluster = build_cluster(setup)
    trace = build_trace(base, seed)
    prefills = [spec for spec in cluster.instances if spec.role is not Role.DECODE]
    mean_prompt = max(1, int(trace.prompt_tokens.mean()))
    start = sum(0.5 / prefill_alone_s(spec, mean_prompt) for spec in prefills)
    if math.isfinite(bound_rps):
        start = BELOW_BOUND * bound_rps
    alone_s = prefill_alone_s(prefills[0], int(trace.prompt_tokens.max())) + 1e-3
    steps_s = max(spec.step_model.step_s(1, 1, [], []) for spec in cluster.instances) * float(
        trace.output_tokens.mean()
    )
    ends: dict[bool, SimResult] = {}
    runs = 0

    def attainment(rate: float) -> float:
        nonlocal runs
        result = run(setup.at_rate(rate), seed, sample=False)
        met = float(Verdicts(result, slos(setup, result.trace)).met.mean())
        ends[met >= goal] = result  # the search closes in: the latest of each kind is the nearest
        runs += 1
        if done is not None:
            done(runs)
        return met

    lonely = 0.02 / (alone_s + steps_s)
    search = highest_rate(attainment, start, goal, tolerance, lowest_rps=lonely, above_rps=bound_rps)
    found = search.rate_rps
    shown = search.above_rps if search.above_rps is not None else found
    assert shown is not None
    if search.above_rps is not None and False not in ends:
        attainment(shown)  # the bound itself, which the search had no need to try
    result = ends[search.above_rps is None]
    diagnosis = explain(setup.at_rate(shown), result.trace, summarize(result, slos(setup, result.trace)), goal)
    return Goodput(
        policy=setup.policy,
        seed=seed,
        instances=len(cluster.instances),
        goal=goal,
        rate_rps=found,
        attainment=next((e.attainment for e in search.evaluations if e.rate_rps == found), None),
        limit=diagnosis.missed or ("rejections" if diagnosis.binding in ("KV capacity", "admission") else "none"),
        diagnosis=diagnosis,
        evaluations=search.evaluations,
    )
