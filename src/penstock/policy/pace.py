"""How many prompt tokens a step may carry beside its decodes so that it still keeps their pace.

The rule of chunked prefill under a TPOT (Sarathi's stall-free batches, PolyServe's dynamic chunking): the largest chunk
whose believed step stays within the tightest target on the instance. Measured steps bend, so the chunk is found by
bisection, and remembered for batches alike.
"""

from __future__ import annotations

from math import inf

from penstock.core.types import Role
from penstock.policy.engine import Chunking, EngineKit, EngineParts, Job, Situation
from penstock.policy.margin import Margin
from penstock.policy.parts import Beliefs
from penstock.policy.tenants import Tenants

GRAIN = 16
"""Chunks are multiples of this many tokens, which is vLLM's KV block."""
LEAST = 64
"""So many prompt tokens always go, lest prompts starve where even a pure decode step is too long."""
MOST_KNOWN = 100_000
"""Chunks remembered; a gateway runs for months."""


class Pace:
    """Chunk sizes from beliefs. A step may take ``share`` of a TPOT target less a margin; 0: any time at all."""

    def __init__(self, beliefs: Beliefs, share: float, margin: Margin) -> None:
        self.beliefs = beliefs
        self.share = share
        self.margin = margin
        self.most = beliefs.max_batched_tokens
        self._known: dict[tuple[int, int, int, float], tuple[int, float]] = {}

    def chunk(self, decodes: int, context: int, past: int, tpot_s: float) -> int:
        """Prompt tokens that may join ``decodes`` over ``context`` KV tokens, after ``past`` tokens of the prompt."""
        if decodes == 0 or tpot_s == inf or self.share == 0.0:
            return self.most
        return self._cell(decodes, context, past, tpot_s)[0]

    def rate(self, decodes: int, context: int, tpot_s: float) -> float:
        """Prompt tokens/s in such chunks."""
        unpaced = decodes == 0 or self.share == 0.0
        chunk, step_s = self._cell(decodes, context, 0, inf if unpaced else tpot_s)
        return chunk / step_s

    def _cell(self, decodes: int, context: int, past: int, tpot_s: float) -> tuple[int, float]:
        most_s = inf
        if tpot_s < inf:  # in per cent of the target, so that what is remembered serves again
            most_s = tpot_s * 0.01 * int(100.0 * self.share * self.margin.of(tpot_s) + 1e-6)
        key = (decodes // 4, context // 4096, past // 2048, most_s)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            found = self._search(key[0] * 4 + 2, key[1] * 4096 + 2048, key[2] * 2048, most_s)
            self._known[key] = found
        return found

    def _search(self, decodes: int, context: int, past: int, step_s: float) -> tuple[int, float]:
        step = self.beliefs.step
        low, high = 0, self.most // GRAIN
        while low < high:
            middle = (low + high + 1) // 2
            if step.step_s(decodes, context, [middle * GRAIN], [past]) <= step_s:
                low = middle
            else:
                high = middle - 1
        chunk = max(low * GRAIN, LEAST)
        return chunk, step.step_s(decodes, context, [chunk], [past])


class PacedChunks(Chunking):
    """The chunk for the tightest target among an engine's tenants."""

    def __init__(self, pace: Pace, tenants: Tenants) -> None:
        self.pace = pace
        self.tenants = tenants

    def budget(self, situation: Situation, partial: Job | None) -> int:
        """See :class:`Chunking`."""
        past = 0 if partial is None else partial.tokens - partial.left
        tightest = self.tenants.tightest_s(situation.instance)
        return self.pace.chunk(situation.decodes, situation.context, past, tightest)


class PacedEngines(EngineKit):
    """Every engine of the policy with :class:`PacedChunks`."""

    def __init__(self, pace: Pace, tenants: Tenants) -> None:
        self.pace = pace
        self.tenants = tenants

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        return EngineParts(chunking=PacedChunks(self.pace, self.tenants))
