"""What is learnt from: hidden states along the outputs of many requests, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError
from penstock.workload.trace import F64

FILE: Final = "samples.npz"
SHARES: Final = (0.70, 0.15, 0.15)
"""Of the requests, for training, validation and test (STAR)."""

I32 = NDArray[np.int32]


class Part(IntEnum):
    """Which part of the requests."""

    TRAIN = 0
    VALID = 1
    TEST = 2


class About(msgspec.Struct, frozen=True):
    """Where samples come from. ``model`` is the fingerprint, ``every`` the stride in tokens, ``temperature`` 0 means
    greedy. ``cut`` requests did not end within ``longest`` tokens and were left out; of ``requests`` that were kept,
    ``verified`` had a known answer which one pass showed to be the greedy one.
    """

    model: str
    name: str
    every: int
    seed: int
    temperature: float
    longest: int
    requests: int
    verified: int
    cut: int


class Samples(NamedTuple):
    """Requests, and samples that point to them; those of a request follow each other, in the order of its output.

    ``prompt_tokens``, ``output_tokens`` (end of text included), ``part`` (a :class:`Part`), ``family`` (index into
    ``families``): int32[n]. ``pooled`` float16[n, d]: the prompt's states, weighted by the softmax of the entropies
    that they predict with (EGTP). ``texts``: the prompts as UTF-8.

    ``request``, ``generated`` int32[m]: whose sample, and its output tokens so far; 0 is the last prompt token.
    ``entropy`` float32[m]: of the next token, in nats. ``hidden`` float16[m, d]: the state that the model's output
    layer gets (after the final norm).
    """

    about: About
    families: tuple[str, ...]
    prompt_tokens: I32
    output_tokens: I32
    part: I32
    family: I32
    pooled: Any
    texts: tuple[bytes, ...]
    request: I32
    generated: I32
    entropy: NDArray[np.float32]
    hidden: Any

    @property
    def remaining(self) -> F64:
        """Tokens still to come, float64[m]: the label. At least 1."""
        return (self.output_tokens[self.request] - self.generated).astype(np.float64)

    def of(self, part: Part) -> Samples:
        """The requests of one part, numbered anew, and their samples."""
        return self.some(self.part == part)

    def some(self, requests: NDArray[np.bool_]) -> Samples:
        """The requests with True in bool[n], numbered anew, and their samples."""
        kept = np.flatnonzero(requests)
        number = np.cumsum(requests, dtype=np.int32) - 1
        mine = requests[self.request]
        return self._replace(
            prompt_tokens=self.prompt_tokens[kept],
            output_tokens=self.output_tokens[kept],
            part=self.part[kept],
            family=self.family[kept],
            pooled=self.pooled[kept],
            texts=tuple(self.texts[i] for i in kept.tolist()),
            request=number[self.request[mine]].astype(np.int32),
            generated=self.generated[mine],
            entropy=self.entropy[mine],
            hidden=self.hidden[mine],
        )

    def rows(self, rows: NDArray[np.intp]) -> Samples:
        """Only these samples; the requests stay as they are."""
        return self._replace(
            request=self.request[rows],
            generated=self.generated[rows],
            entropy=self.entropy[rows],
            hidden=self.hidden[rows],
        )


def positions(output_tokens: int, every: int, offset: int = 0) -> list[int]:
    """Output tokens so far at which a request is sampled: 0, 1, and where (so many + ``offset``) % ``every`` is 0.

    Engines predict at an offset of each request's own, so that not all ask in the same step; and outputs that are made
    of pieces of one width must not be seen at one place of the piece only.
    """
    return [g for g in range(output_tokens) if g <= 1 or (g + offset) % every == 0]


def split(keys: Sequence[str], seed: int, shares: tuple[float, float, float] = SHARES) -> I32:
    """Deal out requests to the parts, int32[n].

    Requests with the same key (the same question) go to the same part, so that no part knows an answer of another.
    """
    names = sorted(set(keys))
    order = np.random.default_rng(seed).permutation(len(names))
    ends = np.round(np.cumsum(shares) / sum(shares) * len(names))
    where = np.empty(len(names), np.int32)
    where[order] = np.searchsorted(ends, np.arange(len(names)), side="right")
    part = dict(zip(names, where.tolist(), strict=True))
    return np.array([part[key] for key in keys], np.int32)


def save_samples(folder: str | Path, samples: Samples) -> None:
    """Write ``samples.npz`` into a folder, made if need be; whole or not at all. Raises PenstockError."""
    home = Path(folder)
    said = msgspec.json.encode((samples.about, samples.families))
    sizes = np.array([len(text) for text in samples.texts], np.int32)
    arrays = {name: value for name, value in samples._asdict().items() if name not in ("about", "families", "texts")}
    draft = home / f".{FILE}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.savez(
                file,
                about=np.frombuffer(said, np.uint8),
                text=np.frombuffer(b"".join(samples.texts), np.uint8),
                text_size=sizes,
                **arrays,
            )
        draft.replace(home / FILE)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise PenstockError(f"cannot write samples to {home} ({error.strerror})", "give a path you may write") from None


def load_samples(folder: str | Path, model: str | None = None) -> Samples:
    """Read ``samples.npz``.

    Raises
    ------
    PenstockError
        There is none, it is damaged, or it is of another model than the one with the fingerprint ``model``.
    """
    path = Path(folder) / FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
        about, families = msgspec.json.decode(columns.pop("about").tobytes(), type=tuple[About, tuple[str, ...]])
        ends = np.cumsum(columns.pop("text_size")).tolist()
        text = columns.pop("text").tobytes()
        texts = tuple(text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
        found = Samples(about=about, families=families, texts=texts, **columns)
    except FileNotFoundError:
        raise PenstockError(f"no samples in {folder}", "make some with `penstock predictor collect`") from None
    except Exception as error:  # numpy raises whatever the damage leads to
        raise PenstockError(f"cannot read {path} ({type(error).__name__}: {error})", "collect anew") from None
    if model is not None and about.model != model:
        raise PenstockError(
            f"the samples in {folder} are of model {about.model}, this model is {model}", "give another --out"
        )
    return found
