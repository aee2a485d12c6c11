"""What WAIT (arXiv 2504.11320) must know of its traffic, counted as it comes: rates, prompts and lengths by type.

The paper takes all of it as given. Here each engine counts the arrivals of the last ``window_s`` seconds by itself, and
lengths of finished requests are remembered for all engines together. All of this file is ours.
"""

from __future__ import annotations

from collections import deque
from math import ceil, floor, inf
from typing import Final

from penstock.core.events import Event, Finished
from penstock.plan.fluid import Flow, StepCost
from penstock.policy.engine import Job
from penstock.policy.latency import BatchFit
from penstock.policy.parts import Beliefs, Part
from penstock.policy.view import ClusterView

REMEMBERED: Final = 1000
"""Finished requests remembered, of each type."""
LEAST: Final = 20
"""Arrivals before anything is concluded from them."""
LEAST_FINISHED: Final = 100
"""The same of finished requests: the first to finish are the short ones."""
UNKNOWN: Final = -1
"""The type of requests that nothing is predicted for."""
_SHORT, _LONG = 256, 2048


def step_cost(beliefs: Beliefs) -> StepCost:
    """The believed step as WAIT's straight line; exact for a ``LinearStepModel`` without the quadratic term.

    A prompt token costs what it adds to a step of prompts of a usual length, 256 to 2,048 tokens.
    """
    fit = BatchFit(beliefs)
    prompt = (beliefs.prefill_s(_LONG) - beliefs.prefill_s(_SHORT)) / (_LONG - _SHORT)
    return StepCost(max(fit.c0, 1e-9), max(fit.c2, 0.0), max(prompt, 0.0), max(fit.c1, 0.0))


class Gate:
    """How many requests of a type (or segment) start, share a stage, and run in one step.

    ``start`` must be waiting before any starts; at most ``stage`` of each stage run, and ``running`` of all together.
    """

    def __init__(self, start: int, stage: float, running: float) -> None:
        self.start = start
        self.stage = stage
        self.running = running


OPEN: Final = Gate(0, inf, inf)
"""Nothing is known yet: whatever fits."""


def gate(threshold: float, stages: float) -> Gate:
    """A threshold as a gate.

    From 1 on it is the paper's. Below 1, where less than one request of the type arrives in a step, nothing is waited
    for, and the threshold is what it comes to over all stages: a limit of requests that run at once. The paper's
    experiments tune such limits (``tl``), as LLM engines start far less than one request a step.
    """
    if threshold >= 1.0:
        whole = floor(threshold + 0.5)
        return Gate(whole, whole, inf)
    return Gate(0, inf, max(ceil(threshold * stages), 1))


class Lengths(Part):
    """Output lengths of the latest finished requests, by type."""

    observes = True

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self.remembered = remembered
        self.types: dict[int, int] = {}
        self.finished: dict[int, deque[int]] = {}

    def came(self, request: int, kind: int) -> None:
        """A request of type ``kind`` came in."""
        self.types[request] = kind

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Part`."""
        if isinstance(event, Finished):
            kind = self.types.pop(event.request, None)
            if kind is not None:
                self.finished.setdefault(kind, deque(maxlen=self.remembered)).append(event.generated)

    def known(self, kind: int) -> deque[int] | None:
        """The lengths of a type; None until there are enough."""
        found = self.finished.get(kind)
        return found if found is not None and len(found) >= LEAST_FINISHED else None


class Traffic:
    """The arrivals of one engine over the last ``window_s`` seconds, by type."""

    def __init__(self, window_s: float, lengths: Lengths) -> None:
        self.window_s = window_s
        self.lengths = lengths
        self.arrivals: deque[tuple[float, int, int, float]] = deque()
        self.since_s = -1.0
        self.latest_s: dict[int, float] = {}
        self._newest = (-1.0, -1)

    def note(self, waiting: list[Job], kinds: list[int]) -> None:
        """Count those of ``waiting`` (types beside them) that came since the last look."""
        newest = latest = self._newest
        for k in range(len(waiting)):
            job = waiting[k]
            if job.arrival_s < newest[0]:
                continue
            key = (job.arrival_s, job.request)
            if key <= newest:
                continue
            latest = max(latest, key)
            kind = kinds[k]
            self.arrivals.append((job.arrival_s, kind, job.prompt_tokens, job.predicted_output))
            self.latest_s[kind] = max(self.latest_s.get(kind, 0.0), job.arrival_s)
            self.lengths.came(job.request, kind)
            if self.since_s < 0.0:
                self.since_s = job.arrival_s
        self._newest = latest

    def flows(self, now_s: float, predicted: bool = True) -> dict[int, Flow]:
        """Rates and mean lengths by type, of types with known lengths; empty while too little came.

        Outputs are the predicted ones (if ``predicted``) where there are predictions, else those of finished requests
        of the type. They count the tokens after the first, as :class:`Flow` does.
        """
        arrivals = self.arrivals
        while arrivals and arrivals[0][0] < now_s - self.window_s:
            arrivals.popleft()
        span_s = min(self.window_s, now_s - self.since_s)
        if len(arrivals) < LEAST or span_s <= 0.0:
            return {}
        count: dict[int, int] = {}
        prompt: dict[int, int] = {}
        output: dict[int, float] = {}
        for _, kind, tokens, expected in arrivals:
            count[kind] = count.get(kind, 0) + 1
            prompt[kind] = prompt.get(kind, 0) + tokens
            output[kind] = output.get(kind, 0.0) + expected
        found: dict[int, Flow] = {}
        for kind in sorted(count):
            n = count[kind]
            mean = output[kind] / n
            if mean < 0.0 or not predicted:
                known = self.lengths.known(kind)
                if known is None:
                    continue
                mean = sum(known) / len(known)
            found[kind] = Flow(prompt[kind] / n, max(mean - 1.0, 0.0), n / span_s)
        return found
