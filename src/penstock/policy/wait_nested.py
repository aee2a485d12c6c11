"""Nested WAIT (arXiv 2504.11320): WAIT for output lengths that nobody knows.

Stages (tokens generated so far) are cut into segments. Requests queue at the entrance of each; whoever ends in an
earlier segment never gets there. In each step the longest run of segments 1..k takes part whose entrances have all
gathered their thresholds; the later ones pause and keep their KV. If the first has not gathered, the engine rests.
Memory is bounded but for a small probability (``plan.nested``).

Ours: the segments and their thresholds follow the lengths of finished requests; thresholds below 1, patience and the
rivals as in ``wait``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import inf
from typing import Final

from penstock.core.errors import PenstockError
from penstock.core.types import Role, Slo
from penstock.plan.fluid import nested_cap, segment_ends, solve
from penstock.plan.nested import Segments, batch_tokens, whole_thresholds
from penstock.policy.engine import Batching, Composition, EngineKit, EngineParts, Job, Situation
from penstock.policy.mixed import LeastTokens
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.wait import FCFS, SHARED_OPTIONS, STANDING_STEPS, WAIT, CappedFcfs, Rule, rule_of
from penstock.policy.wait_traffic import OPEN, Gate, Lengths, Traffic, gate

NESTED_OPTIONS = (
    *SHARED_OPTIONS,
    Option("segments", 4.0, "parts of equal length that the stages are cut into", "paper", low=1.0, high=100.0),
    Option("eta", 0.05, "slack of a segment's threshold over the share that survives", "paper", low=0.0, high=0.99),
)
_ALL: Final = 0
"""The one type of requests."""
_REVIEWS: Final = 20.0
_SLACK_S: Final = 1e-9


class NestedWaitBatching(Batching):
    """Nested WAIT on one engine. Segment k ends with stage ``ends[k]``, the last one never; ``gates`` are by segment.

    ``gather_s`` is what the first threshold takes to gather.
    """

    def __init__(self, ends: Sequence[int], gates: Sequence[Gate], waits: bool = True, patience: float = inf) -> None:
        self.ends = list(ends)
        self.gates = list(gates)
        self.waits = waits
        self.patience = patience
        self.gather_s = inf
        self.latest_s = 0.0

    def watch(self, waiting: list[Job], situation: Situation) -> None:
        """Take note of who waits, before they are judged."""

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        """See :class:`Batching`."""
        self.watch(waiting, situation)
        inner = self.ends[:-1]
        stages = [job.generated() for job in decodes]
        where = [bisect_left(inner, stage) for stage in stages]
        entrances = [len(waiting)] + [0] * len(inner)
        for k in range(len(decodes)):
            if where[k] > 0 and stages[k] == inner[where[k] - 1] + 1:
                entrances[where[k]] += 1
        deepest = self._deepest(entrances, situation.now_s)
        if deepest < 0:
            due_s = self.latest_s + self.patience * self.gather_s
            return Composition([], [], 1, due_s - situation.now_s if due_s < inf else inf)
        used: dict[int, int] = {}
        room = [own.running for own in self.gates]
        run: list[Job] = []
        steps = STANDING_STEPS
        for k in range(len(decodes)):
            segment = where[k]
            if segment > deepest or room[segment] <= 0.0:
                continue
            limit = self.gates[segment].stage
            if limit < inf:
                steps = 1
                there = used.get(stages[k], 0)
                if there >= limit:
                    continue
                used[stages[k]] = there + 1
            if segment < len(inner):
                steps = min(steps, inner[segment] + 1 - stages[k])
            room[segment] -= 1.0
            run.append(decodes[k])
        most = int(max(min(self.gates[0].stage, room[0], len(waiting)), 0.0))
        return Composition(run, waiting[:most], 1 if self.gates[0].stage < inf else max(steps, 1))

    def _deepest(self, entrances: list[int], now_s: float) -> int:
        """The last segment that takes part, -1 if none does."""
        if not self.waits or now_s >= self.latest_s + self.patience * self.gather_s - _SLACK_S:
            return len(entrances) - 1
        k = 0
        while k < len(entrances) and entrances[k] >= self.gates[k].start:
            k += 1
        return k - 1


class LearningNestedWait(NestedWaitBatching):
    """Nested WAIT with segments and thresholds from the lengths of finished requests and the traffic of one engine."""

    def __init__(self, rule: Rule, lengths: Lengths, segments: int, eta: float, waits: bool, patience: float) -> None:
        super().__init__([0], [OPEN], waits, patience)
        self.rule = rule
        self.segments = segments
        self.eta = eta
        self.lengths = lengths
        self.traffic = Traffic(rule.window_s, lengths)
        self.review_s = 0.0
        self.cap = inf

    def watch(self, waiting: list[Job], situation: Situation) -> None:
        """See :class:`NestedWaitBatching`: count, and review the thresholds when it is time."""
        self.traffic.note(waiting, [_ALL] * len(waiting))
        self.latest_s = self.traffic.latest_s.get(_ALL, 0.0)
        if situation.now_s < self.review_s:
            return
        known = self.lengths.known(_ALL)
        flows = self.rule.believed(self.traffic.flows(situation.now_s, predicted=False))
        if known is None or not flows:
            return
        self.review_s = situation.now_s + self.rule.window_s / _REVIEWS
        found = segments_of(sorted(known), self.segments, flows[_ALL].prompt, flows[_ALL].rate_rps)
        self.ends = [int(end) for end in found.ends]
        self.gates = self._gates(found, situation.capacity_blocks * situation.block_size)
        self.gather_s = self.gates[0].start / flows[_ALL].rate_rps
        limits = zip(self.gates, found.stages(), strict=True)
        self.cap = sum(min(own.stage * length, own.running) for own, length in limits)

    def _gates(self, segments: Segments, capacity_tokens: float) -> list[Gate]:
        """One gate a segment.

        With a cap, the paper's practical rule. Else, where a request or more starts every segment in a step of the
        fluid, the smallest whole thresholds that keep up; where fewer do, limits that share the memory; and where
        neither fits or keeps up, thresholds that share the memory.
        """
        survival, stages = segments.survival(), segments.stages()
        if self.rule.cap > 0.0:
            return _each(nested_cap(survival, stages, self.rule.cap, self.eta), stages)
        room = self.rule.fill * capacity_tokens
        shape = nested_cap(survival, stages, 1.0, self.eta)
        scaled = [n * room / batch_tokens(segments, shape) for n in shape]
        try:
            step_s = solve(segments.flows(), self.rule.cost).step_s
            if segments.rates[-1] * step_s < 1.0:
                return [Gate(0, inf, max(n * length, 1.0)) for n, length in zip(scaled, stages, strict=True)]
            whole = whole_thresholds(segments, self.rule.cost, self.eta, self.rule.margin)
        except PenstockError:
            return _each(scaled, stages)
        return _each(whole if batch_tokens(segments, whole) <= room else scaled, stages)


def _each(thresholds: Sequence[float], stages: Sequence[float]) -> list[Gate]:
    return [gate(n, length) for n, length in zip(thresholds, stages, strict=True)]


def segments_of(lengths: Sequence[int], count: int, prompt: float, rate_rps: float) -> Segments:
    """Segments of equal length over output lengths (tokens, ascending); those in which nothing ends join the next."""
    last = [length - 1 for length in lengths]
    ends: list[float] = []
    shares: list[float] = []
    before = 0
    for end in segment_ends(max(last[-1], 1), count):
        until = len(last) if end >= last[-1] else bisect_left(last, end + 1)
        if until > before:
            ends.append(float(end))
            shares.append((until - before) / len(last))
        before = until
    return Segments(prompt, tuple(ends), tuple(rate_rps * share for share in shares))


class LearningCap(CappedFcfs):
    """First come, first served, capped at what the thresholds of ``learner`` let run."""

    def __init__(self, learner: LearningNestedWait) -> None:
        super().__init__(inf)
        self.learner = learner

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        """See :class:`Batching`."""
        self.learner.watch(waiting, situation)
        self.cap = self.learner.cap
        return super().compose(decodes, waiting, situation)


class NestedWaitKit(EngineKit):
    """Puts Nested WAIT, or a rival, into each engine."""

    def __init__(self, rule: Rule, lengths: Lengths, batching: str, segments: int, eta: float, patience: float) -> None:
        self.rule = rule
        self.lengths = lengths
        self.batching = batching
        self.segments = segments
        self.eta = eta
        self.patience = patience

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        if self.batching == FCFS and self.rule.cap > 0.0:
            return EngineParts(batching=CappedFcfs(self.rule.cap))
        part = LearningNestedWait(
            self.rule, self.lengths, self.segments, self.eta, self.batching == WAIT, self.patience
        )
        return EngineParts(batching=LearningCap(part) if self.batching == FCFS else part)


def nested_wait(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``nested-wait``."""
    lengths = Lengths()
    kit = NestedWaitKit(
        rule_of(beliefs, options),
        lengths,
        word(options, "batching"),
        int(number(options, "segments")),
        number(options, "eta"),
        number(options, "patience"),
    )
    return Policy("nested-wait", LeastTokens(), observers=(lengths,), engine=kit)
