"""The simulator's own predictor, on these requests: to see how near its noise is to a real predictor's."""

from __future__ import annotations

import numpy as np

from penstock.predict.learned.baselines.base import Method
from penstock.predict.learned.samples import Samples
from penstock.predict.simulated import NoisyOracle
from penstock.workload.trace import F64


class SimulatedNoise(Method):
    """The truth with the errors of :class:`penstock.predict.simulated.NoisyOracle`. It alone sees the labels."""

    name = "simulated noise"
    reads = "the truth"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def predict(self, samples: Samples) -> F64:
        """See :class:`Method`."""
        oracle = NoisyOracle(self._seed)
        rows = zip(
            samples.request.tolist(), samples.remaining.astype(int).tolist(), samples.generated.tolist(), strict=True
        )
        return np.array([oracle.remaining(*row) for row in rows], np.float64)
