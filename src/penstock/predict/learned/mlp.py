"""A multilayer perceptron in numpy: what every small network here is at inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from penstock.core.errors import PenstockError
from penstock.predict.learned.tensors import F32


class Mlp(NamedTuple):
    """Standardise, then linear layers with ReLU between them.

    ``mean`` and ``std`` are float32[in]; ``weights`` are float32[out, in] a layer (torch's layout), ``biases``
    float32[out].
    """

    mean: F32
    std: F32
    weights: tuple[F32, ...]
    biases: tuple[F32, ...]

    def __call__(self, x: Any) -> F32:
        """Outputs float32[n, out] of inputs [n, in] of any float type."""
        h: F32 = (np.asarray(x, dtype=np.float32) - self.mean) / self.std
        last = len(self.weights) - 1
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = h @ w.T + b
            if i < last:
                np.maximum(h, 0.0, out=h)
        return h

    @property
    def parameters(self) -> int:
        """Trained numbers: weights and biases."""
        return sum(w.size for w in self.weights) + sum(b.size for b in self.biases)

    def tensors(self) -> dict[str, F32]:
        """By the names of the file format: mean, std, w0, b0, w1, ..."""
        named = {"mean": self.mean, "std": self.std}
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            named |= {f"w{i}": w, f"b{i}": b}
        return named


def mlp_of(tensors: Mapping[str, F32]) -> Mlp:
    """The network of such tensors; others are ignored.

    Raises
    ------
    PenstockError
        One is missing, or two do not fit together.
    """
    layers = sum(name[0] == "w" and name[1:].isdigit() for name in tensors)
    try:
        weights = tuple(tensors[f"w{i}"] for i in range(layers))
        found = Mlp(tensors["mean"], tensors["std"], weights, tuple(tensors[f"b{i}"] for i in range(layers)))
    except KeyError as error:
        raise PenstockError(f"a network without its tensor {error}", "train it anew") from None
    width = found.mean.size
    for w, b in zip(found.weights, found.biases, strict=True):
        if w.shape != (b.size, width):
            raise PenstockError(f"layers that do not fit together ({w.shape} after {width})", "train it anew")
        width = b.size
    if not layers or found.std.size != found.mean.size:
        raise PenstockError("a network without layers, or of an input without scale", "train it anew")
    return found
