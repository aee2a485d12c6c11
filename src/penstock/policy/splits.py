"""How to divide a GPU's SMs between decode steps and one prefill batch (DuetServe, arXiv 2511.04791, section 4).

While one prefill batch runs on ``S_p`` SMs, ``k`` decode steps run on the other ``S_d``; then both join. The choice
maximises ``(k T_d + T_p) / max(k t_d(S_d), t_p(S_p))`` tokens per second, where no decode step may take longer than the
target. The paper does not say how ``k`` is searched: we try the two whole numbers around ``t_p / t_d``.
"""

from __future__ import annotations

from math import ceil, floor
from typing import NamedTuple

from penstock.perf.sm_share import SharedGpu


class Work(NamedTuple):
    """A batch: ``decodes`` requests over ``context`` KV tokens, and prompt chunks (new tokens after past ones)."""

    decodes: int
    context: int
    new: list[int]
    past: list[int]

    def prompt_tokens(self) -> int:
        """Prompt tokens of the batch."""
        return sum(self.new)


class Division(NamedTuple):
    """``decode_sms`` SMs run ``steps`` decode steps of ``decode_s``, the others the prefill in ``prefill_s``, as
    believed.
    """

    decode_sms: int
    prefill_sms: int
    steps: int
    decode_s: float
    prefill_s: float

    def span_s(self) -> float:
        """Seconds until both have ended."""
        return max(self.steps * self.decode_s, self.prefill_s)

    def longest_gap_s(self) -> float:
        """Longest wait of a decode for a token, if the step after the join takes as long as those before it."""
        return self.decode_s + max(0.0, self.prefill_s - self.steps * self.decode_s)

    def tokens_per_s(self, work: Work) -> float:
        """The objective."""
        return (self.steps * work.decodes + work.prompt_tokens()) / self.span_s()


def divisions(gpu: SharedGpu, work: Work, decode_sms: int, max_steps: int) -> list[Division]:
    """The two ways to divide at ``decode_sms``: one step short of the prefill's end, or up to it.

    Empty if more than ``max_steps`` steps would fit.
    """
    prefill_sms = gpu.curve.sms - decode_sms
    decode_s = gpu.on(decode_sms).step_s(work.decodes, work.context, [], [])
    prefill_s = gpu.on(prefill_sms).step_s(0, 0, work.new, work.past)
    ratio = prefill_s / decode_s
    counts = sorted({max(1, floor(ratio)), max(1, ceil(ratio))})
    return [Division(decode_sms, prefill_sms, k, decode_s, prefill_s) for k in counts if k <= max_steps]


def best_division(
    gpu: SharedGpu, work: Work, target_s: float, max_steps: int = 1 << 30, count_join: bool = False
) -> Division | None:
    """The division with the most tokens per second whose decode steps stay within ``target_s``; None if none does.

    ``count_join`` also holds the wait for the join against the target: with ``k t_d < t_p`` the decodes' next token
    comes later than one step after the last. The paper's condition is on the steps alone.

    Exhaustive over ``S_d`` in units of the GPU, ascending, ties to the first. What cannot win is not computed: with
    more SMs for decode the prefill only takes longer, and no division beats both rates at once.
    """
    best: Division | None = None
    highest = 0.0
    fastest_s = gpu.on(gpu.curve.parts()[-1]).step_s(work.decodes, work.context, [], [])
    if fastest_s > target_s:
        return None
    for decode_sms in gpu.curve.parts():
        if gpu.on(decode_sms).step_s(work.decodes, work.context, [], []) > target_s:
            continue
        found = divisions(gpu, work, decode_sms, max_steps)
        for division in found:
            if count_join and division.longest_gap_s() > target_s:
                continue
            rate = division.tokens_per_s(work)
            if rate > highest:
                best, highest = division, rate
        if found and highest > work.prompt_tokens() / found[0].prefill_s + work.decodes / fastest_s:
            break
    return best


def fixed_division(gpu: SharedGpu, work: Work, decode_sms: int, max_steps: int) -> Division:
    """``decode_sms`` SMs for decode whatever it costs, and decode steps until the prefill has ended."""
    prefill_sms = gpu.curve.sms - decode_sms
    decode_s = gpu.on(decode_sms).step_s(work.decodes, work.context, [], [])
    prefill_s = gpu.on(prefill_sms).step_s(0, 0, work.new, work.past)
    return Division(decode_sms, prefill_sms, min(max_steps, max(1, ceil(prefill_s / decode_s))), decode_s, prefill_s)
