"""How wrong a predictor is, in the two numbers that the simulated one takes."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from penstock.workload.trace import F64

MOST_HALVING: Final = 1e6
"""Tokens; more means that the relative error does not fall."""

_SIGMA = (0.01, 3.0)
_HALVING = (10.0, MOST_HALVING)


class Noise(NamedTuple):
    """``sigma_first`` and ``halving_tokens`` of :class:`penstock.predict.simulated.NoisyOracle`, and the mean absolute
    error in tokens that they lead to in each class of tokens generated.
    """

    sigma_first: float
    halving_tokens: float
    by_generated: list[float | None]


def relative_error(sigma: Any) -> F64:
    """``E|exp(sigma Z) - 1|`` for a standard normal ``Z``: the mean absolute error as a share of the truth."""
    from scipy.special import erf

    found: F64 = np.exp(np.square(sigma) / 2.0) * erf(np.asarray(sigma) / np.sqrt(2.0))
    return found


def fit_noise(errors: F64, remaining: F64, generated: F64, group: Any, groups: int) -> Noise:
    """Fit the simulated predictor's error to a real one's (ours).

    Each class of tokens generated counts by its predictions; the squared difference of mean errors is least.

    Parameters
    ----------
    errors, remaining, generated : float64[n]
        Absolute error, true remaining tokens and tokens generated of each prediction.
    group : int[n]
        Class of each prediction, 0 to ``groups`` - 1.
    """
    from scipy.optimize import minimize

    counts = np.bincount(group, minlength=groups).astype(np.float64)
    real = np.bincount(group, weights=errors, minlength=groups)
    inverse = np.divide(1.0, counts, out=np.zeros(groups), where=counts > 0)

    def means(sigma: float, halving: float) -> F64:
        made = remaining * relative_error(sigma / (1.0 + generated / halving))
        return inverse * np.bincount(group, weights=made, minlength=groups)

    def miss(logs: Any) -> float:
        return float(counts @ np.square(means(*np.exp(logs)) - real * inverse))

    low, high = np.log([_SIGMA[0], _HALVING[0]]), np.log([_SIGMA[1], _HALVING[1]])
    bounds = list(zip(low, high, strict=True))
    found: Any = minimize(miss, (low + high) / 2, method="Nelder-Mead", bounds=bounds)
    sigma, halving = (float(x) for x in np.exp(found.x))
    fitted = means(sigma, halving)
    return Noise(sigma, halving, [float(x) if n else None for x, n in zip(fitted, counts, strict=True)])
