"""The engine that divides its GPU: decode steps on some SMs while the prompts of the batch are computed on the others.

Everything else is ``leaping.LeapingEngine``'s. When a batch of decodes and prompt chunks has been made, the policy's
``Sharing`` part says how it runs: in one step on all SMs, as ever; divided; or the decodes alone while the prompts wait
for a better moment, keeping their blocks. Divided (DuetServe, arXiv 2511.04791, section 4), the engine runs ``k``
decode steps and one prefill, then joins both and looks at the queue again:

* blocks for all ``k`` steps are taken beforehand; ``k`` is cut where they are not there;
* nobody joins or leaves meanwhile. A request that ends in step ``j < k`` overruns: the client has its last token, what
  comes after is thrown away, its slot and blocks stay taken until the join. Time is that of the full batch;
* decode tokens go out as they come, first tokens at the join; if the prefill ends last, the decodes wait, and their
  next gap is longer by that.

Both parts take their solo times on their SMs, stretched while both run by what ``perf.contention`` says of the memory
they share. The clock of the chip and its cache are not modelled.
"""

from __future__ import annotations

from math import inf
from typing import Any, Final

from penstock.core.errors import PenstockError
from penstock.core.events import Load
from penstock.perf.contention import Contention
from penstock.perf.sm_share import shared_gpu
from penstock.perf.step import StepModel
from penstock.policy.engine import EngineParts, Share, Sharing
from penstock.sim.cluster import InstanceSpec
from penstock.sim.engine import GapLog
from penstock.sim.leaping import LeapingEngine
from penstock.sim.seq import DECODING, GONE, PREFILLING, Notice, Seq

_SAME_S: Final = 1e-9
"""Moments no further apart than this are one, since sums of steps round."""


class Leg:
    """``steps`` decode steps in a row, the first ``first_s`` long, each next one ``rise_s`` longer."""

    def __init__(self, steps: int, first_s: float, rise_s: float) -> None:
        self.steps = steps
        self.first_s = first_s
        self.rise_s = rise_s

    def span_s(self, steps: int) -> float:
        """Seconds of its first ``steps`` steps."""
        return steps * self.first_s + self.rise_s * (0.5 * steps * (steps - 1))

    def after(self, steps: int) -> Leg:
        """What is left after the first ``steps``."""
        return Leg(self.steps - steps, self.first_s + self.rise_s * steps, self.rise_s)

    def slowed(self, factor: float) -> Leg:
        """The same, ``factor`` times longer."""
        return Leg(self.steps, self.first_s * factor, self.rise_s * factor)

    def steps_within(self, seconds: float) -> int:
        """Whole steps that end within ``seconds``."""
        low, high = 0, self.steps
        while low < high:
            middle = (low + high + 1) // 2
            if self.span_s(middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


def timeline(legs: list[Leg], prefill_s: float, slow_decode: float, slow_prefill: float) -> tuple[list[Leg], float]:
    """Decode steps and a prefill side by side: both slowed until one ends, the other at its solo pace from then on.

    Returns
    -------
    legs : list of Leg
        The decode steps as they really take.
    join_s : float
        Seconds until both have ended.
    """
    decode_s = sum([leg.span_s(leg.steps) for leg in legs])
    if decode_s * slow_decode <= prefill_s * slow_prefill:
        slowed = [leg.slowed(slow_decode) for leg in legs]
        return slowed, decode_s * slow_decode + prefill_s - decode_s * slow_decode / slow_prefill
    found: list[Leg] = []
    left_s = prefill_s * slow_prefill / slow_decode  # solo seconds of decode until the prefill ends
    for leg in legs:
        within = leg.steps_within(left_s) if left_s > 0.0 else 0
        if within > 0:
            found.append(Leg(within, leg.first_s, leg.rise_s).slowed(slow_decode))
        rest = leg.after(within)
        left_s -= leg.span_s(within)
        if rest.steps > 0:
            if left_s > 0.0:  # the prefill ends in the middle of this step
                found.append(Leg(1, rest.first_s + left_s * (slow_decode - 1.0), 0.0))
                rest = rest.after(1)
                left_s = 0.0
            if rest.steps > 0:
                found.append(rest)
    return found, sum([leg.span_s(leg.steps) for leg in found])


class DuetEngine(LeapingEngine):
    """``dividing`` from the beginning of a division to its join; ``legs`` are the decode steps still to begin."""

    def __init__(
        self,
        index: int,
        spec: InstanceSpec,
        gaps: GapLog,
        hash_tokens: int = 0,
        noise: list[float] | None = None,
    ) -> None:
        super().__init__(index, spec, gaps, hash_tokens, noise)
        self.sharing: Sharing | None = None
        self.gpu: Any = shared_gpu(spec.step_model, saturation=spec.sm_saturation)
        self.contention: Any = Contention(self.gpu, spec.shared_bandwidth)
        self.dividing = False
        self.legs: list[Leg] = []
        self.join_s = 0.0
        self.reserved = 0  # blocks taken for decode steps of this division that have not begun
        self.decoded_s = 0.0  # when the latest decode step of this division ended
        self.held: list[Seq] = []  # chunks that wait while the decodes run alone
        # Decodes whose next gap includes a wait of late_s for the join: those with tickets up to late_ticket.
        self.late = 0
        self.late_s = 0.0
        self.late_ticket = 0
        self.divisions = 0
        self.waited_s = 0.0

    def equip(self, parts: EngineParts) -> None:
        """See :class:`Engine`."""
        if parts.clock is not None:
            raise PenstockError("an engine cannot both divide its GPU and set its clock", "leave one of the parts out")
        super().equip(parts)
        self.sharing = parts.sharing

    # -- planning ---------------------------------------------------------------------------------------------------

    def _plan(self, now: float) -> None:
        """As the leaping engine; with decodes and prompts in the batch, as the policy says."""
        for seq in self.held:
            if seq.state == PREFILLING:  # neither preempted nor dropped meanwhile
                self.chunks.append(seq)
        self.held = []
        sharing = self.sharing
        if not self.chunks or self.batch == 0 or sharing is None:
            super()._plan(now)
            return
        new = [seq.chunk for seq in self.chunks]
        past = [seq.computed for seq in self.chunks]
        share = sharing.share(self._look(now), new, past)
        if share is not None and share.prefill_sms > 0:
            self._divide(share, new, past, now)
            return
        if share is not None:
            self.held = self.chunks
            self.chunks = []
        super()._plan(now)

    def _divide(self, share: Share, new: list[int], past: list[int], now: float) -> None:
        """Begin ``share.steps`` decode steps beside the prefill."""
        steps = max(1, share.steps)
        while steps > 1 and self._growth_of(steps - 1) > self.free:
            steps -= 1
        batch, context = self.batch, self.context
        decode_model: StepModel = self.gpu.on(share.decode_sms)
        prefill_model: StepModel = self.gpu.on(share.prefill_sms)
        middle = context + batch * (steps // 2)
        decoding = self.contention.phases(share.decode_sms, lambda model: model.step_s(batch, middle, [], []))
        prefilling = self.contention.phases(share.prefill_sms, lambda model: model.step_s(0, 0, new, past))
        slow_decode, slow_prefill = self.contention.stretch(decoding, prefilling)
        factor = self._factor()
        alone = [leg.slowed(factor) for leg in _legs(decode_model, batch, context, steps)]
        prefill_s = prefill_model.step_s(0, 0, new, past) * factor
        self.legs, span_s = timeline(alone, prefill_s, slow_decode, slow_prefill)
        self.reserved = self._growth_of(steps - 1)
        self.free -= self.reserved
        self._note_low(self.free)
        self.dividing = True
        self.divisions += 1
        self.join_s = now + span_s
        self.decoded_s = now
        self._next_leg(now)

    def _next_leg(self, now: float) -> None:
        """Begin the next decode steps of the division, up to the first that ends a request, or wait for the join."""
        self.version += 1
        self.begin_s = now
        if not self.legs or self.batch == 0:
            self.legs = []
            self.planned = 0
            self.wake_s = max(now, self.join_s)
            return
        leg = self.legs.pop(0)
        steps = min(leg.steps, self._steps_to_an_end())
        if steps < leg.steps:
            self.legs.insert(0, leg.after(steps))
        self.first_s = leg.first_s
        self.rise_s = leg.rise_s
        self.planned = steps
        self.last_step_s = leg.first_s
        self.wake_s = self.time_of(steps)

    def _look_again(self, now: float, calm: bool) -> None:
        """A division is not interrupted; all is looked at again when it joins."""
        if self.dividing:
            self.wake_again = False
            return
        super()._look_again(now, calm)

    def _budget(self, now: float) -> int:
        """None while chunks wait: they are the next prefill."""
        return 0 if self.held else super()._budget(now)

    # -- time passes ------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[Notice]:
        """See :class:`Engine`. Within a division: its next decode steps."""
        if not self.dividing:
            return super().begin(now)
        if self.legs and self.batch > 0:
            grown = self.growth[self.step % self.block_size]
            self.reserved -= grown
            self.taken += grown
        self._next_leg(now)
        return []

    def settle(self, now: float) -> list[Notice]:
        """See :class:`Engine`. Within a division: end its decode steps until ``now``, and at the join all of it."""
        if not self.dividing:
            return super().settle(now)
        notices: list[Notice] = []
        if self.planned > 0:
            self._end_leg(now, notices)
        if (not self.legs or self.batch == 0) and self.join_s - now < _SAME_S:
            self._join(now, notices)
        return notices

    def _end_leg(self, now: float, notices: list[Notice]) -> None:
        steps = self.planned
        grown = self._growth_of(steps - 1)  # the books take them now: they were reserved
        self.free += grown
        self.reserved -= grown
        self._account(steps)
        self.decoded_s = now
        for seq in self.aborted:
            if seq.state == DECODING:
                self._catch_up(seq, now)
                self._leave_batch(seq)
                self._overrun(seq)
        self.aborted = [seq for seq in self.aborted if seq.state != GONE]
        self._end_finished(now, notices)

    def _join(self, now: float, notices: list[Notice]) -> None:
        waited_s = now - self.decoded_s
        self._spend(waited_s)
        self.dividing = False
        self.free += self.reserved
        self.reserved = 0
        self._end_lingering()
        if waited_s > 0.0 and self.batch > 0:
            self.waited_s += waited_s
            self.late = self.batch
            self.late_s = waited_s
            self.late_ticket = self.order
        if self.aborted:
            self._purge(now)
        self._end_chunks(now, notices)
        if self.leaving:
            self._let_go(now, notices)

    # -- who is late, and who overruns ------------------------------------------------------------------------------

    def _log_gaps(self, k: int) -> None:
        """The first gap of those who waited for the join is longer by the wait."""
        late = self.late
        if late == 0:
            super()._log_gaps(k)
            return
        self.late = 0
        first, rise = self.first_s, self.rise_s
        self.gaps.add(first + self.late_s, 0.0, 1, late)
        for seq in self.joined:
            self.gaps.add(self.begin_s + first - seq.last_token_s, 0.0, 1, 1)
        others = self.batch - late - len(self.joined)
        if others > 0:
            self.gaps.add(first, 0.0, 1, others)
        if k > 1:
            self.gaps.add(first + rise, rise, k - 1, self.batch)
        self.joined.clear()

    def _is_late(self, seq: Seq) -> bool:
        return self.late > 0 and seq.ticket <= self.late_ticket

    def _catch_up(self, seq: Seq, now: float) -> None:
        super()._catch_up(seq, now)
        if self._is_late(seq):
            seq.last_token_s = now - self.late_s

    def _leave_batch(self, seq: Seq) -> None:
        if self._is_late(seq):
            self.late -= 1
        super()._leave_batch(seq)

    def _retire(self, seq: Seq) -> None:
        if not self.dividing:
            super()._retire(seq)
            return
        del self.seqs[seq.request]
        self._overrun(seq)

    def _overrun(self, seq: Seq) -> None:
        """The GPU goes on with it until the join: its slot and blocks stay taken."""
        self.lingering_blocks += seq.blocks
        self.lingering_slots += 1
        seq.blocks = 0
        self._free(seq)
        seq.state = GONE

    def _end_lingering(self) -> None:
        if not self.dividing:
            super()._end_lingering()

    # -- what the world asks and orders -----------------------------------------------------------------------------

    def load(self, now: float) -> Load:
        """See :class:`Engine`. Blocks of steps to come count as used."""
        if not self.dividing:
            return super().load(now)
        done = self.steps_done(now)
        waiting = len(self.seqs) - len(self.running)
        step_s = self.first_s + self.rise_s * done if self.planned > 0 else self.last_step_s
        return Load(self.batch, waiting, self.context + done * self.batch, self.free, step_s, self.clock_level())

    def _poke(self, now: float, newcomer: bool = False) -> None:
        """Nothing changes before the join."""
        if not self.dividing:
            super()._poke(now, newcomer)

    def _note_dip(self, now: float) -> None:
        """Within a division blocks are taken beforehand."""
        if not self.dividing:
            super()._note_dip(now)

    def _cut_short(self, now: float) -> None:
        if self.dividing:
            self.chunks = []
            self.free += self.reserved
        super()._cut_short(now)
        self.dividing = False
        self.held = []
        self.legs = []
        self.reserved = 0
        self.late = 0


def _legs(model: StepModel, batch: int, context: int, steps: int) -> list[Leg]:
    """``steps`` decode steps of ``batch`` requests from ``context`` KV tokens on, alone; a leg for each line."""
    found: list[Leg] = []
    while steps > 0:
        intercept, slope, limit = model.decode_affine(batch, context)
        count = steps if limit == inf else min(steps, max(1, int((limit - context) / batch) + 1))
        found.append(Leg(count, intercept + slope * context, slope * batch))
        context += count * batch
        steps -= count
    return found
