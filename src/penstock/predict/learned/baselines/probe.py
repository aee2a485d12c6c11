"""Networks on the hidden state of the token sampled last, asked anew at each refresh."""

from __future__ import annotations

import numpy as np

from penstock.predict.learned.baselines.base import Method
from penstock.predict.learned.head import Head
from penstock.predict.learned.mlp import Mlp
from penstock.predict.learned.samples import Samples
from penstock.workload.trace import F64


class HeadMedian(Method):
    """The head's median: what Penstock uses."""

    name = "head (median)"
    reads = "last state"

    def __init__(self, head: Head) -> None:
        self.head = head
        self.parameters = head.parameters

    def predict(self, samples: Samples) -> F64:
        """See :class:`Method`."""
        return self.head.median(samples.hidden, samples.generated)


class PaperHead(Method):
    """The paper's form: the same network with one output, trained by the absolute error in tokens (STAR/ARES).

    ``unit`` is what the network counts in, in tokens.
    """

    name = "paper (L1)"
    reads = "last state"

    def __init__(self, mlp: Mlp, unit: float) -> None:
        self.mlp, self.unit = mlp, unit
        self.parameters = mlp.parameters

    def predict(self, samples: Samples) -> F64:
        """See :class:`Method`."""
        found: F64 = np.maximum(self.mlp(samples.hidden)[:, 0].astype(np.float64) * self.unit, 0.0)
        return found
