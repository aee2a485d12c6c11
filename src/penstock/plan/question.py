"""What is asked of the planner, as one object, and the case that it makes."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.core.types import Role
from penstock.experiment.setup import Setup, replace
from penstock.experiment.traffic import DEFAULT_REQUESTS, build_trace
from penstock.perf.hardware import hardware_spec
from penstock.plan.closed_form import Case
from penstock.plan.ladder import read_ladder
from penstock.plan.machine import Benchmark, Machine
from penstock.plan.prices import parse_prices, price_of
from penstock.plan.rounding import Bill
from penstock.plan.sources import check_error, modelled, role_hardware
from penstock.workload.describe import describe
from penstock.workload.trace import Trace

AUTO = "auto"
LENGTHS_DRAWN = 4 * DEFAULT_REQUESTS
"""Requests drawn from a synthetic workload to know its lengths."""


class Question(msgspec.Struct, frozen=True):
    """The planner's own options; the cluster, the targets and the workload's source are the ``Setup``'s.

    ``rps`` (requests/s) or ``tpm`` (input + output tokens/min) is the demand, a trace's own rate where both are None.
    ``isl`` and ``osl`` are mean lengths, None for those of the workload. ``prefill_throughput`` (tokens/s) and
    ``decode_ladder`` (a file) make a benchmark of the case. ``queue`` and ``ladder_fit`` may be ``auto``: the paper's
    M/M/1 and quadratic fit for a benchmark, the pooled queue for a step model. ``cv`` None keeps a trace's arrivals.
    """

    rps: float | None = None
    tpm: float | None = None
    isl: float | None = None
    osl: float | None = None
    percentile: float | None = None
    overhead_s: float = 0.0
    queue: str = AUTO
    cv: float | None = 1.0
    prefill_throughput: float | None = None
    decode_ladder: str | None = None
    ladder_fit: str = AUTO
    gpus_per_instance: int = 1
    fit_error: float | None = None
    prices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Posed:
    """A case with what it takes to simulate and to pay for it. ``setup`` is None for a benchmark."""

    case: Case
    setup: Setup | None
    bill: Bill
    notes: list[str]


def pose(question: Question, setup: Setup) -> Posed:
    """Read lengths, demand and machine.

    Raises PenstockError for whatever is missing or contradicts itself, and as the readers and catalogues do.
    """
    notes: list[str] = []
    setup = _workload(question, setup)
    benchmark = _benchmark(question)
    trace = build_trace(_with_requests(setup))
    fixed = question.isl is not None
    notes += [] if fixed else list(trace.notes)
    if trace.prefixes is not None:
        notes.append("the formulas take whole prompts: what a prefix cache saves is left out")
    prompts = np.array([question.isl]) if fixed else trace.prompt_tokens.astype(np.float64)
    outputs = np.array([question.osl]) if fixed else trace.output_tokens.astype(np.float64)
    rate = _rate(question, float(prompts.mean() + outputs.mean()), setup)
    machine: Machine = benchmark if benchmark is not None else modelled(setup, question.fit_error)
    queue = question.queue
    if queue == AUTO:
        queue = "mm1" if benchmark is not None else "pooled"
    if setup.slo.ttft_s is None or setup.slo.tpot_s is None:
        raise PenstockError("the planner needs both targets", "give --ttft and --tpot a time")
    case = Case(
        machine,
        rate,
        prompts,
        outputs,
        setup.slo.ttft_s,
        setup.slo.tpot_s,
        question.percentile,
        question.overhead_s,
        queue,
        _arrival_cv(question, trace),
    )
    simulated = None if benchmark is not None else setup
    return Posed(case, simulated, _bill(question, setup, benchmark is not None), notes)


def _workload(question: Question, setup: Setup) -> Setup:
    w = setup.workload
    given = (question.isl is not None, question.osl is not None)
    if any(given) and not all(given):
        raise PenstockError("one mean length without the other", "give both --isl and --osl")
    if all(given) and (w.trace is not None or w.synthetic):
        raise PenstockError("mean lengths and a workload are both given", "drop --isl and --osl, or the workload")
    if not any(given) and w.trace is None and not w.synthetic:
        raise PenstockError("no lengths are given", "give --isl and --osl, --trace FILE or --synthetic NAME")
    if question.isl is not None and question.osl is not None:
        for name, value in (("--isl", question.isl), ("--osl", question.osl)):
            if not 1 <= value < 1e8:
                raise PenstockError(f"{name} {value:g} is out of range", f"give {name} of 1 or more, in tokens")
        w = replace(w, synthetic=f"{round(question.isl)}/{round(question.osl)}")
    cv = question.cv if w.trace is not None or question.cv is not None else 1.0
    return replace(setup, workload=replace(w, cv=cv))


def _with_requests(setup: Setup) -> Setup:
    w = setup.workload
    if w.trace is not None or w.requests is not None or w.duration_s is not None:
        return setup
    return replace(setup, workload=replace(w, requests=LENGTHS_DRAWN))


def _benchmark(question: Question) -> Benchmark | None:
    rate, path = question.prefill_throughput, question.decode_ladder
    if rate is None and path is None:
        return None
    if rate is None or path is None:
        have, lack = ("--prefill-throughput", "--decode-ladder FILE") if path is None else (
            "--decode-ladder", "--prefill-throughput TOKENS/S"
        )  # fmt: skip
        raise PenstockError(f"{have} is half of a benchmark", f"give {lack} too")
    check_error(question.fit_error)
    ladder = read_ladder(path)
    fit = question.ladder_fit
    if fit == AUTO:
        fit = "quadratic" if len(ladder.batch) >= 3 else "linear"
    given = question.fit_error
    return Benchmark(rate, ladder, fit, given or 0.0, ladder.fit_error(fit) if given is None else given)


def _rate(question: Question, tokens: float, setup: Setup) -> float:
    if question.rps is not None and question.tpm is not None:
        raise PenstockError("--rps and --tpm are both given", "give the demand once")
    if question.rps is not None:
        return question.rps
    if question.tpm is not None:
        return question.tpm / 60 / tokens
    if setup.workload.trace is None:
        raise PenstockError("no demand is given", "give --rps, or --tpm (input + output tokens a minute)")
    # As recorded: arrivals that are drawn anew have that rate on average only.
    recorded = build_trace(replace(setup, workload=replace(setup.workload, cv=None))).rate_rps
    if recorded == 0:
        raise PenstockError("the requests of the trace arrive at once", "give --rps or --tpm")
    return recorded


def _arrival_cv(question: Question, trace: Trace) -> float:
    if question.cv is not None:
        return question.cv
    return describe(trace).gap_cv or 1.0


def _bill(question: Question, setup: Setup, benchmark: bool) -> Bill:
    prices = parse_prices(question.prices)
    if benchmark:
        if question.gpus_per_instance < 1:
            raise PenstockError(
                f"{question.gpus_per_instance} GPUs an instance", "give --gpus-per-instance of 1 or more"
            )
        price = price_of(None, prices)
        return Bill(question.gpus_per_instance, question.gpus_per_instance, price, price)
    (p, p_gpus), (d, d_gpus) = (role_hardware(setup, role) for role in (Role.PREFILL, Role.DECODE))
    names = hardware_spec(p).name, hardware_spec(d).name
    return Bill(p_gpus, d_gpus, price_of(names[0], prices), price_of(names[1], prices))
