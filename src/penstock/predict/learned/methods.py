"""All predictors of a work folder, ready to be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.errors import PenstockError
from penstock.predict.learned.baselines.base import Method
from penstock.predict.learned.baselines.encoder import AuxiliaryEncoder, Encoder
from penstock.predict.learned.baselines.history import ConditionalHistory
from penstock.predict.learned.baselines.median import MedianLength
from penstock.predict.learned.baselines.oracle import SimulatedNoise
from penstock.predict.learned.baselines.probe import HeadMedian, PaperHead
from penstock.predict.learned.baselines.prompt import EntropyPooled, PromptState
from penstock.predict.learned.baselines.trail import BayesBins
from penstock.predict.learned.files import rivals_folder
from penstock.predict.learned.head import Head
from penstock.predict.learned.mlp import mlp_of
from penstock.predict.learned.samples import Part, Samples
from penstock.predict.learned.tensors import F32, read_tensors
from penstock.workload.trace import F64

Tensors = dict[str, F32]
Note = dict[str, Any]


def all_methods(work: str | Path, head: Head, samples: Samples) -> list[Method]:
    """The head first, then whatever of its rivals the folder has, then those that need no training.

    Raises
    ------
    PenstockError
        A file of a rival is damaged, or belongs to another model's samples.
    """
    lengths = samples.output_tokens[samples.part == Part.TRAIN]
    found: list[Method] = [HeadMedian(head)]
    for name, make in _TRAINED:
        path = rivals_folder(work) / f"{name}.safetensors"
        if not path.exists():
            continue
        tensors, note = read_tensors(path)
        try:
            made = make(tensors, note)
        except (KeyError, TypeError, ValueError) as error:
            raise PenstockError(f"{path} is no {name} network ({error!r})", "train it anew") from None
        found += made
    if len(lengths):
        found += [ConditionalHistory(lengths), ConditionalHistory(lengths, 0.5), MedianLength(lengths)]
    return [*found, SimulatedNoise()]


def _edges(note: Note) -> F64:
    return np.asarray(note["edges"], np.float64)


def _encoders(tensors: Tensors, note: Note) -> list[Method]:
    encoder = Encoder(tensors, int(note["heads"]))
    return [AuxiliaryEncoder(encoder, _edges(note), classify) for classify in (False, True)]


_TRAINED: tuple[tuple[str, Callable[[Tensors, Note], list[Method]]], ...] = (
    ("paper", lambda t, note: [PaperHead(mlp_of(t), float(note["unit"]))]),
    ("trail", lambda t, note: [BayesBins(mlp_of(t), _edges(note), "TRAIL, 10 equal bins")]),
    ("trail-log", lambda t, note: [BayesBins(mlp_of(t), _edges(note), "TRAIL, 20 log bins")]),
    ("egtp", lambda t, note: [EntropyPooled(mlp_of(t), _edges(note))]),
    ("prompt", lambda t, note: [PromptState(mlp_of(t))]),
    ("encoder", _encoders),
)
