"""The engine that fine-tunes beside its decodes: SMs and memory are divided, and both jobs pay what that truly costs.

Everything else is ``leaping.LeapingEngine``'s. A decode step takes what it takes on its SMs, times the contention for
bandwidth at the start of its leap; a leap ends where the policy wants to look again. Steps with prompts have the whole
GPU. How the two jobs get in each other's way:

* decode gets SMs back at a boundary of fine-tuning, so one step more is made with the old ones; where it had none (it
  was idle, or a prompt wants the whole GPU) it waits for a boundary;
* activations hold KV blocks (``sim.pages``). If KV wants them, they go at the next boundary, the step waits for it and
  the micro-batch starts anew; another size of micro-batch is taken up when the one in progress ends.

A boundary is the end of a layer, and always the longest possible wait is charged. Tokens count when their micro-batch
is done.
"""

from __future__ import annotations

from math import inf
from typing import Final

from penstock.core.errors import PenstockError
from penstock.core.events import Load
from penstock.core.types import Role
from penstock.perf.tuning import CoRun
from penstock.policy.engine import UNTIL_CHANGE, EngineParts, Situation, Tuning, TuningShare
from penstock.sim.cluster import InstanceSpec
from penstock.sim.engine import GapLog
from penstock.sim.leaping import LeapingEngine
from penstock.sim.pages import PagePool
from penstock.sim.seq import Notice

_REST: Final = -1
"""SMs of decode while fine-tuning rests: all."""


class TuningEngine(LeapingEngine):
    """``pool`` numbers every block; the engine's own count of free blocks leaves out what is lent."""

    def __init__(
        self,
        index: int,
        spec: InstanceSpec,
        gaps: GapLog,
        hash_tokens: int = 0,
        noise: list[float] | None = None,
    ) -> None:
        super().__init__(index, spec, gaps, hash_tokens, noise)
        self.truth = CoRun(self.model, self.block_size)
        self.whole = self.model
        self.tuning: Tuning | None = None
        self.pool = PagePool(self.capacity_blocks)
        self.kv: list[int] = []
        # Fine-tuning: sequences of the micro-batch in progress (0: none), the part of it that is done, the seconds it
        # takes at the present speed, and the time up to which that is counted (-1: the instance is down).
        self.sequences = 0
        self.progress = 0.0
        self.micro_batch_s = inf
        self.tuned_to_s = 0.0
        self.finetune_tokens = 0
        self.between = False  # a micro-batch has ended since the last look
        self.dropped_tokens = 0.0
        # Sharing: SMs of decode, its contention, steps until the next look, seconds the next step is late.
        self.decode_sms = _REST
        self.contended = 1.0
        self.hold = UNTIL_CHANGE
        self.told = False  # fine-tuning knows that it must give SMs back; it has by the next boundary
        self.late_s = 0.0

    def equip(self, parts: EngineParts) -> None:
        """See :class:`Engine`. What fine-tuning keeps (adapter, optimiser) leaves the KV cache for good.

        Raises
        ------
        PenstockError
            That does not fit, or the policy sets clocks too.
        """
        super().equip(parts)
        if parts.clock is not None:
            raise PenstockError("fine-tuning beside decode is not modelled at changing clocks", "use one of the two")
        state = self.truth.state_pages
        if state >= self.capacity_blocks or not self.pool.reserve_state(state):
            raise PenstockError(
                f"the state of fine-tuning fills {state} KV blocks of {self.capacity_blocks}", "give more --kv-blocks"
            )
        self.tuning = parts.tuning
        self.capacity_blocks -= state
        self.free -= state
        self.least_free = self.free
        self.situation.capacity_blocks = self.capacity_blocks

    # -- what the world asks ----------------------------------------------------------------------------------------

    def load(self, now: float) -> Load:
        """See :class:`Engine`: lent blocks are free to whoever asks for them."""
        load = super().load(now)
        lent = len(self.pool.lent)
        return Load(load.running, load.waiting, load.decode_tokens, load.free_blocks + lent, load.step_s)

    def _look(self, now: float) -> Situation:
        situation = super()._look(now)
        situation.free_blocks += len(self.pool.lent)
        return situation

    def _note_low(self, free: int) -> None:
        self.least_free = min(self.least_free, free + len(self.pool.lent))
        if self.cache is not None:
            self.cache.shrink(free)

    def die(self, now: float) -> None:
        """See :class:`Engine`. The micro-batch is lost; adapter and optimiser come back from a checkpoint."""
        self.tune_to(now)
        super().die(now)
        self._lose()
        self.pool.end_micro_batch()
        self.free = self.capacity_blocks
        self._number_blocks()
        self.tuned_to_s = -1.0
        self.micro_batch_s = inf
        self.late_s = 0.0

    # -- the clock --------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[Notice]:
        """See :class:`Engine`: KV that lacks blocks first has lent ones given back."""
        self.tune_to(now)
        if self.pool.lent:
            wanted = self._wanted_blocks()
            if wanted > self.free:
                self._reclaim(wanted)
        return super().begin(now)

    def _plan(self, now: float) -> None:
        self._divide(now)
        super()._plan(now)
        if self.planned == 0:
            return
        if self.late_s > 0.0:
            self.first_s += self.late_s
            self.late_s = 0.0
            self.planned = 1
        self.planned = min(self.planned, self.hold)
        self.wake_s = self.time_of(self.planned)

    def _factor(self) -> float:
        return super()._factor() * self.contended

    # -- sharing the SMs --------------------------------------------------------------------------------------------

    def _divide(self, now: float) -> None:
        """Ask the policy, take a micro-batch up if there is room, and fix at what speed both jobs go on."""
        sharing = self._ask(now)
        self.hold = max(1, sharing.steps)
        sequences = self._take_up(sharing.sequences)
        sms = sharing.decode_sms if sequences > 0 else _REST
        if self._more(sms):
            if self.batch > 0 and not self.chunks and self.decode_sms > 0 and not self.told:
                self.told = True
                self.hold = 1
                sms = self.decode_sms
            else:
                if not self.told:
                    self.late_s = max(self.late_s, self.micro_batch_s * self.truth.boundary_share())
                self.told = False
        else:
            self.told = False
        self.decode_sms = sms
        truth = self.truth
        if sms == _REST:
            self.model = self.whole
            self.contended = 1.0
            self.micro_batch_s = inf
            return
        decode, tuning = truth.factors(sms, self.sequences, self.batch, self.context)
        self.model = truth.decode_model(sms) if self.batch > 0 else self.whole
        self.contended = decode
        self.micro_batch_s = truth.tuning_alone_s(truth.sms - sms, self.sequences) * tuning * self.slow

    def _ask(self, now: float) -> TuningShare:
        part = self.tuning
        if part is None or self.chunks or self.situation.role != Role.DECODE:
            return TuningShare(_REST, 0)
        sharing = part.share(self._look(now))
        if self.batch > 0 and not 0 < sharing.decode_sms < self.truth.sms:
            return TuningShare(_REST, 0, sharing.steps)
        return sharing

    def _more(self, sms: int) -> bool:
        """Does decode want SMs that fine-tuning works on?"""
        if self.sequences == 0 or self.micro_batch_s == inf or (self.batch == 0 and not self.chunks):
            return False
        return self.decode_sms != _REST and (sms == _REST or sms > self.decode_sms)

    def tune_to(self, now: float) -> None:
        """Count the fine-tuning up to ``now``."""
        since, self.tuned_to_s = self.tuned_to_s, now
        if since < 0.0 or self.sequences == 0 or self.micro_batch_s == inf:
            return
        self.progress += (now - since) / self.micro_batch_s
        done = int(self.progress)
        if done > 0:
            self.progress -= done
            self.finetune_tokens += done * self.truth.tokens(self.sequences)
            self.between = True

    # -- sharing the blocks -----------------------------------------------------------------------------------------

    def _take_up(self, sequences: int) -> int:
        """Sequences of the micro-batch to work on, 0 for none: the one in progress, or a new one if blocks allow."""
        ended, self.between = self.between, False
        if sequences == 0:
            return 0
        if self.sequences > 0 and (sequences == self.sequences or not ended):
            return self.sequences
        if self.waiting or self.ready:
            return self.sequences
        self._number_blocks()
        begun = 0.0  # tokens of the micro-batch that has followed the one that ended
        if self.sequences > 0:
            begun = self.progress * self.truth.tokens(self.sequences)
            self._hand_back()
        pages = self.truth.pages(sequences)
        if not self.pool.lend(pages):
            return 0
        self.free -= pages
        self.taken += pages
        self.sequences = sequences
        self.progress = begun / self.truth.tokens(sequences)
        self._note_low(self.free)
        return sequences

    def _number_blocks(self) -> None:
        """Make the pool hold as many pages for KV as the engine counts."""
        held = self.capacity_blocks - self.free - len(self.pool.lent)
        change = held - len(self.kv)
        if change > 0:
            pages = self.pool.take(change)
            assert pages is not None, "KV holds blocks that the pool has not"
            self.kv.extend(pages)
        elif change < 0:
            self.pool.give(self.kv[change:])
            del self.kv[change:]

    def _wanted_blocks(self) -> int:
        """Blocks that KV could take in the step that begins: growth, the prompt in progress, all that waits."""
        wanted = self.growth[self.step % self.block_size]
        for seq in self.ready:
            wanted += max(0, self._blocks(seq.tokens) - self._held(seq))
        for seq in self.waiting:
            wanted += max(0, self._blocks(seq.tokens) - self._held(seq))
        partial = self.partial
        if partial is not None:
            wanted += max(0, self._blocks(partial.tokens) - self._held(partial))
        return wanted

    def _reclaim(self, wanted: int) -> None:
        """KV lacks blocks: at the next boundary the activations go, and the step waits for it."""
        self._number_blocks()
        lent = len(self.pool.lent)
        self.pool.take(min(wanted, self.free + lent))  # too few are free: the pool notes it
        if self.micro_batch_s < inf:
            self.late_s = max(self.late_s, self.micro_batch_s * self.truth.boundary_share())
        went = self.pool.boundary()
        assert went, "KV waits for blocks that are free"
        self.free += lent
        self.pool.withdraw()  # what it takes of them is numbered with the rest
        self._lose()

    def _lose(self) -> None:
        """The micro-batch in progress is lost."""
        self.dropped_tokens += self.progress * self.truth.tokens(self.sequences) if self.sequences > 0 else 0.0
        self.progress = 0.0
        self.sequences = 0

    def _hand_back(self) -> None:
        """Activations go by themselves."""
        self.free += len(self.pool.lent)
        self.pool.end_micro_batch()
        self.sequences = 0
        self.progress = 0.0
