"""No simulation can find a higher goodput than this: bounds from the work that met requests must have done.

Let n requests arrive over T seconds, and k = goal x n of them meet their targets. A request i that does has its first
token ``ttft_i`` after it arrived at the latest, and its last one ``m_i tpot_i`` after that (m_i: tokens after the
first). So whatever it needs of a resource it has used before ``T + E``, if ``ttft_i + m_i tpot_i <= E``. A resource of
capacity C gives ``C (T + E)`` in that time. Hence for every E, with u_i the least that request i can use,

    sum of the k' smallest u_i  <=  C (T + E),

the sum over the requests that E covers, k' = k less those it does not cover. Read as a bound on T, it is one on the
rate (n - 1) / T. Requests that cannot meet their targets even alone are left out; where fewer than k remain, the goal
is out of reach.

u_i, by resource (``lines`` has the line below a step):

* *prefill time*: its prompt's share of the steps it is in, at least ``chunk_s + prompt_s L + pair_s L L / 2``.
* *decode time*: a step s of duration u_s >= step_s + sum of shares r is shared out in proportion to the shares, so a
  decode with share w_s takes ``w_s u_s / (sum of r) >= w_s (1 + step_s / x_s)`` of it, where ``x_s = u_s - step_s``.
  TPOT says that the x_s of a request add up to at most ``X = m (tpot - step_s) - transfer``. By Cauchy and Schwarz
  ``sum w_s / x_s >= (sum of sqrt w_s) ^ 2 / X``. Together: ``sum of w + step_s (sum of sqrt w) ^ 2 / X``. In words: who
  wants a short step cannot share it with many.
* *mixed time*: both of the above, with one line.
* *KV capacity* (tokens x s) and *batch slots* (requests x s): prompt + k tokens, and one slot, during its k-th decode
  step, which lasts at least as long as that of a lone request.
* *link* (bytes): the KV of its prompt, where it is decoded elsewhere.

Sources: ours; the tandem of two queues whose capacity it bounds is BestServe's (arXiv 2506.05871).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.core.types import Role
from penstock.experiment.build import build_cluster
from penstock.experiment.setup import Setup
from penstock.experiment.traffic import build_trace, slos
from penstock.rank.lines import Line, lines_below
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.workload.trace import F64, Trace

COVERED = (0.25, 0.5, 0.75, 0.9, 0.97, 1.0)
"""Shares of requests that a horizon E covers; the best bound of these counts."""


class Bound(msgspec.Struct, frozen=True):
    """No rate above ``rate_rps`` (requests/s) meets the goal; inf where nothing can be said, 0 where none meets it.

    ``resource`` is what runs out first, empty where nothing does.
    """

    rate_rps: float
    resource: str


FREE = ("arrow", "xllm", "duet", "duet-static")
"""Policies under which an instance does not keep to one phase, or computes two steps at once."""
SLACK = 1e-9
"""Relative room for rounding where a request's feasibility is judged."""
UNKNOWN = Bound(math.inf, "")


@dataclass(frozen=True)
class Load:
    """The requests as the bounds need them, all float64[n]: lengths in tokens, targets in seconds (inf for none).

    ``computed`` are the prompt tokens that no prefix cache can save, ``after`` the output tokens after the first.
    ``deadlines``: the targets are deadlines of tokens, so that an early first token is time to decode in.
    ``span_s`` is the time from first to last arrival at one request a second. ``shared``: prompts share prefixes.
    """

    prompts: F64
    computed: F64
    after: F64
    ttft_s: F64
    tpot_s: F64
    span_s: float
    shared: bool
    deadlines: bool = False


@dataclass(frozen=True)
class Use:
    """What each request uses at least of a resource (float64[n]), and what there is of it a second."""

    resource: str
    use: F64
    capacity: float
    done_by_s: F64


class Bounds:
    """Bounds of many setups of one workload, for each of some seeds.

    Nothing is said (inf) where step times are noisy or faults occur, instances change roles or do two steps at once, a
    change of the rate is not a change of scale (workloads of several phases), or the step model has no lines.
    """

    def __init__(self, setup: Setup, seeds: Sequence[int], goal: float) -> None:
        self.goal = goal
        self._loads = [load_of(setup, seed) for seed in seeds]
        self._lines: dict[Hashable, tuple[tuple[Line, ...], tuple[Line, ...]]] = {}

    def of(self, setup: Setup, kind: Hashable) -> list[Bound]:
        """The least bound of a setup, for each seed.

        Setups of one ``kind`` have the same instances, in other numbers.
        """
        if setup.truth.noise > 0 or setup.truth.faults or setup.policy in FREE:
            return [UNKNOWN] * len(self._loads)
        cluster = build_cluster(setup)
        if kind not in self._lines:
            self._lines[kind] = lines_of(cluster)
        lines = self._lines[kind]
        return [UNKNOWN if load is None else bound_of(cluster, lines, load, self.goal) for load in self._loads]


def load_of(setup: Setup, seed: int) -> Load | None:
    """The requests of a setup, None where another rate does not simply bring them closer together."""
    trace, twice = build_trace(setup.at_rate(1.0), seed), build_trace(setup.at_rate(2.0), seed)
    if len(trace) < 2 or trace.duration_s <= 0 or len(trace) != len(twice):
        return None
    alike = np.allclose(trace.arrival_s, 2 * twice.arrival_s, rtol=1e-6, atol=1e-6)
    if not alike or (trace.output_tokens != twice.output_tokens).any():
        return None
    return load_from(setup, trace)


def load_from(setup: Setup, trace: Trace) -> Load:
    """The requests of a trace, judged by a setup's targets."""
    targets = list(slos(setup, trace).values())
    shared = trace.prefixes is not None and setup.cluster.prefix_caching
    return Load(
        prompts=trace.prompt_tokens.astype(np.float64),
        computed=_computed(trace) if shared else trace.prompt_tokens.astype(np.float64),
        after=np.maximum(trace.output_tokens - 1, 0).astype(np.float64),
        ttft_s=np.array([t.ttft_s for t in targets])[trace.slo_class],
        tpot_s=np.array([t.tpot_s for t in targets])[trace.slo_class],
        span_s=trace.duration_s,
        shared=shared,
        deadlines=setup.slo_form == "deadline",
    )


def _computed(trace: Trace) -> F64:
    """Prompt tokens in blocks that no earlier request has; at least 1, as vLLM computes the last token always."""
    assert trace.prefixes is not None
    seen: set[int] = set()
    found = np.empty(len(trace))
    for i, tokens in enumerate(trace.prompt_tokens.tolist()):
        hashes = trace.prefixes.of(i)
        new = sum(1 for h in hashes if h not in seen)
        seen.update(hashes)
        found[i] = max(1, tokens - (len(hashes) - new) * trace.prefixes.block_tokens)
    return found


def _by_phase(cluster: ClusterSpec) -> tuple[list[InstanceSpec], list[InstanceSpec]]:
    prefills = [spec for spec in cluster.instances if spec.role is not Role.DECODE]
    return prefills, [spec for spec in cluster.instances if spec.role is not Role.PREFILL]


def lines_of(cluster: ClusterSpec) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """Lines below the steps of the instances that prefill, and of those that decode; each kind alike."""
    prefills, decodes = _by_phase(cluster)
    first = lines_below(prefills[0])
    return first, first if decodes[0].role is Role.MIXED else lines_below(decodes[0])


def bound_of(cluster: ClusterSpec, lines: tuple[tuple[Line, ...], tuple[Line, ...]], load: Load, goal: float) -> Bound:
    """The least bound of a cluster whose instances keep their roles, those of a role alike."""
    prefills, decodes = _by_phase(cluster)
    p_lines, d_lines = lines
    if not p_lines or not d_lines:
        return UNKNOWN
    mixed = decodes[0].role is Role.MIXED
    link = min(prefills[0].link_bytes_per_s, decodes[0].link_bytes_per_s)
    kv = load.prompts * cluster.kv_bytes_per_token
    transfer = np.where(load.after > 0, 0.0 if mixed else cluster.link_latency_s + kv / link, 0.0)
    first = first_token_s(p_lines, load) <= load.ttft_s * (1 + SLACK)
    rest = np.all([spare_s(line, load, transfer) >= shares(line, load)[0] * (1 - SLACK) for line in d_lines], axis=0)
    can = first & rest
    k = math.ceil(goal * len(load.prompts) - 1e-9)
    if can.sum() < k:
        return Bound(0.0, "TTFT of a request alone" if first.sum() < k else "TPOT of a request alone")
    end = load.ttft_s + np.where(load.after > 0, np.maximum(load.after, 1) * load.tpot_s, 0.0)
    uses: list[Use] = []
    if mixed:
        for line in d_lines:
            work = line.prompts_s(load.computed) + decode_s(line, load, transfer)
            uses.append(Use("mixed time", work, len(decodes), end))
    else:
        for line in p_lines:
            uses.append(Use("prefill time", line.prompts_s(load.computed), len(prefills), load.ttft_s))
        for line in d_lines:
            uses.append(Use("decode time", decode_s(line, load, transfer), len(decodes), end))
        ends = min(len(s) * s[0].link_bytes_per_s for s in (prefills, decodes))
        uses.append(Use("link", np.where(load.after > 0, kv, 0.0), ends, end))
    uses += _room(decodes[0], len(decodes), d_lines, load, end)
    return min((_limit(use, can, k, load.span_s) for use in uses), key=lambda b: b.rate_rps)


def first_token_s(lines: tuple[Line, ...], load: Load) -> F64:
    """Seconds to the first token of a request alone, at least."""
    found: F64 = np.max([line.step_s + line.prompts_s(load.computed) for line in lines], axis=0)
    return found


def shares(line: Line, load: Load) -> tuple[F64, F64]:
    """Sum of the shares w of a request's decode steps, and at least the sum of their roots."""
    p, m = load.prompts, load.after
    total = m * (line.decode_s + line.context_s * (p + (m + 1) / 2))
    if line.context_s <= 0:
        return total, m * math.sqrt(line.decode_s)
    # A sum of a rising function over 1 ... m is at least its integral from 0 to m.
    low = line.decode_s + line.context_s * p
    return total, ((low + line.context_s * m) ** 1.5 - low**1.5) / (1.5 * line.context_s)


def spare_s(line: Line, load: Load, transfer: F64) -> F64:
    """X: what a request's decode steps may take beyond their constants, seconds."""
    # Not 0 x inf: who has no token after the first has no TPOT either.
    steps = np.maximum(load.after, 1)
    early = np.maximum(load.ttft_s - line.step_s - line.prompts_s(load.computed), 0.0) if load.deadlines else 0.0
    spare: F64 = np.where(load.after > 0, steps * (load.tpot_s - line.step_s) - transfer + early, 0.0)
    return spare


def decode_s(line: Line, load: Load, transfer: F64) -> F64:
    """The least share of an instance's time that the decode steps of each request take, float64[n]."""
    total, roots = shares(line, load)
    spare = spare_s(line, load, transfer)
    with np.errstate(divide="ignore", invalid="ignore"):
        constant = np.where((spare > 0) & (load.after > 0), line.step_s * roots**2 / spare, 0.0)
    found: F64 = total + constant
    return found


def _room(spec: InstanceSpec, count: int, lines: tuple[Line, ...], load: Load, end: F64) -> Iterator[Use]:
    """Batch slots, and KV where nothing of it is shared."""
    p, m = load.prompts, load.after
    lone = np.max([line.step_s + line.decode_s + line.context_s * p for line in lines], axis=0)
    yield Use("batch slots", lone * m, count * spec.max_num_seqs, end)
    if not load.shared:
        yield Use("KV capacity", lone * m * (p + (m + 1) / 2), count * spec.capacity_tokens, end)


def _limit(use: Use, can: NDArray[np.bool_], k: int, span_s: float) -> Bound:
    """The bound of one resource: over every horizon that ``COVERED`` names, the least rate."""
    done, needs = use.done_by_s[can], use.use[can]
    best = math.inf
    for horizon in np.unique(np.quantile(done, COVERED, method="higher")).tolist():
        if not math.isfinite(horizon):
            continue
        covered = done <= horizon
        counted = k - int((~covered).sum())
        if counted < 1:
            continue
        least = float(np.partition(needs[covered], counted - 1)[:counted].sum())
        span = least / use.capacity - horizon
        if span > 0:
            best = min(best, span_s / span)
    return Bound(best, use.resource if math.isfinite(best) else "")
