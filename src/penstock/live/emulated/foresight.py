"""Predictions of remaining length as an engine with a predictor makes them: the truth, spoilt by a known error."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final
from zlib import crc32

from penstock.live.emulated.choice import Choice
from penstock.live.emulated.settings import EmulatedSettings
from penstock.live.plugin.penstock_engine.messages import Prediction
from penstock.predict.simulated import NoisyOracle

LEVELS: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
_SCORES: Final = tuple(NormalDist().inv_cdf(level) for level in LEVELS)
_HEAD: Final = 8
_KEPT: Final = 65536


class Foresight:
    """Predicts for the choices of one instance, again after every so many tokens.

    An engine that a request has moved to sees output of another one as prompt, and a real predictor would not mind.
    Nor does this: ``origins``, which all instances of a fleet share, tells where a request's output began, by how its
    prompt begins and how long it will be in all. So its error shrinks with all its tokens, wherever they came from.
    """

    def __init__(self, settings: EmulatedSettings, origins: dict[tuple[int, int], int]) -> None:
        self._oracle = NoisyOracle(settings.seed, settings.sigma_first, settings.halving_tokens)
        self._origins = origins
        self._made: dict[int, int] = {}

    def due(self, choice: Choice) -> Prediction | None:
        """A new prediction, or None if the last one still stands."""
        period = len(choice.out) // self._oracle.refresh
        if self._made.get(choice.request) == period or not choice.out:
            return None
        if len(self._made) >= _KEPT:
            self._made.clear()
        self._made[choice.request] = period
        return self.predict(choice)

    def predict(self, choice: Choice) -> Prediction:
        """The quantiles of what remains, seen from now.

        The oracle's guess is the truth times ``exp(sigma Z)``, so the truth given the guess is log-normal around it.
        """
        true = choice.remaining()
        head = crc32(choice.prompt.ids[:_HEAD].tobytes())
        key = (head, choice.tokens + true)
        if len(self._origins) >= _KEPT:
            self._origins.clear()
        origin = min(self._origins.get(key, len(choice.prompt)), len(choice.prompt))
        self._origins[key] = origin
        generated = choice.tokens - origin
        oracle = self._oracle
        median = oracle.remaining(head ^ key[1], true, generated)
        since = generated // oracle.refresh * oracle.refresh
        sigma = oracle.sigma_first / (1.0 + since / oracle.halving_tokens)
        return Prediction(choice.name, len(choice.out), tuple([median * math.exp(sigma * score) for score in _SCORES]))
