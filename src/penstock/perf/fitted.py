"""Step model fitted to measured steps: a straight line in the batch for decode steps, another for steps with prefill.

Two regimes, because an engine runs them differently: a pure decode step replays a captured graph and reads weights
and KV, a step with prefill computes, and its decodes cost more beside a prompt than among themselves (the mixed
attention kernels have one shape for both). The class is compiled with mypyc; fitting imports numpy and scipy only
when called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.errors import PenstockError
from penstock.perf.step import StepModel

COEFFICIENT_UNITS: dict[str, str] = {
    "base_s": "s per decode step",
    "per_decode_s": "s per decode in a decode step",
    "per_context_s": "s per KV token read in a decode step",
    "prefill_base_s": "s per step with prefill",
    "per_prefill_s": "s per new prompt token",
    "per_pair_s": "s per pair of a new prompt token and a token it attends to, q (c + q / 2)",
    "per_past_s": "s per KV token read for a prompt chunk (c)",
    "per_chunk_s": "s per prompt chunk",
    "mixed_decode_s": "s per decode in a step with prefill",
    "mixed_context_s": "s per KV token of decodes in a step with prefill",
}
"""The coefficients of :class:`FittedStepModel` and their units."""

_DECODE = ["base_s", "per_decode_s", "per_context_s"]
_PREFILL = [name for name in COEFFICIENT_UNITS if name not in _DECODE]


class FittedStepModel(StepModel):
    """Step time linear in ten features (see :data:`COEFFICIENT_UNITS`); a coefficient that is absent is 0."""

    def __init__(self, coefficients: dict[str, float]) -> None:
        self.coefficients = {name: float(coefficients.get(name, 0.0)) for name in COEFFICIENT_UNITS}
        c = self.coefficients
        self._base = c["base_s"]
        self._decode = c["per_decode_s"]
        self._context = c["per_context_s"]
        self._prefill_base = c["prefill_base_s"]
        self._prefill = c["per_prefill_s"]
        self._pair = c["per_pair_s"]
        self._past = c["per_past_s"]
        self._chunk = c["per_chunk_s"]
        self._mixed_decode = c["mixed_decode_s"]
        self._mixed_context = c["mixed_context_s"]

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`. An empty step takes no time."""
        count = len(chunk_new)
        if count == 0:
            return self._base + self._decode * decodes + self._context * context if decodes else 0.0
        total = self._prefill_base + self._mixed_decode * decodes + self._mixed_context * context
        for i in range(count):
            new = chunk_new[i]
            past = chunk_past[i]
            total += self._chunk + self._prefill * new + self._pair * new * (past + 0.5 * new) + self._past * past
        return total

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """See :class:`StepModel`. One line without end."""
        if decodes == 0:
            return 0.0, 0.0, float("inf")
        return self._base + self._decode * decodes, self._context, float("inf")


@dataclass(frozen=True)
class Residuals:
    """How well a fit meets its measurements: relative errors ``|fit - measured| / measured`` and their signed mean."""

    steps: int
    mean: float
    p50: float
    p90: float
    p99: float
    signed_mean: float


@dataclass(frozen=True)
class Fit:
    """A fitted model and its residuals on decode steps, on steps with prefill, and on all."""

    model: FittedStepModel
    decode: Residuals
    prefill: Residuals
    all: Residuals


def fit_step_model(
    decodes: Sequence[int],
    context: Sequence[int],
    chunk_new: Sequence[Sequence[int]],
    chunk_past: Sequence[Sequence[int]],
    seconds: Sequence[float],
) -> Fit:
    """Non-negative least squares of RELATIVE errors on measured steps, decode steps and steps with prefill apart.

    All sequences have one entry a step: decodes, their KV tokens, the new tokens and the past of each prompt chunk,
    and the measured seconds. With decode steps only, the prefill coefficients are those of decode (and a prompt token
    costs what a decode does). Raises :class:`PenstockError` for sequences of different lengths, non-positive seconds,
    or fewer than four steps. Source of the features: the planners' linear models (Arrow v2 section 3.1, DistServe's
    fitted coefficients), with decode beside prefill apart.
    """
    rows = len(seconds)
    if not len(decodes) == len(context) == len(chunk_new) == len(chunk_past) == rows:
        raise PenstockError("measured steps have columns of different lengths", "give one entry a step in each")
    if rows < 4 or min(seconds) <= 0.0:
        raise PenstockError(
            f"{rows} measured steps, shortest {min(seconds, default=0.0)} s",
            "give at least four steps of positive duration",
        )
    pure = [i for i in range(rows) if not len(chunk_new[i])]
    mixed = [i for i in range(rows) if len(chunk_new[i])]
    found: dict[str, float] = {}
    if pure:
        found |= _nnls(_DECODE, [[1.0, float(decodes[i]), float(context[i])] for i in pure], [seconds[i] for i in pure])
    if mixed:
        table = []
        for i in mixed:
            chunks = list(zip(chunk_new[i], chunk_past[i], strict=True))
            table.append(
                [
                    1.0,
                    float(sum(q for q, _ in chunks)),
                    sum(q * (c + 0.5 * q) for q, c in chunks),
                    float(sum(c for _, c in chunks)),
                    float(len(chunks)),
                    float(decodes[i]),
                    float(context[i]),
                ]
            )
        found |= _nnls(_PREFILL, table, [seconds[i] for i in mixed])
    else:
        found |= {
            "prefill_base_s": found["base_s"],
            "per_prefill_s": found["per_decode_s"],
            "mixed_decode_s": found["per_decode_s"],
            "mixed_context_s": found["per_context_s"],
        }
    if not pure:
        found |= {
            "base_s": found["prefill_base_s"],
            "per_decode_s": found["mixed_decode_s"],
            "per_context_s": found["mixed_context_s"],
        }
    model = FittedStepModel(found)
    errors = [
        model.step_s(decodes[i], context[i], list(chunk_new[i]), list(chunk_past[i])) / seconds[i] - 1.0
        for i in range(rows)
    ]
    return Fit(model, _residuals([errors[i] for i in pure]), _residuals([errors[i] for i in mixed]), _residuals(errors))


def _nnls(names: list[str], rows: list[list[float]], seconds: list[float]) -> dict[str, float]:
    # Imported here: scipy takes half a second, which a simulation has no use for.
    import numpy as np
    from scipy.optimize import nnls  # type: ignore[import-untyped, unused-ignore]

    table = np.asarray(rows)
    measured = np.asarray(seconds)
    # Columns of one size, or the solver's tolerance eats the small ones; rows over their time: relative errors.
    scale = np.abs(table).max(axis=0)
    scale[scale == 0.0] = 1.0
    solution, _ = nnls(table / scale / measured[:, None], np.ones(len(measured)))
    return {name: float(value / s) for name, value, s in zip(names, solution, scale, strict=True)}


def _residuals(errors: list[float]) -> Residuals:
    if not errors:
        return Residuals(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    import numpy as np

    sizes = np.abs(np.asarray(errors))
    p50, p90, p99 = (float(x) for x in np.percentile(sizes, [50, 90, 99]))
    return Residuals(len(errors), float(sizes.mean()), p50, p90, p99, float(np.mean(errors)))
