"""Dynamic chunking: what a tier's iteration budget leaves beside the decodes is filled with prompt tokens (PolyServe).

While all decodes of a server are ahead of their pace, an iteration may take longer than the budget. How far ahead they
are at least is the server's *credit*: a request brings the time between its first token and its TTFT deadline, an
iteration with prompts in it adds budget - duration, measured, so that what the profile table gets wrong is paid back.
The account is ours; the paper (arXiv 2507.17769) says only that chunks follow the slack.
"""

from __future__ import annotations

from math import inf

from penstock.core.types import Role
from penstock.policy.engine import Chunking, EngineKit, EngineParts, Job, Situation
from penstock.policy.profile_table import ProfileTable
from penstock.policy.tiers import POOL, Tiers


class Credit:
    """Seconds by which the decodes of each server are ahead of their tier's pace, at least; negative if behind."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def of(self, server: int) -> float:
        """The credit of a server; 0 before anything joined it."""
        return self._seconds.get(server, 0.0)

    def join(self, server: int, slack_s: float, first: bool) -> None:
        """A request with ``slack_s`` seconds to its next deadline joins; ``first``: it has the batch to itself."""
        self._seconds[server] = slack_s if first else min(self.of(server), slack_s)

    def spend(self, server: int, seconds: float) -> None:
        """An iteration took ``seconds`` more than the budget (less: negative)."""
        self._seconds[server] = self.of(server) - seconds


class TierChunking(Chunking):
    """The largest chunk that keeps the next iteration within the budget of the server's tier, given its credit."""

    def __init__(self, server: int, kit: TierKit) -> None:
        self._server = server
        self._kit = kit
        self._budget_s = 0.0
        self._with_prompts = False

    def budget(self, situation: Situation, partial: Job | None) -> int:
        """See :class:`Chunking`. Without decodes there is nothing to hold back for."""
        kit, server = self._kit, self._server
        if self._with_prompts:
            kit.credit.spend(server, situation.last_step_s - self._budget_s)
        tier = kit.tier_s(server)
        self._with_prompts = False
        if situation.decodes == 0 or tier in (inf, POOL):
            return situation.max_batched_tokens
        self._budget_s = tier * (1.0 - kit.margin)
        self._with_prompts = partial is not None or situation.waiting > 0
        allowed_s = min(self._budget_s + kit.credit.of(server), self._budget_s * kit.stretch)
        past = 0 if partial is None else partial.tokens - partial.left
        return kit.chunk(situation.decodes, situation.context, past, allowed_s)


class TierKit(EngineKit):
    """Chunking for every server, by the tiers that the router keeps.

    Parameters
    ----------
    margin : float
        Share of the budget that is left unused.
    stretch : float
        An iteration takes at most this many budgets, however much credit there is.
    attention_tokens : float
        From this many tokens of a prompt on, the attention of its chunks over them counts.
    """

    def __init__(
        self,
        table: ProfileTable,
        tiers: Tiers,
        credit: Credit,
        margin: float = 0.0,
        stretch: float = 1.0,
        attention_tokens: float = inf,
    ) -> None:
        self.table = table
        self.tiers = tiers
        self.credit = credit
        self.margin = margin
        self.stretch = stretch
        self.attention_tokens = attention_tokens

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        return EngineParts(chunking=TierChunking(instance, self))

    def tier_s(self, server: int) -> float:
        """The budget of a server's tier, ``POOL`` if it has none."""
        known = self.tiers.budget_s
        return float(known[server]) if server < len(known) else POOL

    def chunk(self, decodes: int, context: int, past: int, allowed_s: float) -> int:
        """Most prompt tokens, after ``past`` of their prompt, beside these decodes within ``allowed_s``; 0 or more."""
        chunk = self.table.most_chunk(decodes, context, allowed_s)
        if chunk == 0 or past < self.attention_tokens:
            return chunk
        low, high = 0, chunk
        while low < high:
            middle = (low + high + 1) // 2
            spent_s = self.table.with_chunk_s(decodes, context, middle) + self.table.attention_s(middle, past)
            low, high = (middle, high) if spent_s <= allowed_s else (low, middle - 1)
        return low
