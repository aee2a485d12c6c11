"""The planner in closed form: instances of prefill and decode for a demand under TTFT and TPOT targets.

Source of the formulas: arXiv 2603.04716 (SLO-aware allocation), sections "method" and "TTFT". With ``Lin``, ``Lout``
mean lengths, demand ``TP`` in input + output tokens/s, and effective throughputs ``TPp``, ``TPd`` of one instance:
``Np = TP Lin / (Lin + Lout) / TPp``, ``Nd = TP Lout / (Lin + Lout) / TPd``, ``P/D = Lin TPd / (Lout TPp)``. Ours: the
queues besides M/M/1, percentiles, limits of memory, capacities of whole numbers of instances, and no clamping: the
demo script raises a TTFT target to 0.95 of the floor, where the formula's throughput is negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from penstock.core.errors import PenstockError
from penstock.experiment.floors import rounded_up
from penstock.plan.machine import DecodeStage, Machine, floor_text
from penstock.plan.queueing import PrefillQueue, check_percentile
from penstock.report.columns import seconds
from penstock.workload.trace import F64

POINTS = 500
"""Prompt lengths that stand for those of a trace, at equal steps of rank."""
MOST_INSTANCES = 100_000
SETTLE = 8
"""Rounds in which the number of decode instances and the evenness of their batches settle."""


@dataclass(frozen=True)
class Case:
    """What is planned for.

    Attributes
    ----------
    rate_rps : float
        Demand, requests/s.
    prompts, outputs : float64[n]
        Lengths in tokens, row by row; one row stands for means.
    ttft_s, tpot_s : float
        Targets, seconds: of the mean, or of ``percentile`` (0 to 100) over requests, each by itself.
    overhead_s : float
        Part of TTFT that is neither queue nor prefill (the paper's T_ov).
    queue : str
        One of ``queueing.KINDS``.
    arrival_cv : float
        Coefficient of variation of the gaps between arrivals.
    """

    machine: Machine
    rate_rps: float
    prompts: F64
    outputs: F64
    ttft_s: float
    tpot_s: float
    percentile: float | None = None
    overhead_s: float = 0.0
    queue: str = "mm1"
    arrival_cv: float = 1.0

    def __post_init__(self) -> None:
        check_percentile(self.percentile)
        if not (math.isfinite(self.rate_rps) and self.rate_rps > 0):
            raise PenstockError(f"demand {self.rate_rps:g} requests/s is not positive", "give --rps or --tpm above 0")
        if not (len(self.prompts) and self.prompts.min() > 0 and self.outputs.min() > 0):
            raise PenstockError("a mean length is not positive", "give --isl and --osl above 0")
        if not (math.isfinite(self.overhead_s) and self.overhead_s >= 0):
            raise PenstockError(f"overhead {self.overhead_s:g} s is out of range", "give --overhead of 0 or more")

    @property
    def isl(self) -> float:
        """Mean prompt length, tokens."""
        return float(self.prompts.mean())

    @property
    def osl(self) -> float:
        """Mean output length, tokens."""
        return float(self.outputs.mean())

    @property
    def tokens_a_request(self) -> float:
        """Input + output tokens of a mean request."""
        return self.isl + self.osl

    @cached_property
    def prefill(self) -> PrefillQueue:
        """The prefill stage."""
        ranks = (np.arange(POINTS) + 0.5) / POINTS
        few = len(self.prompts) <= POINTS
        sample = np.sort(self.prompts) if few else np.quantile(self.prompts, ranks)
        service = np.sort(self.machine.prefill_s(sample))
        shared = self.machine.shared_prefill_s(sample)
        if shared is None:
            return PrefillQueue(self.queue, service, self.arrival_cv)
        step_s = float(shared.mean() * self.machine.step_tokens / sample.mean())
        return PrefillQueue(self.queue, service, self.arrival_cv, np.sort(shared), step_s)

    @cached_property
    def decode(self) -> DecodeStage:
        """The decode stage."""
        return self.machine.decode(self.prompts, self.outputs)

    def prefill_capacity_rps(self, instances: int) -> float:
        """Requests/s that so many prefill instances take within the TTFT target."""
        return self.prefill.highest_rps(instances, self.ttft_s - self.overhead_s, self.percentile)

    def ttft_at(self, rate_rps: float, instances: int) -> float:
        """TTFT (mean or percentile) in seconds at a rate; inf where the queue grows without end."""
        return self.overhead_s + self.prefill.ttft_s(rate_rps, instances, self.percentile)

    def tpot_at(self, rate_rps: float, instances: int) -> float | None:
        """TPOT (mean or percentile) in seconds at a rate; None where the batch leaves the ladder.

        The mean batch is what is offered: ``rate × Lout × step(batch)`` per instance.
        """
        tokens, stage = rate_rps * self.osl / instances, self.decode
        ladder = stage.ladder
        low, high = ladder.batch[0], ladder.batch[-1]
        if tokens * ladder.tpot_s[-1] > high:
            return None
        if tokens * ladder.tpot_s[0] <= low:
            if low > 1:
                return None
            high = low
        for _ in range(60):
            middle = (low + high) / 2
            if tokens * float(np.interp(middle, ladder.batch, ladder.tpot_s)) > middle:
                low = middle
            else:
                high = middle
        seen = high + stage.extra_batch(high, instances, self.percentile)
        step = float(np.interp(min(seen, ladder.batch[-1]), ladder.batch, ladder.tpot_s))
        return stage.handoff.tpot_for(step, self.percentile)


@dataclass(frozen=True)
class DecodePoint:
    """Where decode works at its target: batch, step time, output tokens/s of one instance, and what caps the batch."""

    batch: float
    step_s: float
    throughput: float
    bound: str


@dataclass(frozen=True)
class Answer:
    """The fractional plan: effective throughputs (tokens/s of one instance), ratio, instances."""

    case: Case
    prefill_throughput: float
    prefill_instances: float
    decode_point: DecodePoint
    decode_instances: float

    @property
    def decode_throughput(self) -> float:
        """Output tokens/s of one decode instance within the TPOT target."""
        return self.decode_point.throughput

    @property
    def pd_ratio(self) -> float:
        """Prefill instances a decode instance."""
        return self.case.isl * self.decode_throughput / (self.case.osl * self.prefill_throughput)

    def decode_capacity_rps(self, instances: int) -> float:
        """Requests/s that so many decode instances take within the TPOT target."""
        return instances * self.decode_throughput / self.case.osl

    def capacity_rps(self, prefill: int, decode: int) -> float:
        """Requests/s that both stages take."""
        return min(self.case.prefill_capacity_rps(prefill), self.decode_capacity_rps(decode))


def solve(case: Case) -> Answer:
    """The fractional plan.

    Raises PenstockError for a target that no number of instances meets, or outside the measured ladder.
    """
    check_ttft(case)
    point = decode_point(case)
    n = _fractional_prefill(case)
    return Answer(
        case,
        prefill_throughput=case.rate_rps * case.isl / n,
        prefill_instances=n,
        decode_point=point,
        decode_instances=case.rate_rps * case.osl / point.throughput,
    )


def check_ttft(case: Case) -> None:
    """Raises PenstockError where TTFT at no load is above the target already."""
    floor = case.prefill.floor_s(case.percentile) + case.overhead_s
    if case.ttft_s <= floor:
        which = "mean" if case.percentile is None else f"P{case.percentile:g}"
        raise PenstockError(
            f"TTFT {seconds(case.ttft_s)} cannot be met: {which} prefill of an idle instance takes "
            f"{seconds(floor - case.overhead_s)}"
            + (f" and the overhead {seconds(case.overhead_s)}" if case.overhead_s else ""),
            f"raise --ttft above {rounded_up(floor)}, or use faster prefill instances (--tp, --hardware)",
        )


def decode_point(case: Case) -> DecodePoint:
    """Batch and throughput of a decode instance at the TPOT target. Raises PenstockError where none meets it."""
    stage = case.decode
    ladder = stage.ladder
    step = stage.handoff.step_for(case.tpot_s, case.percentile)
    if step < ladder.tpot_s[0] and stage.limits:
        lost = stage.handoff.tpot_for(ladder.tpot_s[0], case.percentile)
        raise PenstockError(
            f"TPOT {seconds(case.tpot_s)} cannot be met: a decode step takes {floor_text(stage)}, and with the KV "
            f"transfer TPOT is {seconds(lost)}",
            f"raise --tpot above {rounded_up(lost)}, or use faster decode instances (--tp, --hardware) or links",
        )
    if not stage.limits:
        throughput = ladder.throughput_at(step, stage.fit)
        return DecodePoint(throughput * step, step, throughput, "TPOT")
    name, limit = min(stage.limits, key=lambda item: item[1])
    if step >= ladder.tpot_s[-1]:
        return DecodePoint(min(limit, ladder.batch[-1]), ladder.tpot_s[-1], ladder.batch[-1] / ladder.tpot_s[-1], name)
    seen = ladder.batch_at(step)
    instances = 1.0
    for _ in range(SETTLE):
        batch = _mean_batch(stage, seen, instances, case.percentile)
        at = float(np.interp(batch, ladder.batch, ladder.tpot_s))
        instances = case.rate_rps * case.osl * at / batch
    return DecodePoint(batch, at, batch / at, "TPOT")


def _mean_batch(stage: DecodeStage, seen: float, instances: float, percentile: float | None) -> float:
    """The mean batch whose requests see ``seen``; at least a thousandth of a request."""
    low, high = 1e-3, seen
    for _ in range(60):
        middle = (low + high) / 2
        if middle + stage.extra_batch(middle, instances, percentile) > seen:
            high = middle
        else:
            low = middle
    return low


def _fractional_prefill(case: Case) -> float:
    """Prefill instances for the demand; between whole numbers, linear in capacity (exact for separate queues)."""
    one = case.prefill_capacity_rps(1)
    if case.queue != "pooled":
        return case.rate_rps / one
    if case.rate_rps <= one:
        return case.rate_rps / one
    n = max(1, math.floor(case.rate_rps * case.prefill.mean_s))
    if n > MOST_INSTANCES:
        raise PenstockError(f"the demand needs more than {MOST_INSTANCES:,} instances", "check --rps or --tpm")
    below, above = 0.0, case.prefill_capacity_rps(n)
    while above < case.rate_rps:
        n += 1
        below, above = above, case.prefill_capacity_rps(n)
    if below == 0.0:
        below = case.prefill_capacity_rps(n - 1) if n > 1 else 0.0
    return n - 1 + (case.rate_rps - below) / (above - below)


def changed(case: Case, name: str, factor: float) -> Case:
    """The case with one input times ``factor``. Names: those of ``INPUTS``."""
    if name == "demand":
        return replace(case, rate_rps=case.rate_rps * factor)
    if name == "input length":
        return replace(case, prompts=case.prompts * factor)
    if name == "output length":
        return replace(case, outputs=case.outputs * factor)
    if name == "TTFT target":
        return replace(case, ttft_s=case.ttft_s * factor)
    if name == "TPOT target":
        return replace(case, tpot_s=case.tpot_s * factor)
    if name == "overhead":
        return replace(case, overhead_s=case.overhead_s * factor)
    if name == "prefill speed":
        return replace(case, machine=case.machine.faster(factor, 1.0))
    assert name == "decode speed", name
    return replace(case, machine=case.machine.faster(1.0, factor))


INPUTS = (
    "demand",
    "input length",
    "output length",
    "TTFT target",
    "TPOT target",
    "overhead",
    "prefill speed",
    "decode speed",
)
"""What :func:`changed` can change."""
