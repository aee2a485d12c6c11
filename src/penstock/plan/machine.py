"""What one instance can do, as the planner needs it: seconds of a prompt, and TPOT by batch, from either source.

``Benchmark`` holds measured figures (a prefill throughput and a decode ladder). ``Modelled`` asks a step model, the
same that the simulator charges, with the limits of memory and scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Protocol

import numpy as np

from penstock.core.errors import PenstockError
from penstock.experiment.floors import prefill_alone_s
from penstock.plan.ladder import Ladder
from penstock.report.columns import seconds
from penstock.sim.cluster import InstanceSpec
from penstock.workload.trace import F64

RUNGS = 64
"""Batches at which a step model is asked for its ladder, at most."""
HANDOFF_STEPS = 0.5
"""Decode steps lost between the first token and the first step in the batch, besides the KV transfer: half a step to
the next boundary. The simulator shows 0.4, and 2.4 with asynchronous scheduling."""
HANDOFF_STEPS_AHEAD = 2.5
"""The same where the engine schedules one step ahead: the pull and the joining are each seen one step later."""
SPARE_DEVIATIONS = 1.0
"""Resident KV fluctuates with the number of running requests; so many standard deviations of it are kept free."""


@dataclass(frozen=True)
class Handoff:
    """What a request's TPOT holds besides decode steps: seconds and steps before its first step in the batch.

    ``per_token_s`` and ``per_token_steps`` are those over the tokens that follow the first one, for requests that have
    any, float64[n]; both 0 where a ladder was measured end to end.
    """

    per_token_s: F64
    per_token_steps: F64

    def step_for(self, tpot_s: float, percentile: float | None) -> float:
        """The step time at which the mean (or percentile) of TPOT over requests is ``tpot_s``; negative if none is."""
        if percentile is None:
            return float((tpot_s - self.per_token_s.mean()) / (1 + self.per_token_steps.mean()))
        # Each request bounds the step; a share of `percentile` of them must be content.
        bound = (tpot_s - self.per_token_s) / (1 + self.per_token_steps)
        return float(np.quantile(bound, 1 - percentile / 100))

    def tpot_for(self, step_s: float, percentile: float | None) -> float:
        """Mean (or percentile) of TPOT over requests when steps take ``step_s``."""
        tpot = step_s * (1 + self.per_token_steps) + self.per_token_s
        return float(tpot.mean() if percentile is None else np.quantile(tpot, percentile / 100))


NO_HANDOFF = Handoff(np.zeros(1), np.zeros(1))


@dataclass(frozen=True)
class DecodeStage:
    """Decode of one instance for a workload.

    ``limits`` caps the batch: the name of what caps it, and the batch. ``fit`` is one of ``ladder.FITS``.
    ``crowding`` is by how much resident KV fluctuates more than the number of requests (root mean square over mean of
    their contexts); 0 takes the batch as constant, as the paper does.
    """

    ladder: Ladder
    fit: str
    handoff: Handoff = NO_HANDOFF
    limits: tuple[tuple[str, float], ...] = ()
    crowding: float = 0.0

    def extra_batch(self, batch: float, instances: float, percentile: float | None) -> float:
        """By how much the batch that a request sees exceeds the mean ``batch`` of its instance.

        The number of requests is Poisson and spread evenly over ``instances``: a request sees the mean and itself, and
        at a percentile as many standard deviations more as a normal variable has there (ours).
        """
        if self.crowding == 0:
            return 0.0
        z = 0.0 if percentile is None else max(NormalDist().inv_cdf(percentile / 100), 0.0)
        return 1.0 + z * self.crowding * math.sqrt(batch / max(instances, 1.0))


class Machine(Protocol):
    """A kind of instance pair (prefill, decode) that requests can be planned for."""

    @property
    def source(self) -> str:
        """Where the figures come from, in words."""
        ...

    @property
    def prefill_error(self) -> float:
        """Relative error of prefill times."""
        ...

    @property
    def decode_error(self) -> float:
        """Relative error of decode step times."""
        ...

    @property
    def step_tokens(self) -> int:
        """Tokens of a full prefill step; 0 where prompts go one at a time."""
        ...

    def prefill_s(self, prompts: F64) -> F64:
        """Seconds of each prompt on an idle prefill instance, float64[n]."""
        ...

    def shared_prefill_s(self, prompts: F64) -> F64 | None:
        """Seconds that each prompt adds to a step that others fill, float64[n]; None where prompts go one at a time."""
        ...

    def decode(self, prompts: F64, outputs: F64) -> DecodeStage:
        """The decode stage for requests of these lengths."""
        ...

    def faster(self, prefill: float, decode: float) -> Machine:
        """The same with prefill and decode speeds times these factors."""
        ...


@dataclass(frozen=True)
class Benchmark:
    """Measured figures of one instance: ``prefill_tps`` prompt tokens/s at saturation, and a decode ladder.

    ``prefill_error`` is the relative error of the prefill figure, which a single number cannot tell.
    """

    prefill_tps: float
    ladder: Ladder
    fit: str
    prefill_error: float = 0.0
    decode_error: float = 0.0
    source: str = "benchmark"
    step_tokens: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.prefill_tps) and self.prefill_tps > 0):
            raise PenstockError(
                f"prefill throughput {self.prefill_tps:g} is not positive", "give --prefill-throughput in tokens/s"
            )

    def prefill_s(self, prompts: F64) -> F64:
        """See :class:`Machine`: proportional to the prompt."""
        return prompts / self.prefill_tps

    def shared_prefill_s(self, prompts: F64) -> None:
        """See :class:`Machine`: prompts go one at a time."""

    def decode(self, prompts: F64, outputs: F64) -> DecodeStage:
        """See :class:`Machine`: the ladder as measured, whatever the lengths."""
        return DecodeStage(self.ladder, self.fit)

    def faster(self, prefill: float, decode: float) -> Benchmark:
        """See :class:`Machine`."""
        return replace(self, prefill_tps=self.prefill_tps * prefill, ladder=self.ladder.slower(1 / decode))


@dataclass(frozen=True)
class Modelled:
    """A step model for each phase, with the limits of the instance around it.

    ``prefill_spec`` and ``decode_spec`` are the simulator's instances; KV of a token is ``kv_bytes`` and moves at
    ``link_bytes_per_s`` after ``link_latency_s``. ``prefill_error`` and ``decode_error`` are relative.
    """

    prefill_spec: InstanceSpec
    decode_spec: InstanceSpec
    kv_bytes: float
    link_bytes_per_s: float
    link_latency_s: float
    prefill_error: float
    decode_error: float
    source: str
    prefill_speed: float = 1.0
    decode_speed: float = 1.0

    @property
    def step_tokens(self) -> int:
        """Tokens of a full prefill step."""
        return self.prefill_spec.max_num_batched_tokens

    def prefill_s(self, prompts: F64) -> F64:
        """See :class:`Machine`: in chunks of the token budget, on an idle instance."""
        return self._each(prompts, lambda n: prefill_alone_s(self.prefill_spec, n))

    def shared_prefill_s(self, prompts: F64) -> F64:
        """See :class:`Machine`: at most the time alone, which is also that of prompts of a whole step or more."""
        budget, step = self.step_tokens, self.prefill_spec.step_model.step_s
        full_s = step(0, 0, [budget], [0])

        def added(n: int) -> float:
            alone = prefill_alone_s(self.prefill_spec, n)
            return alone if n >= budget else min(alone, step(0, 0, [n, budget], [0, 0]) - full_s)

        return self._each(prompts, added)

    def _each(self, prompts: F64, cost: Callable[[int], float]) -> F64:
        whole = np.maximum(np.rint(prompts), 1).astype(np.int64)
        distinct, where = np.unique(whole, return_inverse=True)
        found: F64 = np.array([cost(n) for n in distinct.tolist()])[where] / self.prefill_speed
        return found

    def decode(self, prompts: F64, outputs: F64) -> DecodeStage:
        """See :class:`Machine`: steps at the mean context of the tokens, handed-off KV, batch within memory."""
        resident = prompts + outputs / 2
        # A request is in the batch once per output token, so long outputs weigh more.
        context = float(np.average(resident, weights=outputs))
        spread = math.sqrt(float(np.average(resident**2, weights=outputs)))
        limits = (
            ("KV capacity", _batch_within(self.decode_spec.capacity_tokens, context, spread)),
            ("max_num_seqs", float(self.decode_spec.max_num_seqs)),
        )
        top = min(limit for _, limit in limits)
        if top < 1:
            raise PenstockError(
                f"one request of {context:,.0f} tokens (mean) fills the KV cache of a decode instance "
                f"({self.decode_spec.capacity_tokens:,} tokens)",
                "use a card with more memory, more tensor parallelism or a smaller --kv-dtype",
            )
        batches = np.unique(np.rint(np.geomspace(1, max(math.floor(top), 2), RUNGS)).astype(np.int64)).tolist()
        step = self.decode_spec.step_model.step_s
        times = [step(b, round(b * context), [], []) / self.decode_speed for b in batches]
        kept = [0]
        for i in range(1, len(batches)):
            if times[i] > times[kept[-1]] * (1 + 1e-9):
                kept.append(i)
            else:
                kept[-1] = i  # flat (a launch-bound floor): the larger batch costs nothing
        if len(kept) == 1:
            kept = [0, len(batches) - 1]
            times[-1] = times[0] * (1 + 1e-6)
        ladder = Ladder(tuple(float(batches[i]) for i in kept), tuple(times[i] for i in kept), "the step model")
        several = outputs > 1
        after = outputs[several] - 1 if several.any() else np.ones(1)
        moved = prompts[several] if several.any() else prompts[:1]
        transfer = self.link_latency_s + moved * self.kv_bytes / self.link_bytes_per_s
        steps = HANDOFF_STEPS_AHEAD if self.decode_spec.async_scheduling else HANDOFF_STEPS
        return DecodeStage(ladder, "linear", Handoff(transfer / after, steps / after), limits, spread / context)

    def faster(self, prefill: float, decode: float) -> Modelled:
        """See :class:`Machine`."""
        return replace(self, prefill_speed=self.prefill_speed * prefill, decode_speed=self.decode_speed * decode)


def _batch_within(capacity: float, mean: float, spread: float) -> float:
    """Largest B with ``B mean + SPARE_DEVIATIONS sqrt(B) spread <= capacity`` (a Poisson number of residents)."""
    root = (-SPARE_DEVIATIONS * spread + math.sqrt((SPARE_DEVIATIONS * spread) ** 2 + 4 * mean * capacity)) / (2 * mean)
    return root**2


def floor_text(stage: DecodeStage) -> str:
    """``9.2 ms at batch 1``: the least TPOT of a stage, for messages."""
    return f"{seconds(stage.ladder.tpot_s[0])} at batch {stage.ladder.batch[0]:g}"
