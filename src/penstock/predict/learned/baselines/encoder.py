"""A separate encoder that reads the prompt, as TetriInfer's OPT-125M and SSJF's BERT do; here small and in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.predict.learned.baselines.base import TotalLength
from penstock.predict.learned.bins import centres
from penstock.predict.learned.samples import Samples
from penstock.predict.learned.softmax import softmax
from penstock.predict.learned.tensors import F32
from penstock.workload.trace import F64

PAD: Final = 256
"""The token after the 256 bytes: nothing."""

READS_BYTES: Final = 512
"""Longer prompts are read from the end (SSJF keeps the last 512 tokens)."""

NORM_EPSILON: Final = 1e-5
_BATCH = 64


class Encoder(NamedTuple):
    """A transformer encoder on bytes: learnt positions, norm before each part, ReLU, mean over the bytes.

    ``tensors``: embed [257, d], place [512, d]; for each layer i: n{i} and m{i} (scale and shift [2, d] of the norms),
    qkv{i} [3d, d], out{i} [d, d], up{i} [4d, d], down{i} [d, 4d]; norm [2, d], head [outputs, d], bias [outputs].
    """

    tensors: Mapping[str, F32]
    heads: int

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(name.startswith("qkv") for name in self.tensors)

    def __call__(self, texts: Sequence[bytes]) -> F32:
        """Outputs float32[n, outputs] of prompts."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        found = np.empty((len(texts), self.tensors["bias"].size), np.float32)
        for at in range(0, len(order), _BATCH):
            rows = order[at : at + _BATCH]
            found[rows] = self._batch(as_bytes([texts[row] for row in rows]))
        return found

    def _batch(self, ids: NDArray[np.int64]) -> Any:
        t, (n, length), heads = self.tensors, ids.shape, self.heads
        real = ids != PAD
        hide = np.where(real, np.float32(0.0), np.float32(-1e9))[:, None, None, :]
        x = t["embed"][ids] + t["place"][:length]
        width = x.shape[-1]
        for i in range(self.layers):
            qkv = (_norm(x, t[f"n{i}"]) @ t[f"qkv{i}"].T).reshape(n, length, 3, heads, width // heads)
            q, k, v = qkv.transpose(2, 0, 3, 1, 4)
            seen = softmax(q @ k.swapaxes(-1, -2) * np.float32((width // heads) ** -0.5) + hide) @ v
            x = x + seen.swapaxes(1, 2).reshape(n, length, width) @ t[f"out{i}"].T
            x = x + np.maximum(_norm(x, t[f"m{i}"]) @ t[f"up{i}"].T, 0.0) @ t[f"down{i}"].T
        weight = real[:, :, None] / real.sum(axis=1)[:, None, None]
        pooled = (_norm(x, t["norm"]) * weight.astype(np.float32)).sum(axis=1)
        return pooled @ t["head"].T + t["bias"]


def as_bytes(texts: Sequence[bytes]) -> NDArray[np.int64]:
    """Ids int64[n, longest], padded with :data:`PAD`; an empty prompt is one zero byte."""
    kept = [text[-READS_BYTES:] or b"\0" for text in texts]
    ids = np.full((len(kept), max(map(len, kept), default=1)), PAD, np.int64)
    for row, text in enumerate(kept):
        ids[row, : len(text)] = np.frombuffer(text, np.uint8)
    return ids


class AuxiliaryEncoder(TotalLength):
    """The encoder's outputs are the logits of length bins and, last, log1p of the length.

    Parameters
    ----------
    encoder : Encoder
        With ``len(edges)`` outputs.
    edges : float64[bins + 1]
        Of the bins, in tokens (TetriInfer: 200 wide).
    classify : bool
        Predict the middle of the likeliest bin, as TetriInfer; else the regression, as SSJF's best.
    """

    reads = "prompt text"

    def __init__(self, encoder: Encoder, edges: F64, classify: bool) -> None:
        self.name = f"auxiliary encoder, {'bins' if classify else 'regression'}"
        self.encoder, self._centres, self._classify = encoder, centres(edges), classify
        self.parameters = encoder.parameters

    def total(self, samples: Samples, requests: Any) -> F64:
        """See :class:`TotalLength`."""
        said = self.encoder([samples.texts[i] for i in np.asarray(requests).tolist()]).astype(np.float64)
        if self._classify:
            likeliest: F64 = self._centres[np.argmax(said[:, :-1], axis=1)]
            return likeliest
        length: F64 = np.expm1(np.minimum(said[:, -1], 20.0))
        return length


def _norm(x: Any, scale_shift: F32) -> Any:
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(NORM_EPSILON))
    return centred / spread * scale_shift[0] + scale_shift[1]
