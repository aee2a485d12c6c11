"""Length predictors of the simulated world: they know the truth and spoil it as real predictors do.

Compiled with mypyc together with the simulator, so plain floats and integers only. Each answer is a function of the
seed and the request, not of the order of the questions: two policies on one trace see the same errors.
"""

from __future__ import annotations

import math
from typing import Final

SIGMA_FIRST: Final = 0.642
"""Spread of ln(predicted / true) at the first token; E|exp(sZ) - 1| = 18,256 / 31,000 tokens (STAR, section 1)."""

HALVING_TOKENS: Final = 2617.0
"""Generated tokens after which the spread has halved; fits 2,929 tokens of error after 8,000 generated (STAR)."""

REFRESH_TOKENS: Final = 20
"""Tokens between two predictions: the stride of STAR's labels; its run-time period is not known to us."""

FIXED_SHARE: Final = 0.5
"""Share of the error's variance that stays with a request for life; ours."""

_MASK: Final = 0xFFFFFFFF
_CACHE: Final = 65536


class LengthOracle:
    """A perfect predictor; base of the imperfect ones."""

    def remaining(self, request: int, true_remaining: int, generated: int) -> float:
        """Predicted tokens still to come, for a request with ``generated`` tokens out and ``true_remaining`` to go."""
        return float(true_remaining)


class NoisyOracle(LengthOracle):
    """The truth times ``exp(sigma(t) * Z)``, with ``sigma(t) = sigma_first / (1 + t / halving)``.

    ``t`` is the number of generated tokens at the latest refresh. ``Z`` is standard normal, made of a part fixed per
    request and a part drawn anew at each refresh. The form is ours; the two numbers that shape it are the error that
    STAR reports for outputs of 30-32K tokens: 18,256 tokens at the start, 2,929 after 8K tokens. The median is right,
    the mean is too high, as with predictors trained on absolute error. For short outputs it is a pessimistic model
    (59 % relative error at the first token; probes on chat models reach about 25 %).

    Parameters
    ----------
    seed : int
        At least 0.
    sigma_first, halving_tokens, refresh, fixed_share
        See the constants of this module. ``sigma_first=0`` makes it exact.
    """

    def __init__(
        self,
        seed: int,
        sigma_first: float = SIGMA_FIRST,
        halving_tokens: float = HALVING_TOKENS,
        refresh: int = REFRESH_TOKENS,
        fixed_share: float = FIXED_SHARE,
    ) -> None:
        self.seed = seed
        self.sigma_first = sigma_first
        self.halving_tokens = halving_tokens
        self.refresh = refresh
        self._fixed_weight = math.sqrt(fixed_share)
        self._fresh_weight = math.sqrt(1.0 - fixed_share)
        self._latest: dict[int, tuple[int, float]] = {}
        self._key: dict[int, int] = {}
        self._fixed: dict[int, float] = {}

    def remaining(self, request: int, true_remaining: int, generated: int) -> float:
        """See :class:`LengthOracle`."""
        period = generated // self.refresh
        latest = self._latest.get(request)
        if latest is None or latest[0] != period:
            if len(self._latest) >= _CACHE:  # only caches: everything in them can be made again
                self._latest.clear()
                self._key.clear()
                self._fixed.clear()
            latest = (period, self._factor(request, period))
            self._latest[request] = latest
        return true_remaining * latest[1]

    def _factor(self, request: int, period: int) -> float:
        key = self._key.get(request)
        if key is None:
            key = _mix(_mix(self.seed & _MASK) ^ (request & _MASK))
            self._key[request] = key
            self._fixed[request] = self._fixed_weight * _draw(key, 0)
        sigma = self.sigma_first / (1.0 + period * self.refresh / self.halving_tokens)
        return math.exp(sigma * (self._fixed[request] + self._fresh_weight * _draw(key, period + 1)))


def normal(seed: int, request: int, number: int) -> float:
    """A standard normal draw that depends on the three integers, each at least 0, and on nothing else."""
    return _draw(_mix(_mix(seed & _MASK) ^ (request & _MASK)), number)


def _draw(key: int, number: int) -> float:
    """Hash to two uniforms, then Box-Muller."""
    h = _mix(key ^ (number & _MASK))
    radius = math.sqrt(-2.0 * math.log((_mix(h ^ 0x9E3779B9) + 0.5) / 4294967296.0))
    return radius * math.cos(2.0 * math.pi * _mix(h ^ 0x3C6EF372) / 4294967296.0)


def _mix(x: int) -> int:
    """Scramble 32 bits: xor with the own high bits, multiply by an odd number, twice over."""
    x = (x + 0x9E3779B9) & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
