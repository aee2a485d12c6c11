"""A predictor head with random weights: what tests and measurements of the plugin need is that it is computed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from penstock.live.plugin.penstock_engine.fingerprint import fingerprint
from penstock.predict.learned.head import Head, save_head
from penstock.predict.learned.mlp import Mlp
from penstock.predict.learned.tensors import F32


def random_head(
    folder: Path,
    model: Path,
    widths: Sequence[int] = (64,),
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9),
    features: int = 1,
) -> Head:
    """Write a head with hidden layers of ``widths`` for the model in a folder, and return it. The same every time."""
    config: dict[str, Any] = msgspec.json.decode((model / "config.json").read_bytes())
    source = np.random.default_rng(1)

    def numbers(*shape: int) -> F32:
        return np.asarray(source.standard_normal(shape) / shape[-1] ** 0.5, dtype=np.float32)

    sizes = [int(config["hidden_size"]) + features, *widths, len(quantiles)]
    weights = tuple(numbers(out, into) for into, out in itertools.pairwise(sizes))
    biases = (*(numbers(width) for width in widths), 3 + numbers(len(quantiles)))
    mlp = Mlp(numbers(sizes[0]), 1 + numbers(sizes[0]) ** 2, weights, biases)
    head = Head(mlp, numbers(len(quantiles)), quantiles, fingerprint(model), "random", 20, features, {})
    save_head(folder, head)
    return head
