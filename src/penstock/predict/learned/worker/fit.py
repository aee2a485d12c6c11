"""Training loops: small networks, early stopping, the best epoch kept."""

# mypy: disable-error-code="import-not-found"
# (torch lives in the engines' environment)

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import nn

from penstock.predict.learned.mlp import Mlp

RATE: Final = 1e-3
WEIGHT_DECAY: Final = 1e-2
BATCH: Final = 1024
_SLOW_DOWN = 3  # epochs without progress after which the rate is halved
_ROWS = 65536


class Fitted(NamedTuple):
    """Best validation loss, and the epochs that were trained."""

    loss: float
    epochs: int


def fit(
    parameters: list[Any],
    batches: Callable[[Any], Iterable[Any]],
    loss: Callable[[Any], Any],
    valid_loss: Callable[[], float],
    epochs: int,
    patience: int,
    seed: int,
    tell: Callable[[int], None],
    rate: float = RATE,
) -> Fitted:
    """Train with AdamW until the validation loss has not fallen for ``patience`` epochs; the best epoch's values stay.

    Parameters
    ----------
    parameters : list of torch.Tensor
        What is trained, changed in place.
    batches : function
        Given a numpy generator, the row indices of an epoch's batches.
    loss : function
        Of a batch of rows, as a torch scalar.
    valid_loss : function
        Loss on the validation set.
    tell : function
        Called with the number of epochs done.
    """
    source = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)
    best, kept, since, epoch = float("inf"), copy.deepcopy([p.data for p in parameters]), 0, 0
    for epoch in range(1, epochs + 1):
        for rows in batches(source):
            optimizer.zero_grad(set_to_none=True)
            loss(rows).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        with torch.no_grad():
            now = valid_loss()
        tell(epoch)
        if now < best:
            best, since = now, 0
            kept = [p.data.clone() for p in parameters]
        else:
            since += 1
            if since >= patience:
                break
            if since % _SLOW_DOWN == 0:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
    for p, value in zip(parameters, kept, strict=True):
        p.data.copy_(value)
    return Fitted(best, epoch)


def perceptron(x: Any, widths: tuple[int, ...], outputs: int) -> tuple[Any, Any, Any]:
    """A network of torch for inputs like the rows of ``x``, and their mean and standard deviation, float32[in]."""
    sizes = (x.shape[1], *widths, outputs)
    layers: list[Any] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    total, squares = torch.zeros(x.shape[1], dtype=torch.double), torch.zeros(x.shape[1], dtype=torch.double)
    for part in x.split(_ROWS):
        wide = part.double()
        total += wide.sum(0)
        squares += (wide * wide).sum(0)
    mean = total / len(x)
    std = (squares / len(x) - mean * mean).clamp(min=0).sqrt()
    std[std < 1e-6] = 1.0
    return nn.Sequential(*layers[:-1]), mean.float(), std.float()


def train_perceptron(
    x: Any,
    y: Any,
    valid_x: Any,
    valid_y: Any,
    widths: tuple[int, ...],
    outputs: int,
    loss: Callable[[Any, Any], Any],
    epochs: int,
    patience: int,
    seed: int,
    tell: Callable[[int], None],
) -> tuple[Mlp, Fitted]:
    """Train one on inputs [n, in] of any float type and targets [n, ...]; ``loss`` takes outputs and targets."""
    torch.manual_seed(seed)
    net, mean, std = perceptron(x, widths, outputs)

    def run(rows: Any) -> Any:
        return net((rows.float() - mean) / std)

    def batches(source: Any) -> Iterable[Any]:
        order: Any = torch.from_numpy(source.permutation(len(x)))
        return list(order.split(BATCH))

    def valid_loss() -> float:
        parts = zip(valid_x.split(_ROWS), valid_y.split(_ROWS), strict=True)
        return sum(float(loss(run(a), b)) * len(a) for a, b in parts) / max(len(valid_x), 1)

    def batch_loss(rows: Any) -> Any:
        return loss(run(x[rows]), y[rows])

    done = fit(list(net.parameters()), batches, batch_loss, valid_loss, epochs, patience, seed, tell)
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    weights = tuple(layer.weight.detach().numpy() for layer in linear)
    biases = tuple(layer.bias.detach().numpy() for layer in linear)
    return Mlp(mean.numpy(), std.numpy(), weights, biases), done
