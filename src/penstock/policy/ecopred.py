"""EcoPred: what a step takes at each clock, by straight lines fitted to samples (VoltanaLLM, arXiv 2509.04827).

Prefill is one line in the tokens of the batch for each clock. Decode is a plane in batch size and resident tokens for
each clock *and each bin of the batch size*: matrix products work on whole tiles, so time jumps at multiples of 128,
which a single plane cannot follow. Between two clocks a prediction is interpolated. Bins, limits and the profiled
points are those of the released code.

Samples come from what a policy believes (:func:`believed_samples`) or from a measured ladder: any columns will do.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from penstock.core.errors import PenstockError
from penstock.perf.energy import ClockLevel
from penstock.policy.parts import Beliefs

BIN_ENDS: Final = (4, *range(8, 129, 8), *range(256, 2049, 128))
"""Batch sizes at which a bin of the decode regression ends (code)."""
PROFILED_BATCHES: Final = (
    1,
    *(b for k in range(8, 121, 8) for b in (k, k + 1)),
    *(b for k in range(128, 1025, 128) for b in (k, k + 1)),
)
"""Batch sizes at which decode is profiled: the last of a tile and the first of the next (code)."""
PREFILL_RANGE: Final = (2_000, 20_000)
"""Prompt tokens of the samples that the prefill line is fitted to (code)."""
ITL_RANGE_S: Final = (0.003, 0.3)
"""Decode samples outside are dropped (code)."""
FALLBACK_S: Final = 0.02
"""Instead of a prediction that is not positive (code)."""
KV_TOKENS: Final = 457_600
"""KV tokens up to which decode is profiled: an A100-80G with an 8B model (code)."""
LONGEST_OUTPUT: Final = 8_192
_PREFILL_TOKENS: Final = (2_500, 4_000, 6_000, 8_000, 12_000, 16_000, 19_000)
_DEPTHS: Final = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)
_TRIALS: Final = 60


@dataclass(frozen=True)
class Samples:
    """Measured steps as columns: ``mhz``, ``batch``, ``tokens`` and ``seconds``, float64[n] each.

    Of prefill steps ``tokens`` are the prompt tokens computed and ``batch`` does not count; of decode steps ``batch``
    are the requests and ``tokens`` the KV tokens they hold together.
    """

    mhz: Any
    batch: Any
    tokens: Any
    seconds: Any


class EcoPred:
    """Predictions at a number of clocks, each a line for prefill and one plane a bin for decode.

    Parameters
    ----------
    mhz : tuple of float
        Profiled clocks, ascending.
    prefill : list of (a, c)
        ``a tokens + c`` seconds, by clock.
    decode : list of list of (a, b, c)
        ``a batch + b tokens + c`` seconds, by clock and by bin of ``BIN_ENDS``.
    """

    def __init__(
        self,
        mhz: tuple[float, ...],
        prefill: list[tuple[float, float]],
        decode: list[list[tuple[float, float, float]]],
    ) -> None:
        self.mhz = mhz
        self.prefill = prefill
        self.decode = decode

    def prefill_s(self, mhz: float, tokens: float) -> float:
        """Predicted seconds of a prefill step of ``tokens`` tokens."""
        i, share = self._between(mhz)
        a, c = self.prefill[i]
        low = _positive(a * tokens + c)
        if share == 0.0:
            return low
        a, c = self.prefill[i + 1]
        return low + share * (_positive(a * tokens + c) - low)

    def decode_s(self, mhz: float, batch: float, tokens: float) -> float:
        """Predicted seconds of a decode step of ``batch`` requests that hold ``tokens`` KV tokens."""
        i, share = self._between(mhz)
        where = min(bisect_left(BIN_ENDS, batch), len(BIN_ENDS) - 1)
        a, b, c = self.decode[i][where]
        low = _positive(a * batch + b * tokens + c)
        if share == 0.0:
            return low
        a, b, c = self.decode[i + 1][where]
        return low + share * (_positive(a * batch + b * tokens + c) - low)

    def _between(self, mhz: float) -> tuple[int, float]:
        """The profiled clock at or below ``mhz``, and how far it lies on the way to the next one."""
        levels = self.mhz
        i = bisect_left(levels, mhz)
        if i < len(levels) and levels[i] == mhz:
            return i, 0.0
        if i == 0:
            return 0, 0.0
        if i == len(levels):
            return i - 1, 0.0
        return i - 1, (mhz - levels[i - 1]) / (levels[i] - levels[i - 1])


def _positive(seconds: float) -> float:
    return seconds if seconds > 0.0 else FALLBACK_S


def fit(prefill: Samples, decode: Samples) -> EcoPred:
    """Fit the predictor to samples of both phases at the same clocks.

    Raises
    ------
    PenstockError
        A clock lacks samples of one phase.
    """
    levels = tuple(float(f) for f in np.unique(np.concatenate((prefill.mhz, decode.mhz))))
    lines: list[tuple[float, float]] = []
    planes: list[list[tuple[float, float, float]]] = []
    for mhz in levels:
        here, there = prefill.mhz == mhz, decode.mhz == mhz
        if here.sum() < 2 or there.sum() < 3:
            raise PenstockError(
                f"{int(here.sum())} prefill and {int(there.sum())} decode samples at {mhz:g} MHz",
                "measure two or more prefill steps and three or more decode steps at each clock",
            )
        lines.append(_line(prefill.tokens[here], prefill.seconds[here]))
        planes.append(_planes(decode.batch[there], decode.tokens[there], decode.seconds[there]))
    return EcoPred(levels, lines, planes)


def _line(tokens: Any, seconds: Any) -> tuple[float, float]:
    """Robust line with non-negative coefficients, of the samples within ``PREFILL_RANGE`` if there are two.

    RANSAC as the code has it: of the lines through two samples the one that most samples agree with (within the median
    absolute deviation), then least squares over those. The pairs follow a plane-filling sequence (multiples of powers
    of the plastic number, modulo 1) instead of chance: what decides must answer alike every time.
    """
    fit_for = (tokens > PREFILL_RANGE[0]) & (tokens < PREFILL_RANGE[1])
    if len(np.unique(tokens[fit_for])) >= 2:
        tokens, seconds = tokens[fit_for], seconds[fit_for]
    near = max(float(np.median(np.abs(seconds - np.median(seconds)))), 1e-12)
    n = len(tokens)
    best, least = np.ones(len(tokens), np.bool_), (-1, 0.0)
    for k in range(1, _TRIALS + 1):
        i, j = int(0.7548776662 * k % 1.0 * n), int(0.5698402910 * k % 1.0 * n)
        if tokens[i] == tokens[j]:
            continue
        slope = (seconds[j] - seconds[i]) / (tokens[j] - tokens[i])
        off = np.abs(seconds - seconds[i] - slope * (tokens - tokens[i]))
        agree = off <= near
        score = int(agree.sum()), -float(off[agree].sum())
        if score > least and len(np.unique(tokens[agree])) >= 2:
            best, least = agree, score
    tokens, seconds = tokens[best], seconds[best]
    slope, intercept = np.polyfit(tokens, seconds, 1)
    if intercept < 0.0:  # the best line through the origin is the best non-negative one then
        return max(float(tokens @ seconds / (tokens @ tokens)), 0.0), 0.0
    if slope < 0.0:
        return 0.0, float(seconds.mean())
    return float(slope), float(intercept)


def _planes(batch: Any, tokens: Any, seconds: Any) -> list[tuple[float, float, float]]:
    """One plane a bin; a bin without samples takes its nearest neighbour's, the lower of two as near."""
    keep = (seconds > ITL_RANGE_S[0]) & (seconds < ITL_RANGE_S[1])
    if keep.sum() >= 3:
        batch, tokens, seconds = batch[keep], tokens[keep], seconds[keep]
    where = np.minimum(np.searchsorted(BIN_ENDS, batch), len(BIN_ENDS) - 1)
    found: dict[int, tuple[float, float, float]] = {}
    for i in np.unique(where).tolist():
        mine = where == i
        terms = np.stack([batch[mine], tokens[mine]], axis=1)
        middle, level = terms.mean(axis=0), float(seconds[mine].mean())
        size = np.maximum(np.abs(terms).max(axis=0), 1e-12)
        # About the middle, so that a bin with a single batch size is flat in it.
        a, b = (np.linalg.lstsq((terms - middle) / size, seconds[mine] - level, rcond=None)[0] / size).tolist()
        found[i] = (a, b, level - a * float(middle[0]) - b * float(middle[1]))
    return [found[min(found, key=lambda j: (abs(j - i), j))] for i in range(len(BIN_ENDS))]


def levels_of(beliefs: Beliefs) -> tuple[ClockLevel, ...]:
    """The believed clock levels, ascending; a single one where the hardware has no known levels."""
    return beliefs.clocks or (ClockLevel(1.0, beliefs.step),)


def believed_samples(beliefs: Beliefs, kv_tokens: int = KV_TOKENS) -> tuple[Samples, Samples]:
    """Prefill and decode samples of what a policy believes, at the points that the code profiles.

    Decode goes from empty to ``min(LONGEST_OUTPUT, 0.95 kv_tokens / batch)`` tokens a request. Steps at
    which the belief bends (a tile, a roofline's ridge) are met only as far as these points show them.
    """
    prefill: list[tuple[float, float, float, float]] = []
    decode: list[tuple[float, float, float, float]] = []
    for level in levels_of(beliefs):
        model = level.step_model
        for tokens in _PREFILL_TOKENS:
            prefill.append((level.mhz, 1, tokens, model.step_s(0, 0, [tokens // 8] * 8, [0] * 8)))
        for batch in PROFILED_BATCHES:
            longest = min(LONGEST_OUTPUT, 0.95 * kv_tokens / batch)
            for depth in _DEPTHS:
                held = batch * max(1, int(depth * longest))
                decode.append((level.mhz, batch, held, model.step_s(batch, held, [], [])))
    return _samples(prefill), _samples(decode)


def _samples(rows: list[tuple[float, float, float, float]]) -> Samples:
    table = np.array(rows)
    return Samples(table[:, 0], table[:, 1], table[:, 2], table[:, 3])


def ecopred(beliefs: Beliefs) -> EcoPred:
    """The predictor of what ``beliefs`` say."""
    return fit(*believed_samples(beliefs))
