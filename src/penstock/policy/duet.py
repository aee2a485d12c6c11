"""DuetServe (arXiv 2511.04791): mixed batches on the whole GPU, divided SMs when a mixed step would be too slow.

An instance serves whole requests and batches as stock vLLM does, decodes first. Where the believed time of a batch
exceeds the target between tokens, its decodes and its prompts run side by side on SMs of their own, so many decode
steps as one prefill lasts (``splits``); where no division keeps the target either, the decodes go on alone and the
prompts wait. The target's value in the paper is not known to us; ours is the TPOT target of the SLO.

Ours: ``join`` also counts the wait for the join against the target (``longest_gap_s``), and ``margin`` plans with a
part of the target, since the belief knows nothing of the memory that both parts share. ``duet-static`` is the paper's
ablation: fixed parts whenever there are both decodes and prompts, the whole GPU otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.types import Role, Slo
from penstock.perf.sm_share import SATURATION, SharedGpu, shared_gpu
from penstock.policy.engine import EngineKit, EngineParts, Share, Sharing, Situation
from penstock.policy.mixed import LeastTokens
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.splits import Work, best_division, fixed_division

_STEPS = Option("max-steps", 256.0, "most decode steps beside one prefill", low=1.0)
_SATURATION = Option("saturation", SATURATION, "believed share of the SMs that draws all bandwidth", low=0.01, high=1.0)

DUET_OPTIONS = (
    Option("target", 0.0, "longest time between two tokens, seconds; 0: the TPOT target of the SLO", low=0.0),
    Option("margin", 0.9, "share of the target to plan with", low=0.1, high=1.0),
    Option("join", "counted", "does the wait for the join count against the target?", words=("counted", "free")),
    _STEPS,
    _SATURATION,
)
DUET_STATIC_OPTIONS = (
    Option("decode-share", 0.2, "share of the SMs for decodes while there are prompts", low=0.01, high=0.99),
    _STEPS,
    _SATURATION,
)


class AdaptiveSharing(Sharing):
    """All SMs for a mixed step within ``target_s``, else the best division, else the decodes alone."""

    def __init__(self, gpu: SharedGpu, target_s: float, max_steps: int, count_join: bool) -> None:
        self.gpu = gpu
        self.target_s = target_s
        self.max_steps = max_steps
        self.count_join = count_join

    def share(self, situation: Situation, new: list[int], past: list[int]) -> Share | None:
        """See :class:`Sharing`."""
        work = Work(situation.decodes, situation.context, new, past)
        if self.gpu.whole.step_s(work.decodes, work.context, new, past) <= self.target_s:
            return None
        found = best_division(self.gpu, work, self.target_s, self.max_steps, self.count_join)
        if found is None:
            return Share(self.gpu.curve.sms, 0, 1)
        return Share(found.decode_sms, found.prefill_sms, found.steps)


class FixedSharing(Sharing):
    """``decode_sms`` SMs for the decodes whenever there are prompts too."""

    def __init__(self, gpu: SharedGpu, decode_sms: int, max_steps: int) -> None:
        self.gpu = gpu
        self.decode_sms = decode_sms
        self.max_steps = max_steps

    def share(self, situation: Situation, new: list[int], past: list[int]) -> Share | None:
        """See :class:`Sharing`."""
        work = Work(situation.decodes, situation.context, new, past)
        found = fixed_division(self.gpu, work, self.decode_sms, self.max_steps)
        return Share(found.decode_sms, found.prefill_sms, found.steps)


class SharingKit(EngineKit):
    """One ``Sharing`` for all engines: it keeps no state but the models of the parts.

    Made when the first engine asks: where engines are real, nobody does, and what is believed need not be divisible.
    """

    def __init__(self, make: Callable[[], Sharing]) -> None:
        self.make = make
        self.made: Sharing | None = None

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`. Raises PenstockError if the believed step model cannot be divided."""
        if self.made is None:
            self.made = self.make()
        return EngineParts(sharing=self.made)


def duet(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``duet``."""
    target_s = number(options, "target") or slo.tpot_s

    def sharing() -> Sharing:
        return AdaptiveSharing(
            shared_gpu(beliefs.step, number(options, "saturation")),
            target_s * number(options, "margin"),
            int(number(options, "max-steps")),
            word(options, "join") == "counted",
        )

    return Policy("duet", LeastTokens(), engine=SharingKit(sharing))


def duet_static(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``duet-static``."""

    def sharing() -> Sharing:
        gpu = shared_gpu(beliefs.step, number(options, "saturation"))
        wanted = number(options, "decode-share") * gpu.curve.sms
        decode_sms = min(gpu.curve.parts(), key=lambda sms: abs(sms - wanted))
        return FixedSharing(gpu, decode_sms, int(number(options, "max-steps")))

    return Policy("duet-static", LeastTokens(), engine=SharingKit(sharing))
