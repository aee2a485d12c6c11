"""Losses of the heads."""

# mypy: disable-error-code="import-not-found"
# (torch lives in the engines' environment)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

_MOST_LOG = 12.0  # of log1p(tokens): 160,000


def rising(z: Any) -> Any:
    """Outputs [n, q] made rising, as :func:`penstock.predict.learned.head.rising`."""
    return torch.cat([z[:, :1], functional.softplus(z[:, 1:])], 1).cumsum(1)


def pinball(quantiles: tuple[float, ...], unit: float | None = None) -> Callable[[Any, Any], Any]:
    """Mean pinball loss of outputs [n, q], made rising, for targets [n]; its minimum is at the targets' quantiles.

    For one level of one half it is half of the absolute error. With ``unit``, outputs and targets are log1p of tokens,
    and the pinball loss of the tokens, in units of so many, is added. Quantiles stay quantiles under log1p, so both
    parts have the same minimum; the first makes short remainders right, the second long ones (ours).
    """
    levels = torch.tensor(quantiles)

    def mean(over: Any) -> Any:
        return torch.maximum(levels * over, (levels - 1.0) * over).mean()

    def loss(z: Any, target: Any) -> Any:
        y, t = rising(z), target[:, None]
        if unit is None:
            return mean(t - y)
        # Far beyond anything there is the second part would be all that counts.
        return mean(t - y) + mean(torch.expm1(t) - torch.expm1(y.clamp(max=_MOST_LOG))) / unit

    return loss


def absolute(z: Any, target: Any) -> Any:
    """Mean absolute error of outputs [n, 1] (L1, as in STAR/ARES)."""
    return (z[:, 0] - target).abs().mean()


def cross_entropy(z: Any, target: Any) -> Any:
    """Mean cross-entropy of logits [n, bins] and bins int64[n]."""
    return functional.cross_entropy(z, target)


def soft_bins(centres: Any, width: float, share: float = 0.95) -> Callable[[Any, Any], Any]:
    """EGTP's loss: cross-entropy against labels that fade by e a bin, and the square error of the expected value.

    Parameters
    ----------
    centres : float32[bins]
        Middles of the bins, in tokens.
    width : float
        Of a bin: the unit of the square error, which would else outweigh the rest by far (ours).
    share : float
        Weight of the cross-entropy; the paper's 0.95.
    """
    bins = torch.arange(len(centres))

    def loss(z: Any, length: Any) -> Any:
        mine = (length[:, None] - centres).abs().argmin(1)
        soft = torch.softmax(-(bins - mine[:, None]).abs().float(), 1)
        off = (torch.softmax(z, 1) @ centres - length) / width
        return share * functional.cross_entropy(z, soft) + (1.0 - share) * (off * off).mean()

    return loss
