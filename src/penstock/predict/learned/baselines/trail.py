"""TRAIL: bins of remaining length from the hidden state, smoothed by Bayes' rule from refresh to refresh."""

from __future__ import annotations

import numpy as np

from penstock.predict.learned.baselines.base import Method
from penstock.predict.learned.bins import centres, fall
from penstock.predict.learned.mlp import Mlp
from penstock.predict.learned.samples import Samples
from penstock.predict.learned.softmax import softmax
from penstock.workload.trace import F64

_LEAST = 1e-12  # keeps a bin that was ruled out once from being ruled out for ever


class BayesBins(Method):
    """The prior of a refresh is the posterior of the one before, moved down by the tokens decoded since; the
    prediction is the expected value (TRAIL, section on refining predictions). TRAIL refreshes at every token and reads
    a middle layer; here it sees what the head sees, when the head sees it.

    Parameters
    ----------
    mlp : Mlp
        Logits of the bins.
    edges : float64[bins + 1]
        Of the bins, in tokens.
    name : str
        Its name in tables.
    """

    reads = "last state and its past"

    def __init__(self, mlp: Mlp, edges: F64, name: str) -> None:
        self.mlp, self.edges, self.name = mlp, edges, name
        self.parameters = mlp.parameters

    def predict(self, samples: Samples) -> F64:
        """See :class:`Method`; the first sample of each request counts as its first refresh."""
        belief = softmax(self.mlp(samples.hidden).astype(np.float64))
        middle = centres(self.edges)
        # All requests at once: their first samples, their second ones, ...
        starts = np.flatnonzero(np.diff(samples.request, prepend=-1))
        counts = np.diff(np.append(starts, len(samples.request)))
        moved: dict[int, F64] = {}
        for step in range(1, int(counts.max(initial=0))):
            rows = starts[counts > step] + step
            spans = samples.generated[rows] - samples.generated[rows - 1]
            prior = np.empty((len(rows), len(middle)))
            for span in np.unique(spans).tolist():
                if span not in moved:
                    moved[span] = fall(self.edges, span)
                mine = spans == span
                prior[mine] = belief[rows[mine] - 1] @ moved[span]
            posterior = belief[rows] * np.maximum(prior, _LEAST)
            belief[rows] = posterior / posterior.sum(axis=1, keepdims=True)
        found: F64 = belief @ middle
        return found
