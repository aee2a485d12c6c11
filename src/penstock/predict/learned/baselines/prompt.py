"""Length once and for all from the serving model's states of the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.predict.learned.baselines.base import TotalLength
from penstock.predict.learned.bins import centres
from penstock.predict.learned.mlp import Mlp
from penstock.predict.learned.samples import Samples
from penstock.predict.learned.softmax import softmax
from penstock.workload.trace import F64


class PromptState(TotalLength):
    """A network on the state of the last prompt token; its output is log1p of the length."""

    name = "prompt-only MLP"
    reads = "last prompt state"

    def __init__(self, mlp: Mlp) -> None:
        self.mlp = mlp
        self.parameters = mlp.parameters

    def total(self, samples: Samples, requests: Any) -> F64:
        """See :class:`TotalLength`; 0 for a request whose prompt state is not among the samples."""
        found = np.zeros(len(samples.output_tokens))
        first = np.flatnonzero((samples.generated == 0) & np.isin(samples.request, requests))
        found[samples.request[first]] = np.expm1(self.mlp(samples.hidden[first])[:, 0].astype(np.float64))
        mine: F64 = found[requests]
        return mine


class EntropyPooled(TotalLength):
    """EGTP (sections on pooling and on the head): all prompt states, weighted by the softmax of their entropies; soft
    bins whose expected value is the length.
    """

    name = "EGTP"
    reads = "all prompt states"

    def __init__(self, mlp: Mlp, edges: F64) -> None:
        self.mlp, self._centres = mlp, centres(edges)
        self.parameters = mlp.parameters

    def total(self, samples: Samples, requests: Any) -> F64:
        """See :class:`TotalLength`."""
        found: F64 = softmax(self.mlp(samples.pooled[requests])) @ self._centres
        return found
