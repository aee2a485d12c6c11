"""WAIT (arXiv 2504.11320): start a batch only when enough of a type have gathered, never more than a threshold a stage.

The output length of a request is taken to be known on arrival, as a class. For each type j there is a threshold n_j.
Whenever the engine is free, every type with n_j waiting prompts takes part in the next step: at most n_j requests of
each of its stages (tokens generated so far). The other types pause and keep their KV. If no type has gathered, the
engine rests. So no stage ever holds more than n_j, and memory never exceeds ``sum n_j K_j`` (``plan.fluid``).

Ours: thresholds follow rates that are counted on the way; thresholds below 1 (``wait_traffic.gate``); a type that has
stopped arriving is waited for no longer (``patience``), since the last requests of a trace would never end; two rivals
for comparison, the thresholds without the wait (the authors' own ablation) and first-come-first-served with the same
number of running requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Final

from penstock.core.errors import PenstockError
from penstock.core.types import Role, Slo
from penstock.plan.fluid import MARGIN, Flow, StepCost, shared_cap, solve, whole_thresholds
from penstock.policy.engine import Batching, Composition, EngineKit, EngineParts, Job, Situation
from penstock.policy.mixed import LeastTokens
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.wait_traffic import OPEN, UNKNOWN, Gate, Lengths, Traffic, gate, step_cost

WAIT: Final = "wait"
NO_WAIT: Final = "no-wait"
FCFS: Final = "fcfs"
STANDING_STEPS: Final = 64
"""Steps for which a batch without limits on stages stands, if nothing comes or ends."""
_REVIEWS: Final = 20.0
_SLACK_S: Final = 1e-9

SHARED_OPTIONS = (
    Option(
        "batching",
        WAIT,
        "wait for thresholds; no-wait: thresholds only limit; fcfs: the same number of requests, no types",
        "paper",
        words=(WAIT, NO_WAIT, FCFS),
    ),
    Option("cap", 0.0, "requests that may run at once on an engine; 0 = from the fluid model", "paper", low=0.0),
    Option("margin", MARGIN, "how much longer than it runs a batch takes to gather", low=0.0, high=1.0),
    Option("fill", 0.9, "share of the KV cache that thresholds may fill", low=0.01, high=1.0),
    Option("rate", 0.0, "believed requests/s of an engine; 0 = counted", low=0.0),
    Option("window", 60.0, "seconds of arrivals that are counted", low=0.1),
    Option("patience", 3.0, "gathering times without an arrival after which the wait ends", low=0.0),
)
WAIT_OPTIONS = (
    *SHARED_OPTIONS,
    Option("types", "predicted", "what tells types apart: predicted output or SLO class", words=("predicted", "class")),
    Option("bin", 50.0, "output tokens in a class of predicted outputs", "paper", low=1.0),
)


class WaitBatching(Batching):
    """WAIT on one engine. ``gates`` and ``gather_s`` (seconds that a threshold takes to gather) are by type."""

    def __init__(self, gates: Mapping[int, Gate], waits: bool = True, patience: float = inf) -> None:
        self.gates = dict(gates)
        self.waits = waits
        self.patience = patience
        self.gather_s: dict[int, float] = {}
        self.latest_s: dict[int, float] = {}

    def kind(self, job: Job) -> int:
        """The type of a request; here its SLO class."""
        return job.slo_class

    def watch(self, waiting: list[Job], kinds: list[int], situation: Situation) -> None:
        """Take note of who waits, before they are judged."""

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        """See :class:`Batching`."""
        kinds = [self.kind(job) for job in waiting]
        self.watch(waiting, kinds, situation)
        running = [self.kind(job) for job in decodes]
        gathered: dict[int, int] = dict.fromkeys(running, 0)
        for kind in kinds:
            gathered[kind] = gathered.get(kind, 0) + 1
        active, rest_s = self._active(gathered, situation.now_s)
        if not active:
            return Composition([], [], 1, rest_s)
        used: dict[tuple[int, int], int] = {}
        room: dict[int, float] = {}
        run: list[Job] = []
        for k in range(len(decodes)):
            own = active.get(running[k])
            if own is None:
                continue
            if own.stage < inf:
                at = (running[k], decodes[k].generated())
                there = used.get(at, 0)
                if there >= own.stage:
                    continue
                used[at] = there + 1
            room[running[k]] = room.get(running[k], own.running) - 1.0
            run.append(decodes[k])
        enter: list[Job] = []
        for k in range(len(waiting)):
            own = active.get(kinds[k])
            if own is None:
                continue
            start = used.get((kinds[k], 0), 0)
            left = room.get(kinds[k], own.running)
            if start >= own.stage or left <= 0.0:
                continue
            used[(kinds[k], 0)] = start + 1
            room[kinds[k]] = left - 1.0
            enter.append(waiting[k])
        return Composition(run, enter, 1 if any(g.stage < inf for g in active.values()) else STANDING_STEPS)

    def _active(self, gathered: Mapping[int, int], now_s: float) -> tuple[dict[int, Gate], float]:
        """The types that take part, and when to look again if none does."""
        active: dict[int, Gate] = {}
        rest_s = inf
        for kind, count in gathered.items():
            own = self.gates.get(kind, OPEN)
            due_s = self.latest_s.get(kind, now_s) + self.patience * self.gather_s.get(kind, inf)
            if not self.waits or count >= own.start or now_s >= due_s - _SLACK_S:
                active[kind] = own
            else:
                rest_s = min(rest_s, due_s - now_s)
        return active, rest_s


class LearningWait(WaitBatching):
    """WAIT with thresholds that follow the traffic of one engine, reviewed 20 times in a ``window``."""

    def __init__(self, rule: Rule, lengths: Lengths, bin_tokens: float, waits: bool, patience: float) -> None:
        super().__init__({}, waits, patience)
        self.rule = rule
        self.bin_tokens = bin_tokens
        self.traffic = Traffic(rule.window_s, lengths)
        self.latest_s = self.traffic.latest_s
        self.review_s = 0.0
        self.flows: dict[int, Flow] = {}

    def kind(self, job: Job) -> int:
        """See :class:`WaitBatching`: the class of its predicted output, or its SLO class (``bin_tokens`` 0)."""
        if self.bin_tokens <= 0.0:
            return job.slo_class
        return int(job.predicted_output // self.bin_tokens) if job.predicted_output >= 0.0 else UNKNOWN

    def watch(self, waiting: list[Job], kinds: list[int], situation: Situation) -> None:
        """See :class:`WaitBatching`: count, and review the thresholds when it is time."""
        self.traffic.note(waiting, kinds)
        if situation.now_s < self.review_s:
            return
        found = self.rule.believed(self.traffic.flows(situation.now_s))
        if not found:
            return
        self.review_s = situation.now_s + self.rule.window_s / _REVIEWS
        self.flows = found
        flows = list(found.values())
        gates = self.rule.gates(flows, situation.capacity_blocks * situation.block_size)
        self.gates = dict(zip(found, gates, strict=True))
        for kind, own in self.gates.items():
            self.gather_s[kind] = own.start / found[kind].rate_rps


class CappedFcfs(Batching):
    """First come, first served, with at most ``cap`` requests at once: what a cap alone does."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        """See :class:`Batching`. A prompt that is computed over several steps comes on top."""
        room = max(int(min(self.cap - len(decodes), len(waiting))), 0)
        return Composition(decodes, waiting[:room], STANDING_STEPS)


class LearningFcfs(CappedFcfs):
    """The same, capped at what the thresholds of ``learner`` let run."""

    def __init__(self, learner: LearningWait) -> None:
        super().__init__(inf)
        self.learner = learner

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        """See :class:`Batching`."""
        learner = self.learner
        learner.watch(waiting, [learner.kind(job) for job in waiting], situation)
        if learner.gates:
            self.cap = sum(
                min(own.stage * learner.flows[kind].stages(), own.running) for kind, own in learner.gates.items()
            )
        return super().compose(decodes, waiting, situation)


class Rule:
    """From traffic to thresholds."""

    def __init__(self, cost: StepCost, cap: float, margin: float, fill: float, rate: float, window_s: float) -> None:
        self.cost = cost
        self.cap = cap
        self.margin = margin
        self.fill = fill
        self.rate = rate
        self.window_s = window_s

    def believed(self, counted: dict[int, Flow]) -> dict[int, Flow]:
        """The counted flows, scaled to the believed rate if one is given."""
        if self.rate <= 0.0 or not counted:
            return counted
        factor = self.rate / sum(flow.rate_rps for flow in counted.values())
        return {kind: Flow(f.prompt, f.output, f.rate_rps * factor) for kind, f in counted.items()}

    def gates(self, flows: list[Flow], capacity_tokens: float) -> list[Gate]:
        """One gate a type.

        With a cap, the paper's practical rule. Else types of which at least one starts in a step of the fluid get the
        smallest whole thresholds that keep up, and the others share the memory that is left; where that does not fit
        or is unstable, all share the memory in proportion to their rates.
        """
        if self.cap > 0.0:
            return _gates(flows, shared_cap(flows, self.cap))
        room = self.fill * capacity_tokens
        demand = sum(flow.rate_rps * flow.held() for flow in flows)
        overload = _gates(flows, [flow.rate_rps * room / demand for flow in flows])
        try:
            found = solve(flows, self.cost)
            dense = [flow for flow, n in zip(flows, found.starts, strict=True) if n >= 1.0]
            whole = dict(zip(dense, whole_thresholds(dense, self.cost, self.margin), strict=True)) if dense else {}
        except PenstockError:
            return overload
        left = room - sum(n * flow.held() for flow, n in whole.items())
        rare = sum(flow.rate_rps * flow.held() for flow in flows if flow not in whole)
        if left < rare * found.step_s:
            return overload
        gates = []
        for flow in flows:
            if flow in whole:
                gates.append(gate(whole[flow], flow.stages()))
            else:
                gates.append(Gate(0, inf, max(flow.rate_rps * left / rare * flow.stages(), 1.0)))
        return gates


def _gates(flows: list[Flow], thresholds: Sequence[float]) -> list[Gate]:
    return [gate(n, flow.stages()) for n, flow in zip(thresholds, flows, strict=True)]


class WaitKit(EngineKit):
    """Puts WAIT, or a rival, into each engine."""

    def __init__(self, rule: Rule, lengths: Lengths, batching: str, bin_tokens: float, patience: float) -> None:
        self.rule = rule
        self.lengths = lengths
        self.batching = batching
        self.bin_tokens = bin_tokens
        self.patience = patience

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        part = LearningWait(self.rule, self.lengths, self.bin_tokens, self.batching == WAIT, self.patience)
        if self.batching == FCFS:
            return EngineParts(batching=CappedFcfs(self.rule.cap) if self.rule.cap > 0.0 else LearningFcfs(part))
        return EngineParts(batching=part)


def rule_of(beliefs: Beliefs, options: dict[str, OptionValue]) -> Rule:
    """The rule that the shared options describe."""
    return Rule(
        step_cost(beliefs),
        number(options, "cap"),
        number(options, "margin"),
        number(options, "fill"),
        number(options, "rate"),
        number(options, "window"),
    )


def wait(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``wait``."""
    lengths = Lengths()
    bin_tokens = number(options, "bin") if word(options, "types") == "predicted" else 0.0
    kit = WaitKit(
        rule_of(beliefs, options), lengths, word(options, "batching"), bin_tokens, number(options, "patience")
    )
    return Policy("wait", LeastTokens(), observers=(lengths,), engine=kit)
