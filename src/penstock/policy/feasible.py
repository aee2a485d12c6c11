"""PolyServe's three admission tests, and what they look at (arXiv 2507.17769).

1. *ttft*: waiting and prefill end within TTFT.
2. *second*: one iteration as it is right now later, still within TTFT + TPOT.
3. *steady*: the longest iteration to come stays within the TPOT budget, were every request here to end at the average
   output length and nothing else to come. The cost of prompt chunks is no part of it.

A fourth is not a matter of latency and always on: the KV to come must fit. Each test is pure arithmetic on a
:class:`Prospect`; :class:`Residents` works out the future of one server.
"""

from __future__ import annotations

from math import inf
from typing import Any

import msgspec
import numpy as np

from penstock.policy.profile_table import ProfileTable


class Prospect(msgspec.Struct, frozen=True):
    """What a placement is believed to lead to.

    ``first_s`` and ``second_s``: from the arrival to the first and the second token, or, of a request that was lost or
    preempted, to the next two. ``steady_s``: the longest
    decode iteration to come. ``peak_tokens``: the most KV tokens at a time.
    """

    first_s: float
    second_s: float
    steady_s: float
    peak_tokens: float


class Admissibility:
    """The tests, each of which can be switched off; counts what refused.

    Attributes
    ----------
    refusals : dict of str to int
        Refusals by the first test that failed: ``kv``, ``steady``, ``ttft`` or ``second``.
    """

    def __init__(self, ttft: bool = True, second: bool = True, steady: bool = True) -> None:
        self.ttft = ttft
        self.second = second
        self.steady = steady
        self.refusals = dict.fromkeys(("kv", "steady", "ttft", "second"), 0)

    def room(self, prospect: Prospect, budget_s: float, capacity_tokens: float) -> str | None:
        """The test that says the server itself cannot take it (``kv`` or ``steady``), None if it can."""
        if prospect.peak_tokens > capacity_tokens:
            return "kv"
        if self.steady and prospect.steady_s > budget_s:
            return "steady"
        return None

    def time(self, prospect: Prospect, first_due_s: float, second_due_s: float) -> str | None:
        """The test that says its next tokens would be late (``ttft`` or ``second``), None if they are not."""
        if self.ttft and prospect.first_s > first_due_s:
            return "ttft"
        if self.second and prospect.second_s > second_due_s:
            return "second"
        return None

    def admit(
        self,
        prospect: Prospect,
        due_s: tuple[float, float],
        budget_s: float,
        capacity_tokens: float,
        lost: bool = False,
    ) -> bool:
        """Do all tests pass? Counts the refusal if not.

        Parameters
        ----------
        due_s : (float, float)
            From the arrival until the first and the second token are due: TTFT, and TPOT later.
        budget_s : float
            TPOT budget of the server's tier.
        capacity_tokens : float
            KV tokens that the server may plan to hold.
        lost : bool
            Not even an idle server would bring its first tokens in time: only the server's own tests count.
        """
        refusal = self.room(prospect, budget_s, capacity_tokens)
        if refusal is None and not lost:
            refusal = self.time(prospect, *due_s)
        if refusal is not None:
            self.refusals[refusal] += 1
        return refusal is None


def due_s(ttft_s: float, tpot_s: float, index: int) -> tuple[float, float]:
    """From the arrival until tokens ``index`` (from 0) and ``index + 1`` are due: TTFT + index TPOT, and TPOT later."""
    first_s = ttft_s + index * tpot_s if index > 0 else ttft_s
    return first_s, first_s + tpot_s


class AverageLength:
    """Mean output length, tokens, from the requests that have finished; ``prior`` counts as ``weight`` of them.

    Short requests finish first, so what is still running counts too: all tokens so far, over all that have finished
    (the estimate for lengths cut off by observation). The share of the running ones fades as more finish.
    """

    def __init__(self, prior: float, weight: float = 20.0) -> None:
        self._sum = prior * weight
        self._count = weight
        self._running = 0.0

    def finished(self, tokens: int, running_tokens: float) -> None:
        """A request has ended; those that run have ``running_tokens`` of output together."""
        self._sum += tokens
        self._count += 1.0
        self._running = running_tokens

    def tokens(self) -> float:
        """The average so far."""
        return (self._sum + self._running) / self._count


class Residents:
    """The requests of one server, as columns, and how far each is believed to have come.

    Their progress is counted in the server's iterations: :meth:`carry` moves the count along with time.
    """

    def __init__(self) -> None:
        self.iterations = 0.0
        self.version = 0
        self._pace = 0.0
        self._at_s = 0.0
        self._slot: dict[int, int] = {}
        self._ids: list[int] = []
        # Iteration at which it had no output yet; its prompt tokens; the tier it would be in by its own target, s.
        self._start: Any = np.empty(64)
        self._prompt: Any = np.empty(64)
        self._tier: Any = np.empty(64)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, request: int) -> bool:
        return request in self._slot

    def requests(self) -> list[int]:
        """Who is here."""
        return list(self._ids)

    def carry(self, now_s: float, step_s: float) -> None:
        """Count iterations up to ``now_s``; from then on they take ``step_s`` (inf: none run)."""
        self.iterations += max(now_s - self._at_s, 0.0) * self._pace
        self._at_s = now_s
        self._pace = 1.0 / step_s if 0.0 < step_s < inf else 0.0

    def now(self, now_s: float) -> float:
        """Iterations by ``now_s``."""
        return self.iterations + max(now_s - self._at_s, 0.0) * self._pace

    def output_tokens(self, now_s: float) -> float:
        """Output tokens of those who are here, together."""
        n = len(self._ids)
        return n * self.now(now_s) - float(self._start[:n].sum())

    def tightest(self) -> float:
        """The tightest own tier of those who are here, inf if nobody is."""
        return float(self._tier[: len(self._ids)].min(initial=inf))

    def looser_than(self, tier: float) -> int:
        """How many are guests from looser tiers than ``tier``."""
        return int((self._tier[: len(self._ids)] > tier).sum())

    def put(self, request: int, prompt_tokens: int, generated: float, now_s: float, tier_s: float = inf) -> None:
        """A request that has ``generated`` tokens is here, or comes; one that is known starts afresh from there."""
        k = self._slot.get(request)
        if k is None:
            k = len(self._ids)
            if k == len(self._start):
                self._start = np.concatenate((self._start, np.empty(k)))
                self._prompt = np.concatenate((self._prompt, np.empty(k)))
                self._tier = np.concatenate((self._tier, np.empty(k)))
            self._ids.append(request)
            self._slot[request] = k
            self.version += 1
        self._start[k] = self.now(now_s) - generated
        self._prompt[k] = prompt_tokens
        self._tier[k] = tier_s

    def restart(self, request: int, generated: int, now_s: float) -> None:
        """A request that is here has ``generated`` tokens now."""
        self._start[self._slot[request]] = self.now(now_s) - generated

    def hand_over(self, request: int, target: Residents, now_s: float) -> None:
        """A request goes on elsewhere from where it is."""
        k = self._slot[request]
        generated, prompt = self.now(now_s) - float(self._start[k]), int(self._prompt[k])
        tier_s = float(self._tier[k])
        self.drop(request)
        target.put(request, prompt, generated, now_s, tier_s)

    def drop(self, request: int) -> bool:
        """A request is gone; False if it was not here."""
        k = self._slot.pop(request, None)
        if k is None:
            return False
        last = self._ids.pop()
        n = len(self._ids)
        if k < n:
            self._ids[k] = last
            self._slot[last] = k
            self._start[k] = self._start[n]
            self._prompt[k] = self._prompt[n]
            self._tier[k] = self._tier[n]
        self.version += 1
        return True

    def future(
        self,
        table: ProfileTable,
        average_tokens: float,
        now_s: float,
        joins: tuple[float, float] | None = None,
    ) -> tuple[float, float]:
        """Longest iteration (s) and most KV tokens to come, with nobody else to come; (0, 0) for an empty server.

        ``joins``: prompt and output tokens of one more request. Everybody ends at ``average_tokens`` of output, those
        beyond it at once. Batch and KV are looked at whenever one ends, since in between they only grow.
        """
        n = len(self._ids)
        done, prompt = self.now(now_s) - self._start[:n], self._prompt[:n]
        if joins is not None:
            done, prompt, n = np.append(done, joins[1]), np.append(prompt, joins[0]), n + 1
        if n == 0:
            return 0.0, 0.0
        left = np.maximum(average_tokens - done, 0.0)
        order = (-left).argsort(kind="stable")
        alive = np.arange(1.0, n + 1.0)
        kv = (prompt + done)[order].cumsum() + alive * left[order]
        return float(table.iteration_s(alive, kv).max()), float(kv.max())
