"""LightLLM's conditional history: lengths of finished requests that were longer than what is generated so far."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.predict.learned.baselines.base import Method
from penstock.predict.learned.samples import Samples
from penstock.predict.remaining import HISTORY_WINDOW, History
from penstock.workload.trace import F64


class ConditionalHistory(Method):
    """:class:`penstock.predict.remaining.History` after it has seen the training set end.

    Parameters
    ----------
    lengths : int[n]
        Output tokens of the training set; the last 1,000 count.
    quantile : float
        Of the conditional distribution; negative: its mean.
    """

    reads = "tokens so far"

    def __init__(self, lengths: Any, quantile: float = -1.0) -> None:
        self.name = "history, mean" if quantile < 0 else f"history, P{100 * quantile:g}"
        self._history = History(HISTORY_WINDOW, quantile)
        for length in np.asarray(lengths).tolist():
            self._history.finished(int(length))

    def predict(self, samples: Samples) -> F64:
        """See :class:`Method`."""
        generated = samples.generated.astype(np.float64)
        found: F64 = self._history.remaining(generated, np.full(len(generated), -1.0))
        return found
