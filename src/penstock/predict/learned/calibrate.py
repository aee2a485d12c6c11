"""Shifts that make a head's quantiles true on requests that it was not trained on."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.predict.learned.tensors import F32


def shifts(predicted: Any, target: Any, quantiles: tuple[float, ...]) -> F32:
    """What to add to each quantile so that its share of the targets is at or below it.

    The split-conformal choice: with n targets, the ceil((n + 1) q)-th smallest residual, so that the coverage of one
    more target is at least q if it is like the others. Targets of one request hang together, so this holds for samples
    as they come, not for each request.

    Parameters
    ----------
    predicted : float[n, q]
        Quantiles in the space where the shift is to be added.
    target : float[n]
        What came, in the same space.
    quantiles : tuple of float
        Levels, each in (0, 1).

    Returns
    -------
    float32[q]
        Zeros where there is no target.
    """
    found = np.zeros(len(quantiles), np.float32)
    n = len(target)
    if n == 0:
        return found
    for k, q in enumerate(quantiles):
        residuals = np.sort(np.asarray(target, np.float64) - np.asarray(predicted)[:, k])
        found[k] = residuals[min(int(np.ceil((n + 1) * q)), n) - 1]
    return found
