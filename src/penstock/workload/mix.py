"""Traffic of several SLO classes with lengths of their own, as a service that sells several has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.workload.lengths import Lengths, length_profile
from penstock.workload.trace import I64


@dataclass(frozen=True)
class ClassOfRequests:
    """One SLO class: its share of the requests, their lengths (a profile or ``LOW-HIGH/LOW-HIGH``), its targets."""

    name: str
    share: float
    lengths: str
    slo: Slo


@dataclass(frozen=True)
class MixedLengths:
    """Lengths of several classes, each request of a class drawn by share."""

    classes: tuple[ClassOfRequests, ...]

    def __post_init__(self) -> None:
        if not self.classes or min(c.share for c in self.classes) <= 0:
            raise PenstockError("a mix of classes has an empty class", "give each class a share above 0")

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in order."""
        return tuple(c.name for c in self.classes)

    @property
    def slos(self) -> dict[str, Slo]:
        """The targets of each class."""
        return {c.name: c.slo for c in self.classes}

    def sample(self, n: int, rng: np.random.Generator) -> tuple[I64, I64]:
        """``n`` pairs, see ``Lengths``."""
        prompt, output, _ = self.sample_classes(n, rng)
        return prompt, output

    def sample_classes(self, n: int, rng: np.random.Generator) -> tuple[I64, I64, NDArray[np.int16]]:
        """``n`` pairs and the class of each, an index into ``names``: int64[n], int64[n], int16[n]."""
        share = np.cumsum([c.share for c in self.classes])
        index = np.minimum(np.searchsorted(share / share[-1], rng.random(n), side="right"), len(share) - 1)
        prompt, output = np.ones(n, np.int64), np.ones(n, np.int64)
        for i, one in enumerate(self.classes):
            mine = np.flatnonzero(index == i)
            lengths: Lengths = length_profile(one.lengths)
            prompt[mine], output[mine] = lengths.sample(len(mine), rng)
        return prompt, output, index.astype(np.int16)


MULTI_CLASS: Final = MixedLengths(
    (
        ClassOfRequests("chat-tight", 0.3, "sharegpt", Slo(0.5, 0.02)),
        ClassOfRequests("chat", 0.4, "azure-conv", Slo(1.0, 0.05)),
        ClassOfRequests("reasoning", 0.05, "100-1000/500-4000", Slo(2.0, 0.03)),
        ClassOfRequests("batch", 0.25, "azure-code", Slo(10.0, 0.1)),
    )
)
"""Two tiers of chat, long answers that want a pace, and work nobody waits for. The classes after PolyServe's idea
(arXiv 2507.17769: several TPOT tiers on one cluster); shares, lengths of ``reasoning`` and targets are ours."""
