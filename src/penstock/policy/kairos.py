"""Kairos (arXiv 2605.02329): prompts in the order of their slack, and decode steps without the long requests.

*Prefill* (algorithms 1 and 2). A waiting prompt will be done after its uncached tokens over the present prefill
throughput. What is then left to its TTFT deadline is its slack, which its length normalises to an urgency. The most
urgent prompt is computed; one that is partly computed may be set aside for it.

*Decode* (algorithm 3). A step costs what its longest contexts cost. While every request is ahead of its TPOT schedule,
long ones may sit out a step: ``slack = first token + generated * TPOT - now - step(all)`` is how long a request can
wait and still take part in a full step in time. The least slack of all is the budget; requests are added by ascending
length while the step stays within it. The subset runs if its throughput is above that of all. Tokens then come in
bursts, and a buffer at the client paces them (``report/pacing.py``).

The step table holds (batch, length) as the paper's does, profiled from what the policy believes and corrected by the
mean of what was measured. Ours, because the text that we had does not give it: how the length enters.
Slack *over* length, least first, puts a long prompt before a short one while both have time, and loses to first come,
first served; slack *times* length lets a long prompt wait while it has slack, which is what the paper describes, and is
the default. Ours too: what happens to prompts whose deadline is lost (``late``), a reserve of slack, the window of the
throughput, and the placement (the paper has one instance of each kind).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final

from penstock.core.events import Aborted, Event, PrefillDone, RequestArrived
from penstock.core.types import Role, Slo
from penstock.policy.engine import Batching, Composition, EngineKit, EngineParts, Job, QueueOrder, Situation
from penstock.policy.latency import PrefillFit
from penstock.policy.length_order import Guard
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Part, Policy
from penstock.policy.placement import LeastPrefillWork, LeastResident
from penstock.policy.view import ClusterView

KAIROS_OPTIONS = (
    Option(
        "order",
        "weighted",
        "prompts by slack times length (weighted), slack over length (per-token), slack (laxity), arrival; or off",
        words=("weighted", "per-token", "laxity", "arrival", "off"),
    ),
    Option(
        "late",
        "last",
        "prompts that can no longer make their TTFT target: after all others, shortest first; or as the rest (same)",
        words=("last", "same"),
    ),
    Option("max_age", 0.0, "seconds after arrival from which a prompt goes first; 0: never", low=0.0),
    Option(
        "subset",
        "tight",
        "leave long requests out of a decode step: when all do not fit (tight), whenever that is faster, or never",
        "paper",
        words=("tight", "fastest", "off"),
    ),
    Option("reserve", 0.0, "seconds of slack that every decode keeps when long requests are left out", low=0.0),
    Option("window", 16.0, "prefills over which throughput is measured", low=1.0),
    Option("prior", 100.0, "measurements that the profiled step table counts for, per cell", "paper", low=0.0),
)

LATE: Final = 1e12
"""Base of the urgency of a prompt that is too late: more than any slack times any length."""
_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LENGTHS: Final = (0, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)


# -- prefill ----------------------------------------------------------------------------------------------------------


def prefill_slack_s(left_tokens: float, deadline_s: float, now_s: float, tokens_per_s: float) -> float:
    """Seconds that a prompt with ``left_tokens`` to compute can still wait; negative if its target is lost."""
    return deadline_s - now_s - left_tokens / tokens_per_s


class Throughput(Part):
    """Prefill tokens per second of each instance, over the latest prefills and the time that they took.

    Parameters
    ----------
    start : float
        Tokens/s before anything was measured; counts as one prefill of ``start`` tokens.
    window : int
        Prefills remembered.
    """

    observes = True

    def __init__(self, start: float, window: int) -> None:
        self.start = start
        self.window = window
        self._waiting: dict[int, tuple[float, int]] = {}
        self._latest: dict[int, deque[tuple[float, float]]] = {}
        self._done_s: dict[int, float] = {}

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """Note arrivals and ends of prefills."""
        if isinstance(event, RequestArrived):
            self._waiting[event.request] = (now_s, event.prompt_tokens)
        elif isinstance(event, Aborted):
            self._waiting.pop(event.request, None)
        elif isinstance(event, PrefillDone):
            known = self._waiting.pop(event.request, None)
            if known is not None:
                self.note(event.instance, known[0], now_s, known[1])

    def note(self, instance: int, arrived_s: float, done_s: float, tokens: int) -> None:
        """A prompt that arrived at ``arrived_s`` is done; the engine was at it since then, or since the one before."""
        if instance not in self._latest:
            self._latest[instance] = deque([(self.start, 1.0)], self.window)
        busy_s = done_s - max(arrived_s, self._done_s.get(instance, 0.0))
        self._done_s[instance] = done_s
        self._latest[instance].append((float(tokens), busy_s))

    def tokens_per_s(self, instance: int) -> float:
        """Present throughput."""
        latest = self._latest.get(instance)
        if latest is None:
            return self.start
        tokens = sum(entry[0] for entry in latest)
        seconds = sum(entry[1] for entry in latest)
        # All done in the step in which they came: nothing was measured.
        return tokens / seconds if seconds > 0.0 else self.start


class SlackOrder(QueueOrder):
    """Waiting prompts by their slack (algorithms 1 and 2).

    ``weigh`` is how the length enters: ``weighted``, ``per-token``, ``laxity`` (not at all), or ``arrival`` (nor does
    slack). With ``late_last``, prompts without slack come after all others, the shortest first.
    """

    def __init__(self, throughput: Throughput, weigh: str = "weighted", late_last: bool = True) -> None:
        self.throughput = throughput
        self.weigh = weigh
        self.late_last = late_last

    def sets_aside(self) -> bool:
        """See :class:`QueueOrder`."""
        return True

    def urgency(self, job: Job, situation: Situation) -> float:
        """See :class:`QueueOrder`. What waits for KV, or is computed again amid its output, goes first."""
        if job.pull or job.first_token_s >= 0.0:
            return -inf
        deadline_s = job.arrival_s + job.ttft_s
        rate = self.throughput.tokens_per_s(situation.instance)
        slack = prefill_slack_s(job.left, deadline_s, situation.now_s, rate)
        if slack < 0.0 and self.late_last:
            return LATE + job.left
        if self.weigh == "weighted":
            return slack * job.tokens
        if self.weigh == "per-token":
            return slack / max(job.tokens, 1)
        return slack if self.weigh == "laxity" else job.arrival_s


# -- decode -----------------------------------------------------------------------------------------------------------


class StepTable:
    """Seconds of a decode step by batch and mean length, profiled from beliefs, corrected by what was measured.

    Between the profiled points it is linear in both. A cell's correction is the mean of measured over profiled, the
    profile itself counting as ``prior`` measurements.
    """

    def __init__(self, beliefs: Beliefs, prior: float) -> None:
        self.prior = prior
        self._grid = [[beliefs.decode_step_s(b, b * n) for n in _LENGTHS] for b in _BATCHES]
        self._sum = [[0.0 for _ in _LENGTHS] for _ in _BATCHES]
        self._count = [[0 for _ in _LENGTHS] for _ in _BATCHES]

    def seconds(self, requests: int, tokens: int) -> float:
        """Predicted step of ``requests`` (at least 1) that hold ``tokens`` together."""
        row, column = _cell(requests, tokens)
        correction = 1.0
        count = self._count[row][column]
        if count > 0:
            correction = (self.prior + self._sum[row][column]) / (self.prior + count)
        return correction * self._profiled(requests, tokens, row, column)

    def note(self, requests: int, tokens: int, seconds: float) -> None:
        """A step was measured."""
        row, column = _cell(requests, tokens)
        self._sum[row][column] += seconds / self._profiled(requests, tokens, row, column)
        self._count[row][column] += 1

    def _profiled(self, requests: int, tokens: int, row: int, column: int) -> float:
        low, high = self._grid[row], self._grid[row + 1]
        b = (requests - _BATCHES[row]) / (_BATCHES[row + 1] - _BATCHES[row])
        n = (tokens / requests - _LENGTHS[column]) / (_LENGTHS[column + 1] - _LENGTHS[column])
        left = low[column] + b * (high[column] - low[column])
        right = low[column + 1] + b * (high[column + 1] - low[column + 1])
        return left + n * (right - left)


def _cell(requests: int, tokens: int) -> tuple[int, int]:
    """Row and column of the cell; beyond the table its last cell, which then extrapolates."""
    row = min(bisect_right(_BATCHES, requests), len(_BATCHES) - 1) - 1
    column = min(bisect_right(_LENGTHS, tokens / requests), len(_LENGTHS) - 1) - 1
    return row, column


def subset(
    decodes: list[Job], now_s: float, table: StepTable, reserve_s: float = 0.0, fastest: bool = False
) -> list[Job]:
    """Those of ``decodes`` (at least one) that take the next step: the shortest ones, or all (algorithm 3).

    Every request keeps ``reserve_s`` of its slack. As many run as fit the budget, so that all do while slack is ample;
    with ``fastest`` it is those of the fitting ones that make the most tokens a second.
    """
    tokens = 0
    least_s = inf
    for job in decodes:  # a loop, since this is asked before every step
        tokens += job.tokens
        due_s = job.first_token_s + job.generated() * job.tpot_s
        if due_s < least_s:
            least_s = due_s
    full_s = table.seconds(len(decodes), tokens)
    budget_s = least_s - now_s - full_s - reserve_s
    if budget_s <= 0.0 or (budget_s >= full_s and not fastest):
        return decodes  # nobody may be left out, or everybody fits
    shortest = sorted(decodes, key=_length)
    held, number, rate = 0, 0, 0.0
    for n in range(1, len(shortest)):
        held += shortest[n - 1].tokens
        step_s = table.seconds(n, held)
        if step_s > budget_s:
            break
        if not fastest or n / step_s > rate:
            number, rate = n, n / step_s
    return shortest[:number] if rate > len(decodes) / full_s else decodes


def _length(job: Job) -> int:
    return job.tokens


class SlackBatching(Batching):
    """Decode steps of the subset that the least slack allows; measures every pure decode step."""

    def __init__(self, table: StepTable, reserve_s: float = 0.0, fastest: bool = False) -> None:
        self.table = table
        self.reserve_s = reserve_s
        self.fastest = fastest
        self._step = (0, 0)
        self._known: set[int] = set()

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        """See :class:`Batching`."""
        # Who has come since took part in the step unasked: what it cost says nothing of the subset.
        here = {job.request for job in decodes}
        if here <= self._known and self._step[0] > 0 and situation.last_step_s > 0.0:
            self.table.note(self._step[0], self._step[1], situation.last_step_s)
        self._known = here
        self._step = (0, 0)
        if not decodes:
            return Composition(decodes)
        chosen = subset(decodes, situation.now_s, self.table, self.reserve_s, self.fastest)
        if not waiting:
            self._step = (len(chosen), sum(job.tokens for job in chosen))
        return Composition(chosen)


class KairosKit(EngineKit):
    """Slack order where prompts are computed, slack batching where tokens are; None leaves it to the engine.

    All engines share the step table and the measured throughput.
    """

    def __init__(self, order: QueueOrder | None, batching: Callable[[], Batching] | None) -> None:
        self.order = order
        self.batching = batching

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        order = None if role == Role.DECODE else self.order
        batching = None if role == Role.PREFILL or self.batching is None else self.batching()
        return EngineParts(order, batching)


def kairos(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``kairos``."""
    chunk = beliefs.max_batched_tokens
    throughput = Throughput(chunk / beliefs.prefill_s(chunk), int(number(options, "window")))
    kind = word(options, "order")
    order: QueueOrder | None = None
    if kind != "off":
        order = SlackOrder(throughput, kind, word(options, "late") == "last")
        if number(options, "max_age") > 0.0:
            order = Guard(order, number(options, "max_age"), 0)
    batching: Callable[[], Batching] | None = None
    if word(options, "subset") != "off":
        table = StepTable(beliefs, number(options, "prior"))
        fastest = word(options, "subset") == "fastest"
        batching = partial(SlackBatching, table, number(options, "reserve"), fastest)
    return Policy(
        "kairos",
        LeastPrefillWork(PrefillFit(beliefs)),
        LeastResident(),
        observers=(throughput,),
        engine=KairosKit(order, batching),
    )
