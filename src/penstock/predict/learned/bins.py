"""Lengths in bins: for predictors that classify."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.workload.trace import F64


def equal(top: float, bins: int) -> F64:
    """Edges float64[bins + 1] of equal width from 0 to ``top``."""
    return np.linspace(0.0, max(top, 1.0), bins + 1)


def logarithmic(top: float, bins: int) -> F64:
    """Edges float64[bins + 1] from 0 to ``top``, equally far apart in log1p."""
    return np.expm1(np.linspace(0.0, np.log1p(max(top, 1.0)), bins + 1))


def centres(edges: F64) -> F64:
    """Middle of each bin."""
    return (edges[:-1] + edges[1:]) / 2.0


def place(edges: F64, values: Any) -> NDArray[np.int64]:
    """Bin of each value; those outside go to the first or the last."""
    found = np.searchsorted(edges, np.asarray(values, np.float64), side="right") - 1
    return np.clip(found, 0, len(edges) - 2).astype(np.int64)


def fall(edges: F64, tokens: float) -> F64:
    """Where the probability of each bin goes when ``tokens`` more have been generated, float64[bins, bins].

    Within a bin it is taken to be spread evenly; what would fall below 0 stays in the first bin. Rows sum to 1. With
    one token this is TRAIL's transition matrix for bins of one width.
    """
    low, high = edges[:-1] - tokens, edges[1:] - tokens
    top = np.minimum(high[:, None], edges[None, 1:])
    bottom = np.maximum(low[:, None], edges[None, :-1])
    share: F64 = np.maximum(top - bottom, 0.0) / (high - low)[:, None]
    share[:, 0] += np.clip(-low, 0.0, high - low) / (high - low)
    return share
