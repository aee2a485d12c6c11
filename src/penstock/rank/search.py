"""The ranking: bounds for all arrangements, searches for those that could matter, and their order.

What could matter is the first ``top`` places by goodput per GPU and by goodput per dollar, the best of mixed and of
disaggregated arrangements, and the front of cost and goodput. An arrangement is left out only if its bound shows that
it is on none of these, so the answer is the same as without pruning (up to the tolerance of the search). Searches go
in waves, most promising bounds first, each wave twice the one before: a wave's answers prune the next ones. Neither
waves nor answers depend on the number of processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from penstock.core.errors import PenstockError
from penstock.experiment.binding import GOAL, Diagnosis
from penstock.experiment.build import build_cluster
from penstock.experiment.goodput import Goodput, goodput
from penstock.experiment.setup import Setup
from penstock.experiment.traffic import build_trace
from penstock.rank.arrangement import Arrangement, setup_of, title, usd_per_hour
from penstock.rank.bounds import Bound, Bounds
from penstock.rank.space import Space, arrangements, check_space, hopeless
from penstock.rank.spread import Spread
from penstock.report.repeat import Interval, interval

FIRST_WAVE = 8
SEARCHED, PRUNED, UNREACHABLE, UNFIT = "searched", "pruned", "unreachable", "does not fit"


class Candidate(msgspec.Struct):
    """An arrangement and what is known of it.

    ``status`` is ``searched``, ``pruned`` (its bound shows that it cannot matter), ``unreachable`` (no rate meets the
    goal) or ``does not fit``. Rates in requests/s; ``goodput_rps`` over seeds, a seed without any rate counts as 0.
    ``usd_per_hour`` is None without a price. ``bound_by`` names the resource of the bound, ``binding`` what binds just
    above the goodput (most frequent over seeds); ``reason`` says it in words, or why there is no goodput.
    ``on_front``: no searched arrangement costs as little and sustains more. ``runs`` counts simulations.
    """

    name: str
    arrangement: Arrangement
    gpus: int
    usd_per_hour: float | None
    status: str = PRUNED
    bound_rps: float | None = None
    bound_by: str = ""
    goodput_rps: Interval | None = None
    limit: str = ""
    binding: str = ""
    reason: str = ""
    on_front: bool = False
    runs: int = 0

    @property
    def rate_rps(self) -> float:
        """Mean goodput, 0 where there is none."""
        return 0.0 if self.goodput_rps is None else self.goodput_rps.mean

    @property
    def per_gpu(self) -> float:
        """Goodput per GPU, requests/s."""
        return self.rate_rps / self.gpus

    @property
    def per_usd(self) -> float | None:
        """Requests within their targets per US dollar, at the goodput."""
        return None if self.usd_per_hour is None else 3600 * self.rate_rps / self.usd_per_hour

    def cost(self) -> float:
        """US dollars an hour, or GPUs where a price is missing."""
        return self.usd_per_hour if self.usd_per_hour is not None else float(self.gpus)


class Ranking(msgspec.Struct, frozen=True):
    """All candidates, best goodput per GPU first, then those without a goodput.

    ``longest`` is the longest request in tokens, ``priced`` says whether costs are dollars (else GPUs).
    """

    candidates: list[Candidate]
    seeds: list[int]
    goal: float
    tolerance: float
    top: int
    priced: bool
    longest: int

    def setup_of(self, base: Setup, c: Candidate) -> Setup:
        """The experiment of a candidate, given the base of the ranking."""
        return setup_of(base, c.arrangement, self.longest)

    def documents(self) -> list[dict[str, Any]]:
        """The candidates as plain JSON types, with what follows from their fields."""
        derived = [{"goodput_per_gpu_rps": c.per_gpu, "requests_per_usd": c.per_usd} for c in self.candidates]
        return [msgspec.to_builtins(c) | more for c, more in zip(self.candidates, derived, strict=True)]

    def searched(self) -> list[Candidate]:
        """Those that were searched, in order."""
        return [c for c in self.candidates if c.status == SEARCHED]

    def winner(self) -> Candidate:
        """The first place by goodput per GPU; of equals, the one that sustains more in all."""
        return self.candidates[0]

    def best_per_usd(self) -> Candidate | None:
        """The first place by goodput per dollar, None without prices."""
        found = [c for c in self.searched() if c.per_usd is not None]
        return max(found, key=lambda c: (c.per_usd or 0.0, c.rate_rps), default=None)

    def most(self, disaggregated: bool) -> Candidate | None:
        """The mixed or disaggregated arrangement with the highest goodput per GPU, None if none has any."""
        found = [c for c in self.searched() if c.arrangement.disaggregated is disaggregated]
        return found[0] if found else None


def rank(
    base: Setup,
    space: Space,
    seeds: Sequence[int],
    spread: Spread,
    *,
    goal: float = GOAL,
    tolerance: float = 0.02,
    top: int = 5,
    prune: bool = True,
    prices: dict[str, float] | None = None,
    done: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Search what could matter of a space.

    Parameters
    ----------
    base : Setup
        Workload, targets, policy of disaggregated arrangements and engine options; its instances are replaced.
    seeds : sequence of int
        Each arrangement is searched once a seed; equal seeds bring equal requests to all arrangements.
    spread : Spread
        Where searches run.
    top : int
        So many places, by either measure, are certain not to be pruned.
    prices : dict, optional
        US dollars per GPU-hour by hardware; cost is counted in GPUs where a kind is missing.
    done : callable, optional
        Told the number of candidates that are dealt with, and of all.

    Raises
    ------
    PenstockError
        Nothing fits, no arrangement can meet the goal at any rate, or figures out of range.
    """
    if not 0 < goal <= 1:
        raise PenstockError(f"attainment goal {goal:g} is not in (0, 1]", "give --goal as a share, as 0.9")
    if top < 1:
        raise PenstockError(f"{top} places", "give --top of 1 or more")
    check_space(space, base.cluster.model, base.cluster.profile)
    priced = prices is not None and all(name in prices for name in space.gpus)
    trace = build_trace(base.at_rate(1.0), seeds[0])
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    setups, found = _candidates(base, space, prices if priced and prices is not None else {}, longest)
    bounds = Bounds(base, seeds, goal)
    limits = {i: bounds.of(setups[i], c.arrangement.kind()) for i, c in enumerate(found) if c.status != UNFIT}
    for i, (mean, by) in ((i, _mean(limits[i])) for i in limits):
        c = found[i]
        c.bound_rps, c.bound_by = (mean if math.isfinite(mean) else None), by
        if mean == 0:
            c.status, c.reason = UNREACHABLE, f"no rate meets the goal: {by} misses it for too many"
    open_ = sorted(
        (i for i in limits if found[i].status != UNREACHABLE),
        key=lambda i: (-_or_inf(found[i].bound_rps) / found[i].gpus, -found[i].gpus, i),
    )
    if not open_:
        raise _unreachable(found)
    wave = FIRST_WAVE
    while open_:
        if done is not None:
            done(len(found) - len(open_), len(found))
        chosen: list[int] = []
        while open_ and len(chosen) < wave:
            i = open_.pop(0)
            why = _cannot_matter(found[i], found, top) if prune else None
            if why is None:
                chosen.append(i)
            else:
                found[i].reason = why
        tasks = [
            (setups[i], seed, goal, tolerance, None, b.rate_rps)
            for i in chosen
            for seed, b in zip(seeds, limits[i], strict=True)
        ]
        before = len(found) - len(open_) - len(chosen)
        tell = _told(done, before, len(seeds), len(found)) if done is not None else None
        answers = spread(goodput, tasks, tell)
        for at, i in enumerate(chosen):
            _note(found[i], answers[at * len(seeds) : (at + 1) * len(seeds)])
        wave *= 2
    if not any(c.status == SEARCHED for c in found):
        raise _unreachable(found)
    _mark_front(found)
    found.sort(key=lambda c: (c.status != SEARCHED, -c.per_gpu, -c.rate_rps, -_or_inf(c.bound_rps) / c.gpus))
    return Ranking(found, list(seeds), goal, tolerance, top, priced, longest)


def _candidates(
    base: Setup, space: Space, prices: dict[str, float], longest: int
) -> tuple[list[Setup], list[Candidate]]:
    several = len(space.gpus) > 1
    setups, found, reasons = [], [], Counter[str]()
    known: dict[tuple[object, ...], str] = {}
    for a in arrangements(space):
        setup = setup_of(base, a, longest)
        c = Candidate(title(a, several), a, a.total_gpus(), usd_per_hour(a, prices))
        kind = a.kind()
        if kind not in known:
            known[kind] = _problem(setup)
        if known[kind]:
            c.status, c.reason = UNFIT, known[kind]
            reasons[c.reason] += 1
        setups.append(setup)
        found.append(c)
    if all(c.status == UNFIT for c in found):
        raise hopeless(space, base.cluster.model, reasons)
    return setups, found


def _problem(setup: Setup) -> str:
    try:
        build_cluster(setup)
    except PenstockError as error:
        return error.problem
    return ""


def _mean(bounds: list[Bound]) -> tuple[float, str]:
    rate = sum(b.rate_rps for b in bounds) / len(bounds)
    return rate, Counter(b.resource for b in bounds).most_common(1)[0][0]


def _or_inf(x: float | None) -> float:
    return math.inf if x is None else x


def _cannot_matter(c: Candidate, found: Sequence[Candidate], top: int) -> str | None:
    """Why an arrangement need not be searched, None if it must be."""
    if c.bound_rps is None:
        return None
    searched = [s for s in found if s.status == SEARCHED and s.rate_rps > 0]
    beats = [s for s in searched if s.rate_rps >= c.bound_rps and s.gpus <= c.gpus and s.cost() <= c.cost()]
    if not beats:
        return None
    per_gpu = c.bound_rps / c.gpus
    ahead = [s for s in searched if s.per_gpu >= per_gpu]
    cost = c.cost()
    cheaper = sum(1 for s in searched if s.rate_rps / s.cost() >= c.bound_rps / cost)
    same = any(s.arrangement.disaggregated == c.arrangement.disaggregated for s in ahead)
    if len(ahead) < top or cheaper < top or not same:
        return None
    best = max(beats, key=lambda s: s.rate_rps)
    return f"at most {c.bound_rps:.3g}/s ({c.bound_by}); {best.name} sustains {best.rate_rps:.3g}/s for no more"


def _told(done: Callable[[int, int], None], before: int, seeds: int, total: int) -> Callable[[int], None]:
    return lambda finished: done(before + finished // seeds, total)


def _note(c: Candidate, answers: Sequence[Goodput]) -> None:
    c.status = SEARCHED
    c.goodput_rps = interval([a.rate_rps or 0.0 for a in answers])
    c.runs = sum(len(a.evaluations) for a in answers)
    c.limit = Counter(a.limit for a in answers).most_common(1)[0][0]
    c.binding = Counter(a.diagnosis.binding for a in answers).most_common(1)[0][0]
    said: Diagnosis = next(a.diagnosis for a in answers if a.diagnosis.binding == c.binding)
    c.reason = said.text
    if c.goodput_rps.max == 0:
        c.status = UNREACHABLE
        c.reason = f"no rate meets the goal: {said.text}"


def _mark_front(found: Sequence[Candidate]) -> None:
    searched = [c for c in found if c.status == SEARCHED]
    for c in searched:
        c.on_front = not any(
            (s.cost() <= c.cost() and s.rate_rps > c.rate_rps) or (s.cost() < c.cost() and s.rate_rps >= c.rate_rps)
            for s in searched
        )


def _unreachable(found: Sequence[Candidate]) -> PenstockError:
    why = Counter(c.reason for c in found if c.status == UNREACHABLE).most_common(1)[0][0]
    return PenstockError(
        f"no arrangement meets the targets at any rate ({why.removeprefix('no rate meets the goal: ')})",
        "raise --ttft or --tpot, give faster --hardware, or more cards an instance in --tps",
    )
