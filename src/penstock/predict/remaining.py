"""Remaining-length predictors as a policy uses them: tokens generated so far and the world's guess in, a guess out.

The world may report a prediction with its events (a probe on the engine's hidden states, as in STAR/ARES, or the
simulated ones of :mod:`penstock.predict.simulated`). A predictor here decides what to make of it, and what to do
where there is none. It needs no engine and no model.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Final

import numpy as np

HISTORY_WINDOW: Final = 1000
"""Finished requests remembered (LightLLM's Past-Future scheduler, about 1,000)."""

PRIOR_TOKENS: Final = 512.0
"""Guess before anything has finished; ours, for lack of any source."""


class Predictor:
    """How many more tokens will a request generate?"""

    learns = False
    """True if the predictor wants :meth:`finished` for every finished request."""

    def remaining(self, generated: Any, observed: Any) -> Any:
        """Predict a whole batch.

        Parameters
        ----------
        generated : float64[n]
            Tokens generated so far.
        observed : float64[n]
            What the world predicts to remain; negative (``NO_PREDICTION``) where it says nothing.

        Returns
        -------
        float64[n]
            Tokens that remain, at least 0; ``inf`` where nothing is known.
        """
        raise NotImplementedError

    def one(self, generated: float, observed: float) -> float:
        """Predict one request; the same answer as :meth:`remaining`, without arrays."""
        raise NotImplementedError

    def finished(self, length: int) -> None:
        """A request ended with ``length`` tokens."""


class Nothing(Predictor):
    """Knows nothing: every request may go on for ever. With it ARES balances current loads only."""

    def remaining(self, generated: Any, observed: Any) -> Any:
        """See :class:`Predictor`; always ``inf``."""
        return np.full(len(generated), np.inf)

    def one(self, generated: float, observed: float) -> float:
        """See :class:`Predictor`; always ``inf``."""
        return float("inf")


class Observed(Predictor):
    """What the world reports; ``fallback`` answers where it reports nothing (stock vLLM has no predictor)."""

    def __init__(self, fallback: Predictor) -> None:
        self.fallback = fallback
        self.learns = fallback.learns

    def remaining(self, generated: Any, observed: Any) -> Any:
        """See :class:`Predictor`."""
        unknown = observed < 0.0
        if not unknown.any():
            return observed
        return np.where(unknown, self.fallback.remaining(generated, observed), observed)

    def one(self, generated: float, observed: float) -> float:
        """See :class:`Predictor`."""
        return observed if observed >= 0.0 else self.fallback.one(generated, observed)

    def finished(self, length: int) -> None:
        """Pass on to the fallback."""
        self.fallback.finished(length)


class History(Predictor):
    """Lengths of the latest finished requests, conditional on being longer than what is generated already.

    The no-model predictor of LightLLM's Past-Future scheduler, which draws a sample from that distribution; here its
    mean or a quantile, so that the same questions get the same answers. A request that has outlived every remembered
    one is given as many tokens again as it has (the mean excess of a Pareto tail with exponent 2; ours).

    Parameters
    ----------
    window : int
        Finished requests remembered, at least 1.
    quantile : float
        In [0, 1): that quantile of the conditional distribution; negative: its mean.
    """

    learns = True

    def __init__(self, window: int = HISTORY_WINDOW, quantile: float = -1.0) -> None:
        self.window = max(int(window), 1)
        self.quantile = quantile
        self._ring: list[float] = []
        self._next = 0
        self._new = 0
        self._sorted: list[float] = []
        self._lengths: Any = np.empty(0)
        self._mean_above: Any = np.empty(0)

    def finished(self, length: int) -> None:
        """Remember one length, forgetting the oldest if the window is full."""
        if len(self._ring) < self.window:
            self._ring.append(float(length))
        else:
            self._ring[self._next] = float(length)
            self._next = (self._next + 1) % self.window
        self._new += 1
        # Sorting at each end of a request would cost more than it tells: wait for one per cent of news.
        if self._new * 100 >= len(self._ring):
            self._rebuild()

    def remaining(self, generated: Any, observed: Any) -> Any:
        """See :class:`Predictor`."""
        n = len(self._sorted)
        if n == 0:
            return np.full(len(generated), PRIOR_TOKENS)
        first = np.searchsorted(self._lengths, generated, side="right")
        inside = np.minimum(first, n - 1)
        if self.quantile >= 0.0:
            guess = self._lengths[np.minimum(first + (self.quantile * (n - first)).astype(np.int64), n - 1)]
        else:
            guess = self._mean_above[inside]
        return np.where(first < n, guess - generated, generated)

    def one(self, generated: float, observed: float) -> float:
        """See :class:`Predictor`."""
        n = len(self._sorted)
        if n == 0:
            return PRIOR_TOKENS
        first = bisect_right(self._sorted, generated)
        if first >= n:
            return generated
        if self.quantile >= 0.0:
            return self._sorted[min(first + int(self.quantile * (n - first)), n - 1)] - generated
        return float(self._mean_above[first]) - generated

    def survival(self, lengths: Any) -> Any:
        """Share of the remembered requests that are longer than each of ``lengths``: float64[n] in, float64[n] out.

        Before anything has finished: that of an exponential distribution with mean ``PRIOR_TOKENS``.
        """
        n = len(self._sorted)
        if n == 0:
            return np.exp(-lengths / PRIOR_TOKENS)
        return 1.0 - np.searchsorted(self._lengths, lengths, side="right") / n

    def _rebuild(self) -> None:
        self._new = 0
        self._sorted = sorted(self._ring)
        self._lengths = np.array(self._sorted)
        n = len(self._sorted)
        self._mean_above = np.cumsum(self._lengths[::-1])[::-1] / np.arange(n, 0, -1)
