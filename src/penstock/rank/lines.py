"""Straight lines below a step model: what a step costs at least, as a sum over the tokens in it.

Every step of an engine takes at least

    step_s + sum over decodes (decode_s + context_s N) + sum over chunks (chunk_s + prompt_s q) + pair_s pairs

seconds, where a decode reads N tokens of KV, a chunk has q new tokens, and ``pairs`` are those of a new prompt token
and the half of the prompt it sees, L L / 2 for a whole prompt of L tokens in whatever chunks. A sum can be shared out
among the requests of a step, which is what the bounds need.

The roofline's step is ``overhead + T(tokens) + R(rows) + attention``. For any slope s, ``T(n) >= a + s n`` with
``a = min over n of (T(n) - s n)``, found by trying every n up to the token budget; the same for R. A fitted or linear
model is a sum already: one line has its constant, another spreads the constant over the fullest step there can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.perf.fitted import FittedStepModel
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.step import LinearStepModel, StepModel
from penstock.sim.cluster import InstanceSpec
from penstock.workload.trace import F64

SLOPE_AT = (1, 32, 64, 128, 192, 256, 384, 512, 1024, 2048)
"""Token counts at which the slope of T is taken for a line."""


@dataclass(frozen=True)
class Line:
    """See the module; all in seconds, none negative."""

    step_s: float
    decode_s: float
    context_s: float
    chunk_s: float
    prompt_s: float
    pair_s: float

    def prompts_s(self, prompts: F64) -> F64:
        """Share of a step that prompts of these lengths take at least, all chunks together: seconds, float64[n]."""
        return self.chunk_s + prompts * (self.prompt_s + 0.5 * self.pair_s * prompts)


def lines_below(spec: InstanceSpec) -> tuple[Line, ...]:
    """Lines below the steps of an instance; none for a step model of which nothing is known."""
    model: StepModel = spec.step_model
    if isinstance(model, RooflineStepModel):
        return _roofline(model, spec.max_num_batched_tokens, spec.max_num_seqs)
    if isinstance(model, FittedStepModel):
        return _fitted(model.coefficients, spec)
    if isinstance(model, LinearStepModel):
        coefficients = {
            "base_s": model.base_s,
            "per_decode_s": model.per_decode_s,
            "per_context_s": model.per_context_s,
            "prefill_base_s": model.base_s,
            "per_prefill_s": model.per_prefill_s,
            "per_pair_s": model.per_pair_s,
            "per_chunk_s": 0.0,
            "mixed_decode_s": model.per_decode_s,
            "mixed_context_s": model.per_context_s,
        }
        return _fitted(coefficients, spec)
    return ()


def _roofline(model: RooflineStepModel, budget: int, seqs: int) -> tuple[Line, ...]:
    context_s, pair_s = model.attention_rates()
    found = []
    tokens = _supports(np.array([model.tokens_s(n) for n in range(1, budget + 1)]))
    # A step has no more rows than running requests.
    rows = _supports(np.array([model.rows_s(n) for n in range(1, min(seqs, budget) + 1)]))
    for fixed, slope in tokens:
        for row_fixed, row_s in rows[:1] + rows[-1:]:
            step = model.overhead_s + fixed + row_fixed
            found.append(Line(step, slope + row_s, context_s, row_s, slope, pair_s))
    if model.floor_s > 0:
        found.append(Line(model.overhead_s + model.floor_s, 0.0, 0.0, 0.0, 0.0, 0.0))
    return tuple(found)


def _supports(seconds: F64) -> list[tuple[float, float]]:
    """(constant, slope) of lines below ``seconds[n - 1]`` for n from 1 on, steeper and steeper.

    The steepest is the highest line through the origin that still is below.
    """
    counts = np.arange(1, len(seconds) + 1)
    steepest = float((seconds / counts).min())
    slopes = {0.0, steepest}
    for n in SLOPE_AT:
        if n < len(seconds):
            slopes.add(min(max(float(seconds[n] - seconds[n - 1]), 0.0), steepest))
    return [(max(float((seconds - slope * counts).min()), 0.0), slope) for slope in sorted(slopes)]


def _fitted(c: dict[str, float], spec: InstanceSpec) -> tuple[Line, ...]:
    context = min(c["per_context_s"], c["mixed_context_s"])
    decode, beside = c["per_decode_s"], c["mixed_decode_s"]
    base, prefill_base = c["base_s"], c["prefill_base_s"]
    chunk, prompt, pair = c["per_chunk_s"], c["per_prefill_s"], c["per_pair_s"]
    each = prefill_base / spec.max_num_batched_tokens
    spread = min(decode + base / spec.max_num_seqs, beside + each)
    return (
        Line(min(base, prefill_base), min(decode, beside), context, chunk, prompt, pair),
        Line(0.0, spread, context, chunk, prompt + each, pair),
    )
