"""The least that one can know."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.predict.learned.baselines.base import TotalLength
from penstock.predict.learned.samples import Samples
from penstock.workload.trace import F64


class MedianLength(TotalLength):
    """Every output is as long as the median output of the training set; one that is longer is about to end."""

    name = "median length"
    reads = "nothing"

    def __init__(self, lengths: Any) -> None:
        self.length = float(np.median(lengths))

    def total(self, samples: Samples, requests: Any) -> F64:
        """See :class:`TotalLength`."""
        return np.full(len(requests), self.length)
