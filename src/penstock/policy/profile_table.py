"""How long an iteration takes, as tables over its batch tokens and the KV tokens it reads (PolyServe's profile table).

Filled once from what a policy believes, bilinear between their points, and never falling along either axis, whatever
the belief does: an admission test that holds for a batch holds for every smaller one. One table is of decodes, one of
prompt tokens; a chunk beside decodes costs what as many more tokens add to the second. What a chunk's attention reads
of its own prompt is left out, as PolyServe leaves it out below 10 thousand tokens (arXiv 2507.17769);
:meth:`ProfileTable.attention_s` is that part, for longer prompts.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Final

import numpy as np

from penstock.policy.parts import Beliefs

_MOST_DECODES: Final = 2048
_MOST_KV: Final = 1 << 23
_PROBE: Final = (512, 8192, 24576)
"""A chunk, and two lengths before it, between which the cost of its attention is taken."""


class Grid:
    """Seconds over tokens and KV tokens, bilinear, flat beyond the last points.

    Attributes
    ----------
    tokens, kv : float64[t], float64[k]
        Ascending points of the two axes.
    seconds : float64[t, k]
        Raised where needed so that it does not fall along either axis.
    """

    def __init__(self, tokens: list[int], kv: list[int], seconds: list[list[float]]) -> None:
        self.tokens = np.array(tokens, np.float64)
        self.kv = np.array(kv, np.float64)
        self.seconds = np.maximum.accumulate(np.maximum.accumulate(np.array(seconds), axis=0), axis=1)
        # The same as plain numbers: most questions are about one point, which numpy answers slowly.
        self._token_points = [float(n) for n in tokens]
        self._kv_points = [float(n) for n in kv]
        self._rows: list[list[float]] = self.seconds.tolist()

    def one(self, tokens: float, kv: float) -> float:
        """As :meth:`at`, for one point."""
        if tokens <= 0.0:
            return 0.0
        i, a = _cell(self._token_points, tokens)
        j, b = _cell(self._kv_points, kv)
        left, right = self._rows[i], self._rows[i + 1]
        low = left[j] + b * (left[j + 1] - left[j])
        return low + a * (right[j] + b * (right[j + 1] - right[j]) - low)

    def at(self, tokens: Any, kv: Any) -> Any:
        """Seconds for ``tokens`` and ``kv`` tokens: float64[n], 0 where there are no tokens."""
        tokens, kv = np.asarray(tokens, np.float64), np.asarray(kv, np.float64)
        i, a = _place(self.tokens, tokens)
        j, b = _place(self.kv, kv)
        table = self.seconds
        low = table[i, j] + b * (table[i, j + 1] - table[i, j])
        high = table[i + 1, j] + b * (table[i + 1, j + 1] - table[i + 1, j])
        return np.where(tokens > 0.0, low + a * (high - low), 0.0)

    def most(self, kv: float, budget_s: float) -> float:
        """Most tokens that take at most ``budget_s`` with ``kv`` KV tokens (0 if not even the first point does)."""
        j, b = _cell(self._kv_points, kv)
        column = self.seconds[:, j] + b * (self.seconds[:, j + 1] - self.seconds[:, j])
        i = int(column.searchsorted(budget_s, "right")) - 1
        if i < 0:
            return 0.0
        if i + 1 == len(column):
            return float(self.tokens[i])
        share = (budget_s - column[i]) / (column[i + 1] - column[i])
        return float(self.tokens[i] + share * (self.tokens[i + 1] - self.tokens[i]))


class ProfileTable:
    """Iteration seconds by batch tokens and KV tokens, as a policy believes them."""

    def __init__(self, beliefs: Beliefs) -> None:
        step = beliefs.step
        kv = [0, *_points(1024, _MOST_KV, 1.5)]
        decodes = _points(1, _MOST_DECODES, 1.19)
        prompts = _points(1, 2 * beliefs.max_batched_tokens, 1.19)
        self.decodes = Grid(decodes, kv, [[step.step_s(t, n, [], []) for n in kv] for t in decodes])
        self.prompts = Grid(prompts, kv, [[step.step_s(0, n, [t], [0]) for n in kv] for t in prompts])
        chunk, near, far = _PROBE
        rise = step.step_s(0, 0, [chunk], [far]) - step.step_s(0, 0, [chunk], [near])
        self._pair_s = max(rise, 0.0) / (chunk * (far - near))

    def iteration_s(self, decodes: Any, kv: Any) -> Any:
        """Seconds of iterations of ``decodes`` requests over ``kv`` KV tokens: float64[n], 0 where there are none."""
        return self.decodes.at(decodes, kv)

    def with_chunk_s(self, decodes: float, kv: float, chunk: float) -> float:
        """Seconds of an iteration that computes ``chunk`` prompt tokens beside the decodes."""
        prompts = self.prompts
        if decodes <= 0.0:
            return prompts.one(chunk, kv)
        return self.decodes.one(decodes, kv) + prompts.one(decodes + chunk, kv) - prompts.one(decodes, kv)

    def most_chunk(self, decodes: float, kv: float, budget_s: float) -> int:
        """Most prompt tokens beside the decodes whose iteration takes at most ``budget_s``, 0 or more."""
        if decodes <= 0.0:
            return int(self.prompts.most(kv, budget_s))
        left_s = budget_s - self.decodes.one(decodes, kv)
        if left_s <= 0.0:
            return 0
        return max(int(self.prompts.most(kv, self.prompts.one(decodes, kv) + left_s) - decodes), 0)

    def attention_s(self, chunk: float, past: float) -> float:
        """Believed seconds of the attention of ``chunk`` prompt tokens over ``past`` tokens of the same prompt."""
        return self._pair_s * chunk * past


def _points(start: int, stop: int, factor: float) -> list[int]:
    points, x = [start], float(start)
    while points[-1] < stop:
        x *= factor
        points.append(min(max(points[-1] + 1, round(x)), stop))
    return points


def _cell(points: list[float], x: float) -> tuple[int, float]:
    """The cell of ``x`` and how far into it, 0 to 1."""
    i = min(max(bisect_right(points, x) - 1, 0), len(points) - 2)
    return i, min(max((x - points[i]) / (points[i + 1] - points[i]), 0.0), 1.0)


def _place(points: Any, x: Any) -> tuple[Any, Any]:
    """:func:`_cell` for arrays."""
    i = np.minimum(np.maximum(points.searchsorted(x, "right") - 1, 0), len(points) - 2)
    return i, np.minimum(np.maximum((x - points[i]) / (points[i + 1] - points[i]), 0.0), 1.0)
