"""Synthetic traffic: a length distribution per phase, and an arrival process."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace

import numpy as np

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.workload.arrivals import Phase, check_rate, gamma_arrivals, phased_arrivals
from penstock.workload.lengths import (
    PROBLEMS,
    PROFILES,
    Lengths,
    ProblemLengths,
    UniformLengths,
    length_profile,
    lengths_of,
)
from penstock.workload.mix import MULTI_CLASS, MixedLengths
from penstock.workload.trace import Trace


@dataclass(frozen=True)
class WorkloadPhase:
    """A stretch of a workload: which lengths, at which multiple of the base rate, for how long (endless: inf)."""

    lengths: Lengths
    duration_s: float = math.inf
    rate_factor: float = 1.0


@dataclass(frozen=True)
class Workload:
    """Phases one after another, repeated where more requests or time are asked for. Only one phase may be endless."""

    name: str
    phases: tuple[WorkloadPhase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise PenstockError(f'workload "{self.name}" has no phase', "give at least one")
        if len(self.phases) > 1 and not all(math.isfinite(phase.duration_s) for phase in self.phases):
            raise PenstockError(f'workload "{self.name}" has an endless phase among others', "give each a duration")
        if not any(phase.rate_factor > 0 for phase in self.phases):
            raise PenstockError(f'workload "{self.name}" sends nothing', "give a phase a rate factor above 0")


#: Prefill-heavy, then decode-heavy, then mixed: the trace with which Narwhal tests Arrow's role changes.
THREE_PHASE = Workload(
    "three-phase",
    (
        WorkloadPhase(UniformLengths((8000, 16000), (30, 60)), 300.0, 16.0),
        WorkloadPhase(UniformLengths((300, 800), (2000, 8000)), 300.0, 1.0),
        WorkloadPhase(UniformLengths((300, 800), (200, 500)), 300.0, 4.0),
    ),
)

#: Several SLO classes with lengths and targets of their own.
MULTI = Workload("multi-class", (WorkloadPhase(MULTI_CLASS),))

_WHOLE = {load.name: load for load in (THREE_PHASE, MULTI)}
WORKLOADS = (*PROFILES, PROBLEMS, *_WHOLE)


_PHASE = re.compile(r"(?P<lengths>[^@]+)@(?P<duration>[\d.]+)s?(?:x(?P<factor>[\d.]+))?$")


def workload(name: str) -> Workload:
    """A built-in workload (``WORKLOADS``), or one written down.

    ``512/128`` or ``300-800/2000-8000`` are fixed or uniform lengths. Phases are ``LENGTHS@SECONDSxFACTOR`` with commas
    between, where LENGTHS is a profile or such lengths, and the factor (1 where absent) multiplies the base rate:
    ``azure-conv@300x4,reasoning@600``.

    Raises
    ------
    PenstockError
        For an unknown name (the known ones are listed), or numbers out of range.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    try:
        if "@" not in name:
            return Workload(name, (WorkloadPhase(length_profile(name)),))
        return Workload(name, tuple(_parse_phase(part.strip()) for part in name.split(",")))
    except PenstockError as error:
        if "unknown" not in error.problem:
            raise
        known = ", ".join(WORKLOADS)
        raise PenstockError(f'workload "{name}" is unknown', f"give {known}, or lengths such as 512/128") from None


def _parse_phase(text: str) -> WorkloadPhase:
    match = _PHASE.match(text)
    try:
        if match is None:
            raise ValueError
        return WorkloadPhase(length_profile(match["lengths"]), float(match["duration"]), float(match["factor"] or 1))
    except ValueError:
        raise PenstockError(f'phase "{text}"', "write LENGTHS@SECONDSxFACTOR, such as azure-conv@300x4") from None


def synthesize(
    spec: str | Workload,
    n: int | None = None,
    rate_rps: float = 1.0,
    *,
    seed: int = 0,
    cv: float = 1.0,
    duration_s: float | None = None,
    classes: dict[str, float] | None = None,
) -> Trace:
    """Draw a synthetic trace; equal arguments give equal traces.

    Parameters
    ----------
    spec : str or Workload
        See ``workload``.
    n : int, optional
        Number of requests.
    rate_rps : float
        Mean requests per second, before a phase's factor (for ``three-phase`` the rate of its slowest phase).
    seed : int
        Arrivals, lengths and classes are drawn from separate streams, so that another ``rate_rps`` or ``cv`` leaves the
        lengths of a workload of one phase unchanged.
    cv : float
        Coefficient of variation of the gaps: 0 constant, 1 Poisson, above 1 gamma bursts.
    duration_s : float, optional
        Length of the trace in time, instead of or besides ``n`` (whichever ends first). Phases are repeated to fill it.
        With neither, phases run once; a workload of a single endless phase needs one of the two.
    classes : dict, optional
        Share of each SLO class, drawn independently per request. Where None, the workload's own classes (of
        ``multi-class``), else ``{"default": 1}``.

    Returns
    -------
    Trace
        The first request at 0.

    Raises
    ------
    PenstockError
        For a rate, cv, n, duration or share out of range.
    """
    load = workload(spec) if isinstance(spec, str) else spec
    check_rate(rate_rps)
    if n is not None and n < 1:
        raise PenstockError(f"{n} requests", "ask for 1 or more")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise PenstockError(f"a duration of {duration_s:g} s", "give a duration above 0")
    arrival_rng, length_rng, class_rng = (np.random.default_rng([seed, stream]) for stream in range(3))

    first = load.phases[0]
    if n is not None and duration_s is None and math.isinf(first.duration_s):
        arrival_s = gamma_arrivals(n, rate_rps * first.rate_factor, cv, arrival_rng)
        parts = [(first.lengths, n)]
    else:
        margin = 1.5
        while True:
            phases = _unrolled(load, None if n is None else margin * n + 100, rate_rps, duration_s)
            arrival_s, counts = phased_arrivals(tuple(_phase(phase, rate_rps, cv) for phase in phases), arrival_rng)
            if n is None or duration_s is not None or len(arrival_s) >= n:
                break
            margin *= 2  # only bursts with a large cv get here
        parts = [(phase.lengths, count) for phase, count in zip(phases, counts, strict=True)]
    prompts: list[str] = []
    pairs = []
    names: tuple[str, ...] = ("default",)
    own: dict[str, Slo] = {}
    slo_class = np.zeros(len(arrival_s), np.int16)
    for lengths, count in parts:
        if isinstance(lengths, ProblemLengths):
            problems = lengths.problems(count, length_rng)
            prompts += [problem.prompt for problem in problems]
            pairs.append(lengths_of(problems))
        elif isinstance(lengths, MixedLengths) and len(load.phases) == 1:
            prompt, output, slo_class = lengths.sample_classes(count, length_rng)
            names, own = lengths.names, lengths.slos
            pairs.append((prompt, output))
        else:
            pairs.append(lengths.sample(count, length_rng))
    end = len(arrival_s) if n is None else min(n, len(arrival_s))
    if end == 0:
        raise PenstockError(f'no request of "{load.name}" arrives in that time', "give a longer time or a higher rate")
    source = f"synthetic {load.name}, {rate_rps:g} requests/s, cv {cv:g}, seed {seed}"
    trace = Trace(
        arrival_s=arrival_s[:end] - arrival_s[0],
        prompt_tokens=np.concatenate([prompt for prompt, _ in pairs])[:end],
        output_tokens=np.concatenate([output for _, output in pairs])[:end],
        slo_class=slo_class[:end],
        class_names=names,
        class_slos=own,
        # Of some phases only would be of no use: whoever sends prompts needs them all.
        prompts=tuple(prompts[:end]) if len(prompts) == sum(count for _, count in parts) else None,
        source=source,
    )
    return trace if classes is None else with_classes(trace, classes, class_rng)


def with_classes(trace: Trace, shares: dict[str, float], rng: np.random.Generator) -> Trace:
    """The trace with an SLO class drawn per request, class i with probability proportional to its share.

    Raises
    ------
    PenstockError
        For a negative or non-finite share, or shares that sum to 0.
    """
    weights = np.array(list(shares.values()), np.float64)
    if len(weights) == 0 or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise PenstockError(f"class shares {shares}", "give shares of 0 or more with a positive sum")
    cdf = np.cumsum(weights) / weights.sum()
    index = np.minimum(np.searchsorted(cdf, rng.random(len(trace)), side="right"), len(weights) - 1)
    kept = {name: slo for name, slo in trace.class_slos.items() if name in shares}
    return replace(trace, slo_class=index.astype(np.int16), class_names=tuple(shares), class_slos=kept)


def _phase(phase: WorkloadPhase, rate_rps: float, cv: float) -> Phase:
    return Phase(phase.duration_s, rate_rps * phase.rate_factor, cv)


def _unrolled(load: Workload, expected: float | None, rate_rps: float, duration_s: float | None) -> list[WorkloadPhase]:
    """Phases with finite durations: as many as ``expected`` requests or ``duration_s`` seconds need."""
    if expected is None and duration_s is None:
        if math.isinf(load.phases[0].duration_s):
            raise PenstockError(f'workload "{load.name}" has no end', "give a number of requests (-n) or a duration")
        return list(load.phases)
    wanted = math.inf if expected is None else expected
    left_s = math.inf if duration_s is None else duration_s
    phases: list[WorkloadPhase] = []
    for phase in itertools.cycle(load.phases):
        phases.append(replace(phase, duration_s=min(phase.duration_s, left_s)))
        left_s -= phase.duration_s
        wanted -= phase.duration_s * phase.rate_factor * rate_rps
        if left_s <= 0 or wanted <= 0:
            return phases
    raise AssertionError("unreachable: itertools.cycle does not end")
