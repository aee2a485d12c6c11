"""Train the head and its rivals on collected samples."""

# mypy: disable-error-code="import-not-found"
# (torch lives in the engines' environment)

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from penstock.core.errors import PenstockError
from penstock.predict.learned.bins import centres, equal, logarithmic, place
from penstock.predict.learned.calibrate import shifts
from penstock.predict.learned.files import head_folder, rivals_folder
from penstock.predict.learned.head import Head, middle_of, save_head, with_features
from penstock.predict.learned.mlp import Mlp
from penstock.predict.learned.samples import Part, Samples, load_samples
from penstock.predict.learned.tasks import Tell, Train
from penstock.predict.learned.tensors import F32, write_tensors
from penstock.predict.learned.worker.encoder import MOST_EPOCHS, train_encoder
from penstock.predict.learned.worker.fit import Fitted, train_perceptron
from penstock.predict.learned.worker.losses import absolute, cross_entropy, pinball, soft_bins

TRAIL_BINS: Final = 10
TRAIL_WIDTHS: Final = (512,)
"""TRAIL's probe: one hidden layer of 512, 10 bins."""

LOG_BINS: Final = 20
EGTP_BINS: Final = 20
BUCKET_TOKENS: Final = 200.0
"""Width of TetriInfer's length ranges."""


class _Data(NamedTuple):
    """Training and validation requests, and the settings that all trainings share."""

    train: Samples
    valid: Samples
    task: Train
    tell: Tell

    def perceptron(
        self,
        name: str,
        pick: Callable[[Samples], tuple[Any, Any]],
        widths: tuple[int, ...],
        outputs: int,
        loss: Callable[[Any, Any], Any],
    ) -> tuple[Mlp, Fitted]:
        """Train one on what ``pick`` takes from samples: inputs and targets, as numpy."""
        x, y = (torch.from_numpy(np.ascontiguousarray(part)) for part in pick(self.train))
        valid_x, valid_y = (torch.from_numpy(np.ascontiguousarray(part)) for part in pick(self.valid))
        t = self.task
        return train_perceptron(
            x, y, valid_x, valid_y, widths, outputs, loss, t.epochs, t.patience, t.seed,
            lambda epoch: self.tell(f"training {name}", epoch, t.epochs),
        )  # fmt: skip


def widths_for(hidden_size: int) -> tuple[int, ...]:
    """Hidden layers: the paper's for a model of its size (3,584), less for small ones, where they would be larger than
    a layer of the model itself.
    """
    return (2048, 512, 64) if hidden_size > 1024 else (2 * hidden_size, max(hidden_size // 2, 1))


def train(task: Train, tell: Tell) -> list[str]:
    """Do it, and write the networks; returns a line for each.

    Raises
    ------
    PenstockError
        There are no samples, or too few requests.
    """
    samples = load_samples(task.out)
    data = _Data(samples.of(Part.TRAIN), samples.of(Part.VALID), task, tell)
    if not len(data.train.request) or not len(data.valid.request):
        raise PenstockError(
            f"{samples.about.requests} requests are too few to train and validate on", "collect more (--requests)"
        )
    head, done = _head(data)
    save_head(head_folder(task.out), head)
    notes = [_note("head", head.parameters, done)]
    if task.rivals:
        notes += _rivals(data)
    return notes


def _head(data: _Data) -> tuple[Head, Fitted]:
    task, about = data.task, data.train.about
    widths = widths_for(data.train.hidden.shape[1])

    def pick(s: Samples) -> tuple[Any, Any]:
        return with_features(s.hidden, s.generated, task.features), np.log1p(s.remaining).astype(np.float32)

    loss = pinball(task.quantiles, float(data.train.remaining.mean()))
    mlp, done = data.perceptron("head", pick, widths, len(task.quantiles), loss)
    trained = {
        "requests": len(data.train.output_tokens),
        "samples": len(data.train.request),
        "validation_requests": len(data.valid.output_tokens),
        "validation_loss": done.loss,
        "epochs": done.epochs,
        "seed": task.seed,
        "temperature": about.temperature,
        "serving_model": about.name,
    }
    raw = Head(mlp, np.zeros(len(task.quantiles), np.float32), task.quantiles, about.model, task.name, about.every,
               task.features, trained)  # fmt: skip
    logs = raw.logs(data.valid.hidden, data.valid.generated)
    trained["validation_mae_tokens"] = float(
        np.abs(np.expm1(logs[:, middle_of(task.quantiles)]) - data.valid.remaining).mean()
    )
    return raw._replace(scale=shifts(logs, np.log1p(data.valid.remaining), task.quantiles)), done


def _rivals(data: _Data) -> list[str]:
    lengths = data.train.output_tokens.astype(np.float64)
    unit, top = float(data.train.remaining.mean()), float(lengths.max())
    wide = widths_for(data.train.hidden.shape[1])
    notes = []

    def keep(name: str, tensors: Mapping[str, F32], done: Fitted, size: int, **note: Any) -> None:
        rivals_folder(data.task.out).mkdir(exist_ok=True)
        write_tensors(rivals_folder(data.task.out) / f"{name}.safetensors", tensors, note)
        notes.append(_note(name, size, done))

    mlp, done = data.perceptron(
        "paper's head", lambda s: (s.hidden, (s.remaining / unit).astype(np.float32)), wide, 1, absolute
    )
    keep("paper", mlp.tensors(), done, mlp.parameters, unit=unit)
    for name, edges in (("trail", equal(top, TRAIL_BINS)), ("trail-log", logarithmic(top, LOG_BINS))):
        pick = _binned(edges)
        mlp, done = data.perceptron(name, pick, TRAIL_WIDTHS, len(edges) - 1, cross_entropy)
        keep(name, mlp.tensors(), done, mlp.parameters, edges=edges.tolist())
    mlp, done = data.perceptron("prompt-only MLP", _first, wide, 1, pinball((0.5,)))
    keep("prompt", mlp.tensors(), done, mlp.parameters)
    edges = equal(top, EGTP_BINS)
    middles = torch.from_numpy(centres(edges).astype(np.float32))
    mlp, done = data.perceptron(
        "EGTP", lambda s: (s.pooled, s.output_tokens.astype(np.float32)), TRAIL_WIDTHS, EGTP_BINS,
        soft_bins(middles, float(edges[1])),
    )  # fmt: skip
    keep("egtp", mlp.tensors(), done, mlp.parameters, edges=edges.tolist())
    edges = np.arange(0.0, top + BUCKET_TOKENS, BUCKET_TOKENS)
    epochs = min(data.task.epochs, MOST_EPOCHS)
    encoder, done = train_encoder(
        data.train.texts, data.train.output_tokens, data.valid.texts, data.valid.output_tokens, edges, epochs,
        data.task.seed, lambda epoch: data.tell("training auxiliary encoder", epoch, epochs),
    )  # fmt: skip
    keep("encoder", encoder.tensors, done, encoder.parameters, edges=edges.tolist(), heads=encoder.heads)
    return notes


def _binned(edges: Any) -> Callable[[Samples], tuple[Any, Any]]:
    return lambda s: (s.hidden, place(edges, s.remaining))


def _first(s: Samples) -> tuple[Any, Any]:
    rows = np.flatnonzero(s.generated == 0)
    return s.hidden[rows], np.log1p(s.remaining[rows]).astype(np.float32)


def _note(name: str, parameters: int, done: Fitted) -> str:
    return f"{name}: {parameters:,} parameters, {done.epochs} epochs, validation loss {done.loss:.4g}"
