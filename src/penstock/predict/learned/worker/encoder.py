"""Training the auxiliary encoder from scratch; its form is :class:`penstock.predict.learned.baselines.encoder.Encoder`.

Pretrained weights, which TetriInfer and SSJF start from, are not to be had here.
"""

# mypy: disable-error-code="import-not-found"
# (torch lives in the engines' environment)

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from penstock.predict.learned.baselines.encoder import NORM_EPSILON, PAD, READS_BYTES, Encoder, as_bytes
from penstock.predict.learned.bins import place
from penstock.predict.learned.worker.fit import Fitted, fit
from penstock.workload.trace import F64

WIDTH: Final = 128
LAYERS: Final = 6
HEADS: Final = 4
BATCH: Final = 32
RATE: Final = 5e-4
MOST_EPOCHS: Final = 30
PATIENCE: Final = 5


def train_encoder(
    texts: Sequence[bytes],
    lengths: Any,
    valid_texts: Sequence[bytes],
    valid_lengths: Any,
    edges: F64,
    epochs: int,
    seed: int,
    tell: Callable[[int], None],
) -> tuple[Encoder, Fitted]:
    """Train one on prompts and output lengths [n].

    The loss is the cross-entropy of the bins plus the absolute error of log1p of the length; both outputs share the
    encoder, so that one training serves both forms of the baseline.
    """
    torch.manual_seed(seed)
    t = initial(len(edges))

    def loss_of(texts: Sequence[bytes], lengths: Any) -> Any:
        out = forward(t, HEADS, torch.from_numpy(as_bytes(texts)))
        bins = torch.from_numpy(place(edges, lengths))
        logs = torch.from_numpy(np.log1p(np.asarray(lengths, np.float32)))
        return functional.cross_entropy(out[:, :-1], bins) + (out[:, -1] - logs).abs().mean()

    def batches(source: Any) -> Iterable[Any]:
        # Like lengths together, so that little is filled up; ties are broken anew each epoch.
        sizes = np.array([len(text) for text in texts]) + source.random(len(texts))
        groups = np.array_split(np.argsort(sizes), -(-len(texts) // BATCH))
        return [groups[i] for i in source.permutation(len(groups))]

    def batch_loss(rows: Any) -> Any:
        return loss_of([texts[i] for i in rows.tolist()], lengths[rows])

    def valid_loss() -> float:
        order = np.argsort([len(text) for text in valid_texts])
        total = 0.0
        for rows in np.array_split(order, -(-len(order) // 128)):
            total += len(rows) * float(loss_of([valid_texts[i] for i in rows.tolist()], valid_lengths[rows]))
        return total / max(len(order), 1)

    done = fit(list(t.values()), batches, batch_loss, valid_loss, epochs, PATIENCE, seed, tell, RATE)
    return Encoder({name: tensor.detach().numpy() for name, tensor in t.items()}, HEADS), done


def initial(outputs: int, width: int = WIDTH, layers: int = LAYERS) -> dict[str, Any]:
    """Fresh tensors, drawn from torch's generator."""

    def linear(after: int, before: int) -> Any:
        return torch.randn(after, before) * before**-0.5

    def norm() -> Any:
        return torch.stack([torch.ones(width), torch.zeros(width)])

    t = {"embed": torch.randn(PAD + 1, width) * 0.1, "place": torch.randn(READS_BYTES, width) * 0.1}
    for i in range(layers):
        t |= {f"n{i}": norm(), f"qkv{i}": linear(3 * width, width), f"out{i}": linear(width, width) / layers**0.5}
        t |= {f"m{i}": norm(), f"up{i}": linear(4 * width, width), f"down{i}": linear(width, 4 * width) / layers**0.5}
    t |= {"norm": norm(), "head": linear(outputs, width) * 0.1, "bias": torch.zeros(outputs)}
    return {name: tensor.requires_grad_() for name, tensor in t.items()}


def forward(t: dict[str, Any], heads: int, ids: Any) -> Any:
    """Outputs float32[n, outputs] of ids int64[n, length]; the same as :class:`Encoder` in numpy."""
    n, length = ids.shape
    real = ids != PAD
    x = t["embed"][ids] + t["place"][:length]
    width = x.shape[-1]

    def norm(x: Any, scale_shift: Any) -> Any:
        return functional.layer_norm(x, (width,), scale_shift[0], scale_shift[1], NORM_EPSILON)

    for i in range(sum(name.startswith("qkv") for name in t)):
        qkv = (norm(x, t[f"n{i}"]) @ t[f"qkv{i}"].T).view(n, length, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        x = x + seen.transpose(1, 2).reshape(n, length, width) @ t[f"out{i}"].T
        x = x + functional.relu(norm(x, t[f"m{i}"]) @ t[f"up{i}"].T) @ t[f"down{i}"].T
    weight = real.float() / real.sum(1, keepdim=True)
    pooled = (norm(x, t["norm"]) * weight[:, :, None]).sum(1)
    return pooled @ t["head"].T + t["bias"]
