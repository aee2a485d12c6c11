"""Playing: the split of the instances per workload, then one search a policy and workload, all in processes.

All policies of a workload get the same instances and the same requests. Presets that disaggregate start from one split
into prefill and decode instances: the best of those next to the bound's real-valued split, by the goodput of a static
policy (``SPLITTER``); of several phases no split is near the bound's, so all are tried. Presets that do not
disaggregate get all instances as mixed ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from penstock.core.errors import PenstockError
from penstock.experiment.binding import GOAL
from penstock.experiment.build import run, with_policy
from penstock.experiment.goodput import highest_rate
from penstock.experiment.repeat import fan_out
from penstock.experiment.setup import Setup, replace
from penstock.experiment.traffic import slos
from penstock.league.entries import Entry
from penstock.league.ledger import Ledger
from penstock.policy.registry import preset
from penstock.rank.clairvoyant import Clairvoyant, Fluid
from penstock.report.metrics import RunMetrics, summarize
from penstock.workload.synthetic import workload

FRACTIONS: Final = (0.5, 0.7, 0.85)
"""Fixed rates, as shares of the bound, at which attainment is given."""
AT: Final = 0.7
"""The share of the bound at which latencies, energy, migrations and flips are given: one load for all."""
TOLERANCE: Final = 0.02
SPLIT_TOLERANCE: Final = 0.1
SPLITTER: Final = "least-kv"
LOWEST: Final = 1 / 16
"""The search gives up at this share of the bound."""


class Ground(msgspec.Struct, frozen=True):
    """A workload, its bound, and the instances of the policies that disaggregate.

    ``split_rps`` is the goodput of ``SPLITTER`` for each number of prefill instances tried.
    """

    name: str
    setup: Setup
    bound: Clairvoyant
    bound_attainment: dict[str, float]
    split_rps: dict[str, float]

    @property
    def split(self) -> str:
        """Prefill and decode instances, as ``3P5D``."""
        return f"{self.setup.cluster.prefill}P{self.setup.cluster.decode}D"


class Row(msgspec.Struct, frozen=True):
    """One policy on one workload.

    Rates in requests/s. ``goodput_rps`` is 0 where no rate tried met the goal; ``share`` is it over the bound.
    ``attainment`` is by fixed rate ("0.7" of the bound). The other figures are those at ``AT`` of the bound; None where
    there is none. ``problem``: why it could not play, all figures then 0 or None.
    """

    policy: str
    workload: str
    goodput_rps: float = 0.0
    share: float = 0.0
    attainment: dict[str, float] = {}
    ttft_p99_s: float | None = None
    tpot_p99_s: float | None = None
    joules_per_token: float | None = None
    migrations: int | None = None
    flips: int | None = None
    runs: int = 0
    problem: str = ""


class League(msgspec.Struct, frozen=True):
    """All of it, in the order of the workloads and of the registry. ``missing``: rows not played, being broken off."""

    grounds: list[Ground]
    rows: list[Row]
    goal: float
    left_out: dict[str, str]
    missing: int = 0

    @property
    def policies(self) -> list[str]:
        """Who played, in order."""
        return list(dict.fromkeys(row.policy for row in self.rows))

    def of(self, workload: str) -> list[Row]:
        """The rows of a workload, the highest goodput first."""
        return sorted((row for row in self.rows if row.workload == workload), key=lambda row: -row.goodput_rps)

    def standing(self) -> list[tuple[str, float, float]]:
        """Policies with the mean and the least of their shares of the bound, best mean first.

        Over the workloads that all have played, so that nobody gains by being broken off; over its own where there is
        none.
        """
        found = []
        everybody = len(self.policies)
        common = {g.name for g in self.grounds if len(self.of(g.name)) == everybody}
        for policy in self.policies:
            mine = [row for row in self.rows if row.policy == policy]
            shares = [row.share for row in mine if row.workload in common or not common]
            found.append((policy, sum(shares) / len(shares), min(shares)))
        return sorted(found, key=lambda one: -one[1])


def play(
    base: Setup,
    entries: Sequence[Entry],
    policies: Sequence[str],
    *,
    left_out: dict[str, str] | None = None,
    split: int | None = None,
    goal: float = GOAL,
    tolerance: float = TOLERANCE,
    quick: bool = False,
    jobs: int = 0,
    done: Callable[[int, int], None] | None = None,
    keep: str | None = None,
) -> League:
    """Play the league. Broken off by Ctrl-C while policies play, it returns what they have played.

    Parameters
    ----------
    split : int, optional
        Prefill instances, instead of the best split.
    done : callable, optional
        Told the number of searches that have ended, and of all.
    keep : str, optional
        A file that gets every result at once; results that it has already are not played again.

    Raises
    ------
    PenstockError
        As the runs do. A policy that cannot run in a workload is no error: its row says why.
    """
    rates_kept, rows_kept = Ledger(keep, float), Ledger(keep, Row)
    setups = [entry.setup(base, quick) for entry in entries]
    bounds = fan_out(bound_of, [(one, goal) for one in setups], jobs)
    needed = any(preset(name).disaggregated for name in policies)
    tries: list[tuple[int, Setup]] = []
    for i, (one, (bound, _)) in enumerate(zip(setups, bounds, strict=True)):
        tries += [(i, with_split(one, p)) for p in _splits(one, bound, split, quick)] if needed else []
    total = len(tries) + len(setups) * len(policies)

    def told(before: int) -> Callable[[int], None] | None:
        return None if done is None else lambda finished: done(before + finished, total)

    tasks = [(s, bounds[i][0].any_rps, goal, SPLIT_TOLERANCE) for i, s in tries]
    rates = rates_kept.fan_out(split_goodput, tasks, jobs, told(0))
    grounds = []
    for i, one in enumerate(setups):
        mine = {s.cluster.prefill: rate for (k, s), rate in zip(tries, rates, strict=True) if k == i}
        best = max(mine, key=lambda p: mine[p]) if mine else one.cluster.prefill
        bound, attained = bounds[i]
        tried = {str(p): rate for p, rate in mine.items()}
        grounds.append(Ground(entries[i].name, with_split(one, best), bound, attained, tried))
    plays = [(g.setup, name, g.name, g.bound.any_rps, goal, tolerance) for g in grounds for name in policies]
    try:
        rows = rows_kept.fan_out(play_one, plays, jobs, told(len(tries)))
    except KeyboardInterrupt:
        rows = rows_kept.known(play_one, plays)
        if not rows:
            raise
        begun = {row.workload for row in rows}
        grounds = [ground for ground in grounds if ground.name in begun]
    return League(grounds, rows, goal, left_out or {}, len(plays) - len(rows))


def bound_of(setup: Setup, goal: float) -> tuple[Clairvoyant, dict[str, float]]:
    """The bound of a workload, and the most that can be attained at the fixed rates.

    Raises
    ------
    PenstockError
        No rate at all can meet the goal.
    """
    fluid = Fluid(setup)
    bound = fluid.bound(goal)
    if not 0 < bound.any_rps < math.inf:
        name = setup.workload.trace or setup.workload.synthetic
        raise PenstockError(f"no rate of {name} can meet its targets on this hardware", "give faster --hardware")
    return bound, {f"{x:g}": fluid.attainment(x * bound.any_rps) for x in FRACTIONS}


def with_split(setup: Setup, prefill: int) -> Setup:
    """The same instances, so many of them for prefill."""
    c = setup.cluster
    total = c.prefill + c.decode
    if not 1 <= prefill < total:
        raise PenstockError(f"{prefill} prefill instances of {total}", f"give --split from 1 to {total - 1}")
    return replace(setup, cluster=replace(c, prefill=prefill, decode=total - prefill))


def _splits(setup: Setup, bound: Clairvoyant, split: int | None, quick: bool) -> list[int]:
    """Numbers of prefill instances to try; a single one is taken as it is."""
    if split is not None:
        return [split]
    total = setup.cluster.prefill + setup.cluster.decode
    near = min(max(round(bound.prefill_share * total), 1), total - 1)
    if quick:
        return [near]
    phased = setup.workload.trace is None and len(workload(setup.workload.synthetic).phases) > 1
    return list(range(1, total)) if phased else [p for p in (near - 1, near, near + 1) if 0 < p < total]


def split_goodput(setup: Setup, bound_rps: float, goal: float, tolerance: float) -> float:
    """The goodput of ``SPLITTER``, 0 where there is none."""
    return _Search(with_policy(setup, SPLITTER), bound_rps, goal).goodput(tolerance)


def play_one(setup: Setup, policy: str, name: str, bound_rps: float, goal: float, tolerance: float) -> Row:
    """One policy on one workload."""
    search = _Search(with_policy(setup, policy), bound_rps, goal)
    try:
        kept = search.at(AT)
        rates = {f"{x:g}": search.at(x).attainment for x in FRACTIONS}
        goodput = search.goodput(tolerance)
    except PenstockError as error:
        return Row(policy, name, problem=error.problem)
    return Row(
        policy=policy,
        workload=name,
        goodput_rps=goodput,
        share=goodput / bound_rps,
        attainment=rates,
        ttft_p99_s=kept.ttft_s.p99,
        tpot_p99_s=kept.tpot_s.p99,
        joules_per_token=kept.joules_per_token,
        migrations=kept.migrations,
        flips=kept.flips,
        runs=len(search.known),
    )


class _Search:
    """Runs of one setup at several rates, each made once."""

    def __init__(self, setup: Setup, bound_rps: float, goal: float) -> None:
        self.setup = setup
        self.bound_rps = bound_rps
        self.goal = goal
        self.known: dict[float, RunMetrics] = {}

    def at(self, share: float) -> RunMetrics:
        """The figures at a share of the bound."""
        return self._run(share * self.bound_rps)

    def goodput(self, tolerance: float) -> float:
        """The highest rate that meets the goal, 0 where none down to ``LOWEST`` of the bound does."""
        # The fixed rates bracket the answer in most cases; overload is dear, so come from below.
        for share in (*FRACTIONS, 1.0):
            if self.at(share).attainment < self.goal:
                break
        met = [rate for rate, run_ in self.known.items() if run_.attainment >= self.goal]
        missed = [rate for rate, run_ in self.known.items() if run_.attainment < self.goal]
        above = min(missed, default=math.inf)
        start = max((rate for rate in met if rate < above), default=min(above, self.bound_rps))
        lowest = LOWEST * self.bound_rps
        found = highest_rate(
            lambda rate: self._run(rate).attainment, start, self.goal, tolerance, lowest_rps=lowest, above_rps=above
        )
        return found.rate_rps or 0.0

    def _run(self, rate: float) -> RunMetrics:
        if rate not in self.known:
            result = run(self.setup.at_rate(rate), sample=False)
            self.known[rate] = summarize(result, slos(self.setup, result.trace))
        return self.known[rate]
