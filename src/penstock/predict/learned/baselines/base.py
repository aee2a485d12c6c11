"""One form for everything that predicts."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.predict.learned.samples import Samples
from penstock.workload.trace import F64


class Method:
    """A way to predict, for the evaluation. ``parameters`` counts trained numbers, 0 where nothing is trained."""

    name = ""
    reads = ""
    """What it looks at, in a few words."""
    parameters = 0

    def predict(self, samples: Samples) -> F64:
        """Remaining tokens, float64[m], at least 0. The labels in ``samples`` are not to be looked at."""
        raise NotImplementedError


class TotalLength(Method):
    """Predicts the whole length once a request, from its prompt; afterwards what is generated is subtracted.

    A request that has outlived its prediction is said to be about to end: 0 tokens.
    """

    def predict(self, samples: Samples) -> F64:
        """See :class:`Method`."""
        # Only those that are asked about: a batch may be one row of a table with thousands of requests.
        mine, rows = np.unique(samples.request, return_inverse=True)
        left: F64 = np.maximum(self.total(samples, mine)[rows] - samples.generated, 0.0)
        return left

    def total(self, samples: Samples, requests: Any) -> F64:
        """Length of the outputs of ``requests`` int[k], float64[k]."""
        raise NotImplementedError
