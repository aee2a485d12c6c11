"""Latency formulas that published policies plan with, fitted once to what a policy believes.

The step model in the beliefs may be of any shape; Arrow and xLLM know only these three. The difference between the
fit and the belief is part of what such a policy gets wrong.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from penstock.policy.parts import Beliefs

TYPICAL_CONTEXT: Final = 1024
"""Tokens of KV per running decode at which a model of step time in tokens alone is fitted; ours."""

_PREFILL_LENGTHS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS: Final = (256, 1024, 4096, 16384)


class PrefillTimes:
    """Believed seconds of one prefill alone, worked out once a length."""

    def __init__(self, beliefs: Beliefs) -> None:
        self.beliefs = beliefs
        self._known: dict[int, float] = {}

    def seconds(self, tokens: int) -> float:
        """Believed seconds of one prefill of ``tokens``, alone."""
        found = self._known.get(tokens)
        if found is None:
            found = self.beliefs.prefill_s(tokens)
            self._known[tokens] = found
        return found


class PrefillFit:
    """``T(L) = a L^2 + b L + c`` seconds for a prompt of ``L`` tokens (Arrow v2, section 3.1; xLLM's TTFT model)."""

    def __init__(self, beliefs: Beliefs) -> None:
        lengths = np.array(_PREFILL_LENGTHS, np.float64)
        seconds = np.array([beliefs.prefill_s(n) for n in _PREFILL_LENGTHS])
        a, b, c = _fit(np.stack([lengths**2, lengths, np.ones_like(lengths)], axis=1), seconds)
        self.a = a
        self.b = b
        self.c = c

    def seconds(self, tokens: float) -> float:
        """Believed seconds of one prefill of ``tokens``, alone."""
        return max((self.a * tokens + self.b) * tokens + self.c, 0.0)


class TokenFit:
    """``t(n) = slope n + intercept`` seconds of a decode step over ``n`` resident tokens (Arrow v2, section 3.1)."""

    def __init__(self, beliefs: Beliefs, typical_context: int = TYPICAL_CONTEXT) -> None:
        batches = np.array(_BATCHES, np.float64)
        seconds = np.array([beliefs.decode_step_s(b, b * typical_context) for b in _BATCHES])
        slope, intercept = _fit(np.stack([batches * typical_context, np.ones_like(batches)], axis=1), seconds)
        self.slope = max(slope, 1e-15)
        self.intercept = max(intercept, 0.0)

    def seconds(self, tokens: float) -> float:
        """Believed seconds of one decode step."""
        return self.slope * tokens + self.intercept

    def most_tokens(self, tpot_s: float) -> float:
        """Most resident tokens whose step stays within ``tpot_s`` (Arrow's MT); 0 if even an empty step does not."""
        return max((tpot_s - self.intercept) / self.slope, 0.0)


class BatchFit:
    """``t(B, N) = c0 + c1 B + c2 N`` seconds of a decode step: ``B`` requests, ``N`` tokens (xLLM's TPOT model)."""

    def __init__(self, beliefs: Beliefs) -> None:
        grid = [(b, b * c) for b in _BATCHES for c in _CONTEXTS]
        rows = np.array([[1.0, b, n] for b, n in grid])
        c0, c1, c2 = _fit(rows, np.array([beliefs.decode_step_s(b, n) for b, n in grid]))
        self.c0 = c0
        self.c1 = c1
        self.c2 = c2

    def seconds(self, requests: Any, tokens: Any) -> Any:
        """Believed seconds of one decode step; float64[k] in, float64[k] out."""
        return self.c0 + self.c1 * requests + self.c2 * tokens


def _fit(terms: Any, seconds: Any) -> list[float]:
    """Least squares of the relative error, so that short prompts and small batches count as much as long ones."""
    weight = 1.0 / np.maximum(seconds, 1e-12)
    answer = np.linalg.lstsq(terms * weight[:, None], seconds * weight, rcond=None)[0]
    return [float(x) for x in answer]
