"""The clairvoyant bound: what no policy can pass on a number of equal instances, whatever it knows (``docs/bound.md``).

Every length is known, work divides without remainder, nobody waits and nobody disturbs anybody: what is left is that
requests that meet their targets have used the instances for at least so long. Of the requests the cheapest are served,
as many as can be, and the others cost nothing. With u_i the least time of one instance that request i needs,

    sum of the u_i that are served  <=  N (T + E)

over a window of arrivals of length T, N instances, and requests whose last token is due within E of their arrival
(``rank.bounds`` has the derivation of u_i and of E). Two ways to use an instance:

* *split*: a step holds prompts or decodes, never both, as under fixed roles; the instances divide into two groups in
  any ratio, also 3.7 to 4.3. u_i is the sum of what its prompt and what its decode steps need.
* *any*: steps may hold both. Then the constant of a step (reading the weights) is paid once for both, so that one line
  below the step must do for prompts and decodes; this bound holds for split instances too and is never below.

Here a line may also spread the constant of a decode step over the requests or over the KV tokens that fit at most:
a step never has more than ``max_num_seqs`` decodes, nor do they read more tokens than the cache holds.

``steady`` takes E = 0: the bound of the same traffic going on for ever. A finite run can be a little above it, because
it begins with empty instances and ends by draining them; ``finite`` counts that (E > 0) and cannot be passed at all.
A workload of several phases is bound phase by phase, since one phase's idle time does not serve another's requests.
Sources: ours; the idea of a fluid optimum to compare with is PolyServe's (arXiv 2507.17769).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError
from penstock.experiment.binding import GOAL
from penstock.experiment.build import build_cluster
from penstock.experiment.setup import Setup
from penstock.experiment.setup import replace as replace_setup
from penstock.experiment.traffic import build_trace
from penstock.rank.bounds import COVERED, SLACK, Load, decode_s, first_token_s, load_from, shares, spare_s
from penstock.rank.lines import Line, lines_below
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.workload.synthetic import workload
from penstock.workload.trace import F64, Trace

WITHOUT_ROLES = "mixed"
"""The preset under which a cluster is built: the bound knows no roles."""
PRECISION = 1e-3
"""Relative precision of the rates; they are rounded up."""
WIDEST = 2.0**24
CANDIDATES = 4
"""Lines of each phase that are tried together: those under which the phase needs most."""


class Clairvoyant(msgspec.Struct, frozen=True):
    """Rates in requests/s that no policy can pass with the attainment ``goal``; 0: none meets it.

    ``any_rps`` and ``split_rps`` are those of traffic that goes on for ever (see the module), ``finite_rps`` is that of
    this very trace, drained (None where nothing can be said), for any policy. ``prefill_share`` is the part of the
    instances that prefill in the best split.
    """

    instances: int
    goal: float
    any_rps: float
    split_rps: float
    finite_rps: float | None
    prefill_share: float
    blind_rps: float


class Fluid:
    """The bound for one setup and seed.

    The policy, its options and the split of the setup's instances are ignored: prefill and decode instances together
    (or mixed ones) are so many equal ones.

    Raises
    ------
    PenstockError
        The instances are not all alike, the step model is of a kind without lines, or step times are noisy or faults
        occur, of which no bound is known.
    """

    def __init__(self, setup: Setup, seed: int | None = None) -> None:
        if setup.truth.noise > 0 or setup.truth.faults:
            raise PenstockError("no bound is known under noise and faults", "drop --noise and --fault")
        c = setup.cluster
        count = c.prefill + c.decode or c.mixed
        alike = (c.prefill_hardware or c.hardware) == (c.decode_hardware or c.hardware)
        alike &= (c.tp if c.prefill_tp is None else c.prefill_tp) == (c.tp if c.decode_tp is None else c.decode_tp)
        if not alike:
            raise PenstockError(
                "prefill and decode instances differ, and the bound is for equal ones",
                "drop --prefill-hardware, --decode-hardware, --prefill-tp and --decode-tp",
            )
        self._setup = replace_setup(setup, policy=WITHOUT_ROLES, options={}, cluster=replace_setup(c, mixed=count))
        self._seed = setup.seed if seed is None else seed
        self.cluster: ClusterSpec = build_cluster(self._setup)
        self.spec: InstanceSpec = self.cluster.instances[0]
        self._base = lines_below(self.spec)
        if not self._base:
            raise PenstockError("no bound is known for this kind of step model", "use the roofline or a fitted profile")

    def attainment(self, rate_rps: float, *, split: bool = False, finite: bool = False, blind: bool = False) -> float:
        """No policy attains more at this rate (0..1); ``split``, ``finite``, ``blind`` as in :class:`Clairvoyant`."""
        needs = self._needs(rate_rps, split)
        return needs.attainment(len(self.cluster.instances), finite, blind)

    def bound(self, goal: float = GOAL) -> Clairvoyant:
        """The highest rates with that attainment.

        Raises
        ------
        PenstockError
            A goal outside (0, 1].
        """
        if not 0 < goal <= 1:
            raise PenstockError(f"attainment goal {goal:g} is not in (0, 1]", "give --goal as a share, as 0.9")
        split = self._highest(goal, split=True, finite=False)
        finite = self._highest(goal, split=False, finite=True)
        prefill = self._needs(split, True).prefill_share if 0 < split < math.inf else 0.0
        return Clairvoyant(
            instances=len(self.cluster.instances),
            goal=goal,
            any_rps=self._highest(goal, split=False, finite=False),
            split_rps=split,
            finite_rps=finite if math.isfinite(finite) else None,
            prefill_share=prefill,
            blind_rps=self._highest(goal, split=False, finite=False, blind=True),
        )

    def _highest(self, goal: float, split: bool, finite: bool, blind: bool = False) -> float:
        def meets(rate: float) -> bool:
            return self.attainment(rate, split=split, finite=finite, blind=blind) >= goal - SLACK

        low, high = 1.0, 1.0
        if meets(low):
            while meets(high):
                low, high = high, high * 2
                if high > WIDEST:
                    return math.inf
        else:
            while not meets(low):
                low, high = low / 2, low
                if low < 1 / WIDEST:
                    return 0.0
        while high > low * (1 + PRECISION):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if meets(middle) else (low, middle)
        return high

    def _needs(self, rate_rps: float, split: bool) -> Needs:
        trace = build_trace(self._setup.at_rate(rate_rps), self._seed)
        load = load_from(self._setup, trace)
        lines = self._base + tuple(spread_lines(self._base, self.spec, load.shared))
        transfer = self._transfer_s(load) if split else np.zeros(len(load.prompts))
        alone = first_token_s(self._base, load) <= load.ttft_s * (1 + SLACK)
        for line in self._base:
            alone &= spare_s(line, load, transfer) >= shares(line, load)[0] * (1 - SLACK)
        prefill = np.array([line.prompts_s(load.computed) for line in lines])
        decode = np.array([decode_s(line, load, transfer) for line in lines])
        if split:
            ps, ds = _largest(prefill[:, alone]), _largest(decode[:, alone])
            pairs = [(p, d) for p in ps for d in ds]
        else:
            pairs = [(i, i) for i in _largest((prefill + decode)[:, alone])]
        due = load.ttft_s + np.where(load.after > 0, np.maximum(load.after, 1) * load.tpot_s, 0.0)
        share = 0.0
        if alone.any():
            p, d = prefill[ps[0], alone].sum() if split else 0.0, decode[:, alone].sum(axis=1).max()
            share = float(p / (p + d)) if p + d > 0 else 0.0
        uses = [prefill[p] + decode[d] for p, d in pairs]
        return Needs(trace.arrival_s, load.prompts, alone, due, uses, _windows(self._setup, trace), share)

    def _transfer_s(self, load: Load) -> F64:
        kv = load.prompts * self.cluster.kv_bytes_per_token
        found: F64 = np.where(load.after > 0, self.cluster.link_latency_s + kv / self.spec.link_bytes_per_s, 0.0)
        return found


def spread_lines(lines: Sequence[Line], spec: InstanceSpec, shared: bool) -> list[Line]:
    """The same lines with the constant of a step spread over the fullest batch, and over the fullest KV cache.

    Both hold only for steps with decodes, which is where a constant counts: a prompt's lines ignore it. Prompts that
    share KV (``shared``) may read more tokens than fit.
    """
    found = []
    for line in lines:
        found.append(replace(line, step_s=0.0, decode_s=line.decode_s + line.step_s / spec.max_num_seqs))
        if not shared:
            found.append(replace(line, step_s=0.0, context_s=line.context_s + line.step_s / spec.capacity_tokens))
    return found


@dataclass(frozen=True)
class Needs:
    """What requests need at least. ``uses`` are several such figures (float64[n] each, seconds of an instance).

    ``alone`` (bool[n]) are those that meet their targets in an empty cluster, ``due_s`` is the time from arrival to the
    last deadline (inf for none), ``windows`` are (first, last + 1) rows.
    """

    arrival_s: F64
    prompts: F64
    alone: NDArray[np.bool_]
    due_s: F64
    uses: list[F64]
    windows: list[tuple[int, int]]
    prefill_share: float

    def attainment(self, instances: int, finite: bool, blind: bool) -> float:
        """The most requests that ``instances`` can serve in time, as a share of all."""
        most = sum(self._most(first, last, instances, finite, blind) for first, last in self.windows)
        return most / len(self.arrival_s)

    def _most(self, first: int, last: int, instances: int, finite: bool, blind: bool) -> int:
        rows = slice(first, last)
        alone = self.alone[rows]
        best = int(alone.sum())
        # n arrivals are n - 1 gaps apart; of traffic that goes on, a window is n gaps long.
        span = float(self.arrival_s[last - 1] - self.arrival_s[first])
        if not finite:
            if last - first < 2:
                return best
            span *= (last - first) / (last - first - 1)
        due = self.due_s[rows][alone]
        ends = np.unique(np.quantile(due, COVERED, method="higher")).tolist() if finite and len(due) else [0.0]
        for use in self.uses:
            mine = use[rows][alone]
            for end in ends:
                if not math.isfinite(end):
                    continue
                if blind:
                    covered = mine[np.argsort(self.prompts[rows][alone], kind="stable")]
                else:
                    covered = np.sort(mine[due <= end] if finite else mine)
                served = int(np.searchsorted(np.cumsum(covered), instances * (span + end) * (1 + SLACK), side="right"))
                best = min(best, len(mine) - len(covered) + served)
        return best


def _largest(needs: F64) -> list[int]:
    """Rows of ``needs`` (float64[lines, n]) by their sums, the few that bind most."""
    sums = needs.sum(axis=1)
    return [int(i) for i in np.argsort(-sums, kind="stable")[:CANDIDATES]]


def _windows(setup: Setup, trace: Trace) -> list[tuple[int, int]]:
    """Rows of each phase of a synthetic workload; all rows otherwise."""
    n = len(trace)
    if setup.workload.trace is not None:
        return [(0, n)]
    phases = workload(setup.workload.synthetic).phases
    if len(phases) == 1 or not all(math.isfinite(p.duration_s) for p in phases):
        return [(0, n)]
    edges = [0]
    end_s = 0.0
    for phase in itertools.cycle(phases):
        end_s += phase.duration_s
        row = int(np.searchsorted(trace.arrival_s, end_s))
        if row > edges[-1]:
            edges.append(row)
        if row >= n:
            return list(itertools.pairwise(edges))
    raise AssertionError("unreachable: itertools.cycle does not end")
