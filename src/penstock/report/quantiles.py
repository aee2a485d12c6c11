"""Exact mean, quantiles and maximum of compressed token gaps, without writing the gaps out.

A run of a million requests has hundreds of millions of gaps, held as rows of arithmetic progressions
(:class:`penstock.sim.result.TokenGaps`). The k-th smallest gap is found by bisection on the counting function
"how many gaps are at most x", which is one vectorised division a row, so the cost depends on the number of rows
and not on how many steps a row stands for. Results equal ``numpy.quantile(expanded, q, method="linear")``, where
gap ``j`` of a row is the float ``first_s + j * rise_s``. Method: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.sim.result import TokenGaps
from penstock.workload.trace import F64, I64

EXPAND_AT_MOST = 1 << 17
"""Distinct gaps that are written out and sorted once a bracket holds no more than these."""


@dataclass(frozen=True)
class _Rows:
    """Rows of progressions; ``low_s`` and ``high_s`` are the smallest and largest gap of a row."""

    first_s: F64
    rise_s: F64
    count: I64
    batch: I64
    low_s: F64
    high_s: F64

    def take(self, rows: NDArray[np.bool_]) -> _Rows:
        return _Rows(*(column[rows] for column in vars(self).values()))

    def at_most(self, x: float) -> I64:
        """For each row, how many of its ``count`` steps last at most ``x`` seconds: int64[rows]."""
        falls = self.rise_s < 0
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            guess = np.floor((x - self.first_s) / self.rise_s) + 1
        # The steps for which `prefix` holds are the first m of a row: the short ones where it rises, the long ones
        # where it falls. `guess` is m up to rounding; a row where it is not is searched below.
        # (0/0, a level row exactly at x, is all of the row.)
        m = np.clip(np.where(np.isnan(guess), self.count, guess), 0, self.count).astype(np.int64)
        wrong = ~self._prefix(m - 1, x, falls) & (m > 0) | self._prefix(m, x, falls) & (m < self.count)
        if wrong.any():
            m[wrong] = self.take(wrong)._search(x)
        return np.where(falls, self.count - m, m)

    def _prefix(self, j: I64, x: float, falls: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return (self.first_s + j * self.rise_s <= x) ^ falls

    def _search(self, x: float) -> I64:
        """Length of the prefix by binary search on the step number (rises near the float spacing, or zero)."""
        falls = self.rise_s < 0
        low, high = np.zeros_like(self.count), self.count.copy()
        while np.any(low < high):
            middle = (low + high) // 2
            inside = self._prefix(middle, x, falls) & (middle < high)
            low = np.where(inside, middle + 1, low)
            high = np.where(inside, high, middle)
        return low

    def between(self, above_s: float, to_s: float) -> tuple[F64, I64]:
        """Every gap in ``(above_s, to_s]`` once, with the number of requests that saw it; not sorted."""
        start, stop = self.at_most(above_s), self.at_most(to_s)
        length = stop - start
        row = np.repeat(np.arange(len(length)), length)
        rank = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length) + start[row]
        j = np.where(self.rise_s[row] < 0, self.count[row] - 1 - rank, rank)
        return self.first_s[row] + j * self.rise_s[row], self.batch[row]


class GapStatistics:
    """Exact statistics of compressed gaps.

    Parameters
    ----------
    gaps : TokenGaps
        Rows with ``count`` or ``batch`` of 0 stand for nothing. Costs two sorts of the rows.
    """

    def __init__(self, gaps: TokenGaps) -> None:
        some = (gaps.count > 0) & (gaps.batch > 0)
        first, rise, count, batch = gaps.first_s[some], gaps.rise_s[some], gaps.count[some], gaps.batch[some]
        rise = rise + 0.0  # -0.0 becomes 0.0, so that a level row divides to +inf above its value
        last = first + (count - 1) * rise
        self._rows = _Rows(first, rise, count, batch, np.minimum(first, last), np.maximum(first, last))
        weight = count * batch
        self.total = int(weight.sum())
        """Number of gaps."""
        self._by_low = _cumulative(self._rows.low_s, weight)
        self._by_high = _cumulative(self._rows.high_s, weight)

    @property
    def mean_s(self) -> float | None:
        """Mean gap, seconds, in closed form; None without gaps."""
        if not self.total:
            return None
        r = self._rows
        return float(np.sum(r.batch * (r.count * r.first_s + r.rise_s * (r.count * (r.count - 1) / 2))) / self.total)

    @property
    def max_s(self) -> float | None:
        """Longest gap, seconds; None without gaps."""
        return float(self._rows.high_s.max()) if self.total else None

    def quantile(self, q: float) -> float | None:
        """The ``q`` quantile (0 to 1), seconds, interpolated as numpy's "linear" does; None without gaps."""
        if not 0 <= q <= 1:
            raise ValueError(f"quantile {q} is outside 0..1")
        if not self.total:
            return None
        position = (self.total - 1) * q
        k = min(int(position), self.total - 1)
        share = position - k
        low, after = self._smallest(k)
        if share == 0:
            return low
        high = after if after is not None else self.smallest(k + 1)
        return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)

    def smallest(self, k: int) -> float:
        """The gap with ``k`` gaps before it in ascending order (``0 <= k < total``), seconds."""
        return self._smallest(k)[0]

    def _smallest(self, k: int) -> tuple[float, float | None]:
        """Gap ``k`` in ascending order, and gap ``k + 1`` where it turned up beside it."""
        # Counting every row at its smallest gap overstates how many gaps are at most x, at its largest understates
        # it: so the two sorted columns bracket the answer, often to a hair.
        low, to = (
            float(values[int(np.searchsorted(sums, k, side="right"))]) for values, sums in (self._by_low, self._by_high)
        )
        above = float(np.nextafter(low, -np.inf))
        rows = self._rows.take((self._rows.high_s > above) & (self._rows.low_s <= to))
        # Bracket (above, to]; `before` gaps lie at or below `above`.
        position = int(np.searchsorted(self._by_high[0], above, side="right"))
        before = int(self._by_high[1][position - 1]) if position else 0
        below = rows.at_most(above)
        before += int((below * rows.batch).sum())
        inside = int((rows.at_most(to) - below).sum())
        while inside > EXPAND_AT_MOST:
            middle = above + (to - above) / 2
            if not above < middle < to:
                break
            here = rows.at_most(middle)
            reached = before + int(((here - below) * rows.batch).sum())
            if reached > k:
                to = middle
                keep = rows.low_s <= to
            else:
                above, before, below = middle, reached, here
                keep = rows.high_s > above
            rows, below = rows.take(keep), below[keep]
            inside = int((rows.at_most(to) - below).sum())
        if inside > EXPAND_AT_MOST:  # Only one float is left in the bracket.
            return to, None
        values, weights = rows.between(above, to)
        values, sums = _cumulative(values, weights)
        at, after = np.searchsorted(sums, [k - before, k + 1 - before], side="right").tolist()
        return float(values[at]), float(values[after]) if after < len(values) else None


def _cumulative(values: F64, weights: I64) -> tuple[F64, I64]:
    """Values ascending, and the weight of all values up to each."""
    order = np.argsort(values)
    return values[order], np.cumsum(weights[order])
