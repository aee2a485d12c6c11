"""Queues that know lengths: shortest job first, TRAIL's limited preemption, and a guard against starvation.

* ``sjf``: the shortest predicted output joins first (SSJF, arXiv 2404.08509). Nobody who runs is thrown out.
* ``trail``: the shortest predicted *remaining* output first. A request with initial prediction ``r`` may be thrown out
  for a shorter one while it has fewer than ``C * r`` tokens out; it is computed again, so that late preemption would
  cost most (arXiv 2410.01035, section 3; ``C = 0.8``, 1 is full shortest remaining first, 0 never preempts).
* The guard: a request that is older than ``max_age``, or that ``max_passes`` later ones have overtaken, goes first and
  is not thrown out any more. Ours; the published form of the idea promotes after a number of idle steps
  (arXiv 2408.15792), which depends on how long a step is.

Where prompts alone are computed, output lengths say nothing about the work: there the shortest prompt goes first.
TRAIL renews its prediction at every token; an engine here is told the initial one, so that what remains is that less
what came. Where the world predicts nothing, the lengths of finished requests with like prompts stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from penstock.core.events import Aborted, DecodeStarted, Event, Finished, PrefillDone, RequestArrived
from penstock.core.types import Role, Slo
from penstock.policy.engine import QUEUED, EngineKit, EngineParts, Job, QueueOrder, Situation
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Part, Policy
from penstock.policy.view import ClusterView
from penstock.predict.by_prompt import PromptHistory

ORDER_WORDS = ("fcfs", "sjf", "trail")
ORDER_OPTIONS = (
    Option("order", "fcfs", "which waiting request joins an engine first", words=ORDER_WORDS),
    Option("c", 0.8, "trail: a request may be thrown out up to this share of its prediction", "paper", 0.0, 1.0),
    Option("prompt_weight", 0.0, "output tokens that one prompt token still to compute counts for", "paper", low=0.0),
    Option("max_age", 0.0, "seconds after arrival from which a request goes first; 0: never", low=0.0),
    Option("max_passes", 0.0, "later requests that may overtake one; 0: any number", low=0.0),
)

FIRST: Final = -1e15
"""Base of the urgency of those that the guard puts first; among them the oldest leads."""


class Lengths(Part):
    """Predicted output lengths: the world's where it has any, else those of finished requests with like prompts."""

    observes = True

    def __init__(self) -> None:
        self.history = PromptHistory()
        self.guards: dict[int, Guard] = {}
        self._prompt: dict[int, int] = {}
        self._initial: dict[int, float] = {}

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """Note arrivals and ends."""
        if isinstance(event, RequestArrived):
            self._prompt[event.request] = event.prompt_tokens
            self._initial[event.request] = self.history.remaining(event.prompt_tokens, 0)
        elif isinstance(event, (PrefillDone, DecodeStarted)):
            guard = self.guards.get(event.instance)
            if guard is not None:
                guard.started(event.request)
        elif isinstance(event, Finished):
            prompt = self._prompt.get(event.request)
            if prompt is not None:
                self.history.finished(prompt, event.generated)
            self._forget(event.request)
        elif isinstance(event, Aborted):
            self._forget(event.request)

    def _forget(self, request: int) -> None:
        self._prompt.pop(request, None)
        self._initial.pop(request, None)
        for guard in self.guards.values():
            guard.forget(request)

    def total(self, job: Job) -> float:
        """Output tokens that were expected of ``job`` when it arrived."""
        if job.predicted_output >= 0.0:
            return job.predicted_output
        known = self._initial.get(job.request)
        return self.history.remaining(job.prompt_tokens, 0) if known is None else known

    def remaining(self, job: Job) -> float:
        """Output tokens still expected of ``job``, at least 0."""
        if job.predicted_output >= 0.0:
            return max(job.predicted_output - job.generated(), 0.0)
        return self.history.remaining(job.prompt_tokens, job.generated())


class Shortest(QueueOrder):
    """The least predicted output first, plus ``prompt_weight`` times the prompt tokens still to compute."""

    def __init__(self, lengths: Lengths, prompt_weight: float = 0.0) -> None:
        self.lengths = lengths
        self.prompt_weight = prompt_weight

    def urgency(self, job: Job, situation: Situation) -> float:
        """See :class:`QueueOrder`. On a prefill instance, the tokens still to compute."""
        if situation.role == Role.PREFILL:
            return float(job.left)
        return self.lengths.remaining(job) + self.prompt_weight * job.left


class ShortestRemaining(Shortest):
    """The same with limited preemption (TRAIL)."""

    def __init__(self, lengths: Lengths, c: float, prompt_weight: float = 0.0) -> None:
        super().__init__(lengths, prompt_weight)
        self.c = c

    def evicts(self) -> bool:
        """See :class:`QueueOrder`."""
        return self.c > 0.0

    def may_evict(self, running: Job, waiting: Job, situation: Situation) -> bool:
        """See :class:`QueueOrder`. A request's age is the number of tokens it has generated."""
        return running.generated() < self.c * self.lengths.total(running)


class Guard(QueueOrder):
    """Another order in which nobody starves.

    Parameters
    ----------
    inner : QueueOrder
    max_age_s : float
        Seconds after its arrival from which a request goes first; 0: never.
    max_passes : int
        Requests that arrived later and may start before it on the same engine; 0: any number.
    """

    def __init__(self, inner: QueueOrder, max_age_s: float, max_passes: int) -> None:
        self.inner = inner
        self.max_age_s = max_age_s
        self.max_passes = max_passes
        self._waiting: dict[int, float] = {}  # request -> arrival
        self._passes: dict[int, int] = {}
        self._promoted: set[int] = set()

    def sets_aside(self) -> bool:
        """See :class:`QueueOrder`."""
        return self.inner.sets_aside()

    def evicts(self) -> bool:
        """See :class:`QueueOrder`."""
        return self.inner.evicts()

    def urgency(self, job: Job, situation: Situation) -> float:
        """See :class:`QueueOrder`."""
        if self.max_passes > 0 and job.state == QUEUED:
            self._waiting[job.request] = job.arrival_s
        if self.protects(job, situation.now_s):
            return FIRST + job.arrival_s
        return self.inner.urgency(job, situation)

    def may_evict(self, running: Job, waiting: Job, situation: Situation) -> bool:
        """See :class:`QueueOrder`."""
        return not self.protects(running, situation.now_s) and self.inner.may_evict(running, waiting, situation)

    def protects(self, job: Job, now_s: float) -> bool:
        """Has ``job`` waited too long, or been overtaken too often?"""
        if 0.0 < self.max_age_s < now_s - job.arrival_s:
            return True
        return job.request in self._promoted

    def started(self, request: int) -> None:
        """A request that waited here has started: it has overtaken all that came before it and still wait."""
        arrival_s = self._waiting.pop(request, None)
        self._passes.pop(request, None)
        if arrival_s is None:
            return
        for other, other_arrival_s in self._waiting.items():
            if other_arrival_s < arrival_s:
                passes = self._passes.get(other, 0) + 1
                self._passes[other] = passes
                if passes >= self.max_passes:
                    self._promoted.add(other)

    def forget(self, request: int) -> None:
        """A request has left the cluster."""
        self._waiting.pop(request, None)
        self._passes.pop(request, None)
        self._promoted.discard(request)


class LengthKit(EngineKit):
    """An order by length in every engine, guarded where the options say so. All engines share what lengths are known.

    ``order`` is ``sjf`` or ``trail``; the other options are those of ``ORDER_OPTIONS``.
    """

    def __init__(self, lengths: Lengths, options: dict[str, OptionValue]) -> None:
        self.lengths = lengths
        self.trail = word(options, "order") == "trail"
        self.c = number(options, "c")
        self.prompt_weight = number(options, "prompt_weight")
        self.max_age_s = number(options, "max_age")
        self.max_passes = int(number(options, "max_passes"))

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        order: QueueOrder = Shortest(self.lengths, self.prompt_weight)
        if self.trail:
            order = ShortestRemaining(self.lengths, self.c, self.prompt_weight)
        if self.max_age_s > 0.0 or self.max_passes > 0:
            guard = Guard(order, self.max_age_s, self.max_passes)
            self.lengths.guards[instance] = guard
            order = guard
        return EngineParts(order)


Build = Callable[[Beliefs, Slo, dict[str, OptionValue]], Policy]


def ordered(build: Build) -> Build:
    """A builder whose policies also order their engines' queues, by ``ORDER_OPTIONS``, which it needs besides its own.

    With ``order`` at ``fcfs`` the policy is what it was: nobody starves there, so that the guard has nothing to do.
    """

    def built(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
        policy = build(beliefs, slo, options)
        if word(options, "order") != "fcfs":
            lengths = Lengths()
            policy.observers.append(lengths)
            policy.engine = LengthKit(lengths, options)
        return policy

    return built
