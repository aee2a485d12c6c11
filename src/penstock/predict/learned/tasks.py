"""What the worker is asked to do, and what it says meanwhile: JSON on its stdin, lines of JSON on its stdout."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from penstock.predict.learned.head import EVERY, QUANTILES

Tell = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""


class Collect(msgspec.Struct, tag="collect", frozen=True, forbid_unknown_fields=True):
    """Make samples.

    ``model`` is a folder in the Hugging Face layout, ``out`` the folder for ``samples.npz``. Without ``prompts`` (a
    JSONL file) the prompts are ``requests`` puzzles of :mod:`penstock.workload.problems`, of which ``chat_share`` in
    the model's chat template. ``temperature`` 0 means greedy. Outputs longer than ``longest`` tokens are left out.
    ``threads`` 0 leaves that to torch.
    """

    model: str
    out: str
    requests: int
    seed: int = 0
    prompts: str | None = None
    temperature: float = 0.0
    every: int = EVERY
    longest: int = 4096
    chat_share: float = 0.3
    threads: int = 0


class Train(msgspec.Struct, tag="train", frozen=True, forbid_unknown_fields=True):
    """Train a head on the samples in ``out``, and with ``rivals`` the networks that it is compared with.

    ``features`` is that of the head. Training ends after ``epochs``, or ``patience`` epochs without a better
    validation loss.
    """

    out: str
    name: str = "remaining"
    seed: int = 0
    quantiles: tuple[float, ...] = QUANTILES
    features: int = 0
    rivals: bool = True
    epochs: int = 100
    patience: int = 10
    threads: int = 0


Task = Collect | Train


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """So much of the current part is done."""

    what: str
    done: int
    total: int


class Done(msgspec.Struct, tag="done", frozen=True):
    """The task is done; lines for the user."""

    notes: list[str]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """A problem that the user can mend."""

    problem: str
    remedy: str


Said = Progress | Done | Failed
