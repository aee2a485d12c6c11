"""Fewer points for the same picture, so that a page of a million requests stays below a megabyte of data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from penstock.sim.result import TokenGaps
from penstock.workload.trace import F64, I64

CDF_POINTS = 240
LEVELS: F64 = np.unique(
    np.concatenate([np.linspace(0, 0.9, CDF_POINTS // 2), 1 - np.geomspace(0.1, 1e-4, CDF_POINTS // 2 - 1), [1.0]])
)
"""Levels at which a CDF is drawn: dense in the tail, where the SLO lives."""


def cdf(values: F64) -> tuple[F64, F64]:
    """Values and levels of an empirical CDF (NaN ignored) in at most ``CDF_POINTS`` points."""
    values = np.sort(values[~np.isnan(values)])
    if not len(values):
        return values, values
    if len(values) <= CDF_POINTS:
        return values, np.arange(1, len(values) + 1) / len(values)
    return np.quantile(values, LEVELS), LEVELS


def cdf_of_gaps(gaps: TokenGaps, points_a_row: int = 4) -> tuple[F64, F64]:
    """The same for token gaps; each row of many steps counts as ``points_a_row`` evenly spaced steps."""
    some = (gaps.count > 0) & (gaps.batch > 0)
    if not some.any():
        return np.empty(0), np.empty(0)
    count = gaps.count[some, None]
    share = (np.arange(points_a_row) + 0.5) / points_a_row
    values = (gaps.first_s[some, None] + gaps.rise_s[some, None] * (count * share - 0.5).clip(0, count - 1)).ravel()
    weights = (np.broadcast_to(count / points_a_row, (len(count), points_a_row)) * gaps.batch[some, None]).ravel()
    order = np.argsort(values)
    level = np.cumsum(weights[order])
    at = np.searchsorted(level, LEVELS * level[-1]).clip(0, len(order) - 1)
    return values[order][at], LEVELS


def extremes(values: NDArray[np.float64], at_most: int) -> I64:
    """Rows to keep so that a line over ``values`` keeps its peaks and dips: lowest and highest of each bin."""
    n = len(values)
    if n <= at_most:
        return np.arange(n)
    edges = np.linspace(0, n, at_most // 2 + 1).astype(np.int64)
    keep = [
        start + int(f(values[start:stop])) for start, stop in pairwise(edges.tolist()) for f in (np.argmin, np.argmax)
    ]
    return np.unique(np.array([*keep, 0, n - 1], dtype=np.int64))


def evenly(n: int, at_most: int) -> I64:
    """At most ``at_most`` of ``n`` row numbers, evenly spread."""
    return np.arange(n) if n <= at_most else np.linspace(0, n - 1, at_most).astype(np.int64)


def block_means(values: F64, axis: int, at_most: int) -> F64:
    """Means of consecutive rows (``axis`` 0) or columns (1), so that at most ``at_most`` are left."""
    n = values.shape[axis]
    if n <= at_most:
        return values
    edges = np.linspace(0, n, at_most + 1).astype(np.int64)
    means: F64 = np.add.reduceat(values, edges[:-1], axis=axis) / np.expand_dims(np.diff(edges), 1 - axis)
    return means
