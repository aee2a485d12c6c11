"""Parts that act inside an engine: queue order, batch composition, prompt budget, clock.

The other parts (``parts.py``) answer for the cluster, once per request or tick. These answer for one instance, at the
boundary of a step, and each instance has its own. They see :class:`Job` (a request on this engine) and
:class:`Situation` (the engine) and change neither. An engine without parts behaves as stock vLLM does.

Compiled, as the engines are: a compiled class does not see an attribute that an interpreted subclass overrides, so
settings of a part are methods.
"""

from __future__ import annotations

from math import inf
from typing import Final

from mypy_extensions import mypyc_attr

from penstock.core.events import NO_PREDICTION
from penstock.core.types import Role, Slo

QUEUED: Final = 0
"""Waits to be computed (from the start, or the rest of it), or for blocks to pull its KV into."""
DECODING: Final = 1
PAUSED: Final = 2
"""Would decode, but a :class:`Batching` part left it out of the latest step; it keeps its KV."""

UNTIL_CHANGE: Final = 1 << 60
"""Steps for which a choice stands that only a change ends."""


class Job:
    """One request on an engine, brought up to date before a part is asked.

    ``tokens`` is its length (prompt and output so far), ``left`` the tokens still to compute before the next one can
    come out (0 for one that decodes, or waits for a pull), ``blocks`` what it holds here. ``predicted_output`` is the
    total number of output tokens that the world's predictor expected on arrival, ``NO_PREDICTION`` without one.
    ``first_token_s`` is -1 before the first token.
    """

    def __init__(self, request: int, prompt_tokens: int, slo: Slo, slo_class: int, arrival_s: float) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.ttft_s = slo.ttft_s
        self.tpot_s = slo.tpot_s
        self.slo_class = slo_class
        self.arrival_s = arrival_s
        self.predicted_output: float = NO_PREDICTION
        self.first_token_s = -1.0
        self.state: int = QUEUED
        self.tokens = prompt_tokens
        self.left = prompt_tokens
        self.blocks = 0
        self.pull = False

    def generated(self) -> int:
        """Output tokens so far."""
        return self.tokens - self.prompt_tokens


class Situation:
    """An engine at a step boundary. ``decodes`` requests read ``context`` KV tokens together; ``clock`` is a level."""

    def __init__(self, instance: int, role: Role, block_size: int, capacity_blocks: int) -> None:
        self.instance = instance
        self.role = role
        self.block_size = block_size
        self.capacity_blocks = capacity_blocks
        self.max_running = 0
        self.max_batched_tokens = 0
        self.now_s = 0.0
        self.free_blocks = 0
        self.decodes = 0
        self.context = 0
        self.waiting = 0
        self.last_step_s = 0.0
        self.clock = 0


@mypyc_attr(allow_interpreted_subclasses=True)
class QueueOrder:
    """In which order do the waiting requests of one engine join? Asked whenever some could."""

    def sets_aside(self) -> bool:
        """May a partly computed prompt wait, keeping its KV, while a more urgent one is computed? Asked once."""
        return False

    def evicts(self) -> bool:
        """Is :meth:`may_evict` worth asking? Asked once."""
        return False

    def urgency(self, job: Job, situation: Situation) -> float:
        """Smaller joins sooner; ties keep their order in the queue, where preempted requests come first."""
        raise NotImplementedError

    def may_evict(self, running: Job, waiting: Job, situation: Situation) -> bool:
        """May ``waiting``, which is more urgent and has no room, throw out ``running`` (it is computed again)?"""
        return False


class Composition:
    """Who takes part in the next step.

    ``run`` are those of the decodes that do; the others pause. ``enter`` are the waiting prompts that may join, in this
    order (None: as many as fit). The choice stands for ``steps`` steps unless something changes; where nothing runs,
    for ``rest_s`` seconds.
    """

    def __init__(self, run: list[Job], enter: list[Job] | None = None, steps: int = 1, rest_s: float = inf) -> None:
        self.run = run
        self.enter = enter
        self.steps = steps
        self.rest_s = rest_s


@mypyc_attr(allow_interpreted_subclasses=True)
class Batching:
    """Which of the runnable requests does the next step compute?"""

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        """Choose from ``decodes`` (in order of admission, paused ones included) and ``waiting`` (in queue order).

        With nothing chosen the engine rests until something arrives, or the choice says to look again.
        """
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Chunking:
    """How many prompt tokens may share a step with the decodes? Not asked where prompts are not cut at all."""

    def budget(self, situation: Situation, partial: Job | None) -> int:
        """Prompt tokens of the next step; ``partial`` is the prompt in progress. At most ``max_batched_tokens`` count.

        0 computes none; a step without decodes computes at least one token.
        """
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Clock:
    """At which clock level does an engine run? 0 is the lowest of the instance's levels."""

    def max_steps(self) -> int:
        """The choice is looked at again after so many decode steps at the latest. Asked once."""
        return 16

    def choose(self, situation: Situation, prompts: list[Job], prompt_tokens: int) -> int:
        """The level for the next step, which computes ``prompt_tokens`` of ``prompts`` beside the decodes.

        Asked when the step is composed, if it or the one before has prompts, if the number of decodes has changed or
        somebody has begun or ceased to wait, and after ``max_steps``. ``situation.waiting`` counts those that the step
        has no room for.
        """
        raise NotImplementedError


class Share:
    """One GPU for two batches: ``decode_sms`` SMs run ``steps`` decode steps while ``prefill_sms`` run the prompts.

    With ``prefill_sms`` 0 the decodes go on alone and the prompts wait (``steps`` does not count).
    """

    def __init__(self, decode_sms: int, prefill_sms: int, steps: int) -> None:
        self.decode_sms = decode_sms
        self.prefill_sms = prefill_sms
        self.steps = steps


@mypyc_attr(allow_interpreted_subclasses=True)
class Sharing:
    """How do the decodes and the prompts of one batch share the GPU?"""

    def share(self, situation: Situation, new: list[int], past: list[int]) -> Share | None:
        """Answer for the decodes of ``situation`` (one or more) and prompt chunks of ``new`` tokens after ``past``.

        None: all in one step, on all SMs.
        """
        raise NotImplementedError


class TuningShare:
    """How a GPU is divided between decode and fine-tuning for the next ``steps`` steps, unless something changes.

    ``decode_sms`` of its SMs are decode's, the others work on micro-batches of ``sequences`` sequences; with 0
    sequences fine-tuning rests and decode has them all.
    """

    def __init__(self, decode_sms: int, sequences: int, steps: int = UNTIL_CHANGE) -> None:
        self.decode_sms = decode_sms
        self.sequences = sequences
        self.steps = steps


@mypyc_attr(allow_interpreted_subclasses=True)
class Tuning:
    """How much of its GPU does an engine leave to fine-tuning? Asked before every decode batch that is new."""

    def share(self, situation: Situation) -> TuningShare:
        """Choose; ``situation.decodes`` is 0 while the engine has nothing to decode. Lent blocks count as free."""
        raise NotImplementedError


class EngineParts:
    """The parts of one engine; None where it behaves as stock vLLM does."""

    def __init__(
        self,
        order: QueueOrder | None = None,
        batching: Batching | None = None,
        chunking: Chunking | None = None,
        clock: Clock | None = None,
        tuning: Tuning | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        self.order = order
        self.batching = batching
        self.chunking = chunking
        self.clock = clock
        self.sharing = sharing
        self.tuning = tuning


@mypyc_attr(allow_interpreted_subclasses=True)
class EngineKit:
    """What a policy puts into engines: override :meth:`parts`. Also the place for state that its engines share."""

    def parts(self, instance: int, role: Role) -> EngineParts:
        """Fresh parts for an instance that starts with ``role``. They are asked in every role it later takes."""
        raise NotImplementedError
