"""Output lengths of finished requests, kept apart by the length of their prompts.

Where the world has no predictor, all requests that have not started look alike to a plain history, so that "shortest
first" would be first come, first served. Prompts of like length ask for like outputs in many workloads (code
completion against chat), which is what this uses. Ours; the history in each bin is that of LightLLM's Past-Future
scheduler.
"""

from __future__ import annotations

from typing import Final

from penstock.predict.remaining import HISTORY_WINDOW, History

ENOUGH: Final = 20
"""Finished requests from which on a bin speaks for itself; ours."""


class PromptHistory:
    """One history a power of two of prompt tokens, and one of all."""

    def __init__(self, window: int = HISTORY_WINDOW) -> None:
        self.window = window
        self._all = History(window)
        self._bins: dict[int, History] = {}
        self._seen: dict[int, int] = {}

    def finished(self, prompt_tokens: int, output_tokens: int) -> None:
        """A request with that prompt ended with ``output_tokens`` tokens."""
        key = prompt_tokens.bit_length()
        if key not in self._bins:
            self._bins[key] = History(self.window)
            self._seen[key] = 0
        self._bins[key].finished(output_tokens)
        self._seen[key] += 1
        self._all.finished(output_tokens)

    def remaining(self, prompt_tokens: int, generated: int) -> float:
        """Mean tokens still to come from a request with that prompt and ``generated`` tokens out, at least 0."""
        key = prompt_tokens.bit_length()
        known = self._seen.get(key, 0) >= ENOUGH
        return (self._bins[key] if known else self._all).one(float(generated), -1.0)
