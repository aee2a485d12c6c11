"""Many runs: seeds, policies and rates over all cores, with common random numbers.

A run is a function of its setup and seed alone. Runs with equal seeds share trace, noise and prediction errors,
whatever their policy, so that differences between policies are not differences of luck.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from penstock.core.errors import PenstockError
from penstock.experiment.build import lengths, run
from penstock.experiment.setup import Setup
from penstock.experiment.traffic import build_trace, slos
from penstock.report.metrics import RunMetrics, summarize
from penstock.sim.result import SimResult

T = TypeVar("T")
Done = Callable[[int], None]
"""Told the number of finished runs."""


def seeds(setup: Setup, repeat: int) -> list[int]:
    """The seeds of ``repeat`` runs: the setup's, and those after it. Raises PenstockError for fewer than 1."""
    if repeat < 1:
        raise PenstockError(f"{repeat} repetitions", "give --repeat of 1 or more")
    return [setup.seed + i for i in range(repeat)]


def measure(setup: Setup, seed: int, sample: bool = True) -> RunMetrics:
    """One run, reduced to its figures."""
    result = run(setup, seed, sample=sample)
    return summarize(result, slos(setup, result.trace))


def measure_and_keep(setup: Setup, seed: int, keep: bool) -> tuple[RunMetrics, SimResult | None]:
    """One run, and its columns where a report wants to draw them."""
    result = run(setup, seed)
    return summarize(result, slos(setup, result.trace)), result if keep else None


def repeats_differ(setup: Setup) -> bool:
    """Does the seed change anything? Not for a recorded trace with its own arrivals, noise and predictor off."""
    w = setup.workload
    drawn = w.trace is None or w.cv is not None or bool(w.classes)
    if drawn or setup.truth.noise > 0 or lengths(setup, 0) is not None:
        return True
    first, second = build_trace(setup, 0), build_trace(setup, 1)
    return bool((first.arrival_s[: len(second)] != second.arrival_s[: len(first)]).any())


def cores(jobs: int) -> int:
    """Worker processes for ``--jobs``: 0 or less means all cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable if jobs < 1 else jobs


def fan_out(
    call: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int = 0,
    done: Done | None = None,
    each: Callable[[int, T], None] | None = None,
) -> list[T]:
    """``[call(*task) for task in tasks]`` over ``jobs`` processes, in order; in this process for one job or one task.

    ``done`` is told how many have ended, ``each`` gets every result with the number of its task, as they end. Errors of
    a task are raised here, the first in order of completion.
    """
    workers = min(cores(jobs), len(tasks))
    found: dict[int, T] = {}
    for i, value in _serial(call, tasks) if workers < 2 else _parallel(call, tasks, workers):
        found[i] = value
        if each is not None:
            each(i, value)
        if done is not None:
            done(len(found))
    return [found[i] for i in range(len(tasks))]


def _serial(call: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, T]]:
    for i, task in enumerate(tasks):
        yield i, call(*task)


def _parallel(call: Callable[..., T], tasks: Sequence[tuple[Any, ...]], workers: int) -> Iterator[tuple[int, T]]:
    from joblib import Parallel, delayed  # late: 0.3 s

    jobs = (delayed(_numbered)(i, call, task) for i, task in enumerate(tasks))
    for i, value, problem in Parallel(n_jobs=workers, return_as="generator_unordered")(jobs):
        if problem is not None:
            raise PenstockError(*problem)
        yield i, value


def _numbered(i: int, call: Callable[..., T], task: tuple[Any, ...]) -> tuple[int, T | None, tuple[str, str] | None]:
    # A PenstockError takes two arguments and would not survive the trip between processes by itself.
    try:
        return i, call(*task), None
    except PenstockError as error:
        return i, None, (error.problem, error.remedy)
