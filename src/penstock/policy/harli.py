"""Harli (arXiv 2511.11729): LoRA fine-tuning in what decode instances leave of their GPU, with the TPOT kept.

Ours in the spirit of the paper: only its abstract was at hand. It names one memory pool for both jobs
(``sim.pages``), a two-stage latency predictor (``policy.corun``) and a scheduler that divides the SMs so that TPOT
holds and fine-tuning gets the most. Here the scheduler goes through all shares and micro-batches from the largest
predicted fine-tuning throughput down and takes the first whose predicted decode step, at the end of the steps for
which the choice stands, keeps the TPOT target less a margin. If there is none, fine-tuning rests. The margin is learnt
from the requests that end (:class:`MeasuredLimit`): TPOT also counts the wait for the decode batch, and what that takes
of the target depends on how short the answers are.

``split=static`` divides the SMs once and for all, ``split=idle`` tunes only while nothing decodes, ``split=off`` not at
all: the baselines.
"""

from __future__ import annotations

from math import inf
from typing import Final

import numpy as np

from penstock.core.events import Aborted, Event, Finished, PrefillDone
from penstock.core.types import Role, Slo
from penstock.perf.tuning import Profiler
from penstock.policy.corun import CoRunPredictor, Pair, profile
from penstock.policy.engine import EngineKit, EngineParts, Situation, Tuning, TuningShare
from penstock.policy.latency import PrefillFit
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Part, Policy
from penstock.policy.placement import FewestRequests, LeastPrefillWork
from penstock.policy.view import ClusterView

HARLI_OPTIONS = (
    Option("split", "adaptive", "how SMs are divided", "ours", words=("adaptive", "static", "idle", "off")),
    Option(
        "margin", 0.2, "part of the TPOT target that predictions must leave, to begin with", "ours", low=0.0, high=0.9
    ),
    Option("late", 0.004, "part of the requests that may miss TPOT; 0: the margin stays", "ours", low=0.0, high=0.5),
    Option("hold", 32.0, "decode steps after which a choice is looked at again", "ours", low=1.0, high=10_000.0),
    Option("reserve", 0.3, "part of the KV blocks that must stay free, or nothing is tuned", "ours", low=0.0, high=1.0),
    Option("share", 0.5, "split=static: part of the SMs that decode has", "ours", low=0.02, high=0.98),
)

_FINE: Final = 1.02
"""Contexts are rounded up to powers of it, so that a choice is worked out once for what is nearly alike."""


_LEAST: Final = 0.3
_MOST: Final = 0.9
"""The limit of a step, in TPOT targets: between these."""
_BACK: Final = 0.02
"""What one late request takes of the limit, in TPOT targets."""


class MeasuredLimit(Part):
    """The limit of a decode step, such that a part ``late`` of the requests misses TPOT.

    A late request lowers it by :data:`_BACK`, one in time raises it by as much as balances that at a share ``late``.

    Attributes
    ----------
    limit_s : float
        In whole percents of the target, so that choices are worked out for few limits.
    """

    def __init__(self, tpot_s: float, margin: float, late: float) -> None:
        self.observes = late > 0.0 and tpot_s < inf
        self.tpot_s = tpot_s
        self.late = late
        self._share = 1.0 - margin
        self._start = self._share
        self._first_s: dict[int, float] = {}
        self.limit_s = tpot_s * self._share

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Part`. Requests that are computed again have their first token once."""
        if isinstance(event, PrefillDone):
            self._first_s.setdefault(event.request, now_s)
        elif isinstance(event, Aborted):
            self._first_s.pop(event.request, None)
        elif isinstance(event, Finished):
            first_s = self._first_s.pop(event.request, now_s)
            if event.generated > 1:
                self.ended((now_s - first_s) / (event.generated - 1))

    def ended(self, tpot_s: float) -> None:
        """A request has ended with this TPOT."""
        self._share += _BACK * (self.late - (tpot_s > self.tpot_s))
        self._share = min(max(self._share, _LEAST), _MOST)
        self.limit_s = self.tpot_s * round(100.0 * self._share) / 100.0

    def strictness(self) -> float:
        """The limit as a share of the one in the beginning, at most 1."""
        return min(self._share / self._start, 1.0)


class Limits:
    """Memory: what a micro-batch of each size needs, and the blocks to leave alone.

    With a ``limit`` that has fallen below where it began, fewer may be lent: a late request may have lacked either.
    """

    def __init__(self, pages: dict[int, int], reserve: float, limit: MeasuredLimit | None = None) -> None:
        self.pages = dict(sorted(pages.items(), reverse=True))
        self.reserve = reserve
        self.limit = limit

    def room(self, situation: Situation) -> float:
        """Blocks that may be lent."""
        lent = (1.0 - self.reserve) * (self.limit.strictness() if self.limit is not None else 1.0)
        return situation.free_blocks - (1.0 - lent) * situation.capacity_blocks

    def largest(self, situation: Situation) -> int:
        """The largest micro-batch that fits; 0 if none does."""
        room = self.room(situation)
        for sequences, pages in self.pages.items():
            if pages <= room:
                return sequences
        return 0


class AdaptiveSplit(Tuning):
    """The fastest fine-tuning whose predicted decode step keeps the limit; looked at again every ``hold`` steps."""

    def __init__(self, predictor: CoRunPredictor, limits: Limits, limit: MeasuredLimit, hold: int) -> None:
        self.predictor = predictor
        self.limits = limits
        self.limit = limit
        self.hold = hold
        self._known: dict[tuple[int, int, float], dict[int, Pair]] = {}

    def share(self, situation: Situation) -> TuningShare:
        """See :class:`Tuning`."""
        if situation.decodes == 0:
            return TuningShare(0, self.limits.largest(situation))
        room = self.limits.room(situation)
        best: Pair | None = None
        for pair in self.feasible(situation.decodes, situation.context).values():
            if pair.pages <= room and (best is None or pair.tokens_per_s > best.tokens_per_s):
                best = pair
        if best is None:
            return TuningShare(0, 0, self.hold)
        return TuningShare(best.sms, best.sequences, self.hold)

    def feasible(self, batch: int, context: int) -> dict[int, Pair]:
        """The fastest pair of each micro-batch size that keeps the limit while ``hold`` more tokens a decode come."""
        step = int(np.ceil(np.log(context + self.hold * batch) / np.log(_FINE)))
        limit_s = self.limit.limit_s
        found = self._known.get((batch, step, limit_s))
        if found is None:
            found = {}
            fits = self.predictor.seconds(batch, _FINE**step) <= limit_s
            for i in np.flatnonzero(fits):
                pair = self.predictor.pairs[int(i)]
                found.setdefault(pair.sequences, pair)
            self._known[(batch, step, limit_s)] = found
        return found


class StaticSplit(Tuning):
    """Always the same SMs for decode, and the largest micro-batch that memory has room for."""

    def __init__(self, limits: Limits, decode_sms: int) -> None:
        self.limits = limits
        self.decode_sms = decode_sms

    def share(self, situation: Situation) -> TuningShare:
        """See :class:`Tuning`."""
        return TuningShare(self.decode_sms, self.limits.largest(situation))


class IdleOnly(Tuning):
    """The whole GPU while nothing decodes, nothing otherwise."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def share(self, situation: Situation) -> TuningShare:
        """See :class:`Tuning`."""
        return TuningShare(0, 0 if situation.decodes else self.limits.largest(situation))


class TuningKit(EngineKit):
    """Fine-tuning on every decode instance; the predictor is fitted once for all."""

    def __init__(self, profiler: Profiler, slo: Slo, options: dict[str, OptionValue]) -> None:
        self.split = word(options, "split")
        self.hold = int(number(options, "hold"))
        self.limit = MeasuredLimit(slo.tpot_s, number(options, "margin"), number(options, "late"))
        sizes = profiler.truth.job.sequences
        limit = self.limit if self.split == "adaptive" else None
        self.limits = Limits({k: profiler.truth.pages(k) for k in sizes}, number(options, "reserve"), limit)
        parts = profiler.truth.gpu.curve.parts()
        self.decode_sms = min(parts, key=lambda sms: abs(sms - number(options, "share") * profiler.truth.sms))
        self.predictor = CoRunPredictor(profile(profiler)) if self.split == "adaptive" else None

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        if role is not Role.DECODE:
            return EngineParts()
        if self.predictor is not None:
            return EngineParts(tuning=AdaptiveSplit(self.predictor, self.limits, self.limit, self.hold))
        if self.split == "static":
            return EngineParts(tuning=StaticSplit(self.limits, self.decode_sms))
        return EngineParts(tuning=IdleOnly(self.limits))


def harli(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``harli``. Without a profiler in the beliefs (no roofline, the live world) nothing is tuned."""
    profiler = beliefs.tuning if word(options, "split") != "off" else None
    kit = TuningKit(profiler, slo, options) if profiler is not None else None
    observers = (kit.limit,) if kit is not None and kit.predictor is not None else ()
    return Policy("harli", LeastPrefillWork(PrefillFit(beliefs)), FewestRequests(), observers=observers, engine=kit)
