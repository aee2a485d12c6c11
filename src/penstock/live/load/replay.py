"""A whole benchmark run: ask the server what it serves and takes, warm it up, replay the trace."""

from __future__ import annotations

import asyncio
import gc
import resource
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from time import perf_counter, process_time
from typing import Any

import numpy as np

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.live.http.client import HttpClient
from penstock.live.load.bodies import Bodies
from penstock.live.load.dialect import Dialect, Form, Wishes, find_dialect
from penstock.live.load.endpoint import Endpoint, Served, served_model
from penstock.live.load.measured import failures
from penstock.live.load.openloop import OpenLoop
from penstock.live.load.prompts import Prompts
from penstock.workload.trace import Trace

CONNECT_S = 10.0
WARM_UP_AT_ONCE = 8
WARM_UP_SALT = 1
LATE_S = 0.01
"""A P99 send lag above this draws a warning: the load was not what the trace asks for."""


@dataclass(frozen=True)
class Plan:
    """What to replay, where and how.

    ``form`` None means token ids where the server takes them. ``fresh`` makes prompts that no earlier run sent; equal
    seeds send equal prompts otherwise. ``slos`` are sent along where given. ``concurrency`` 0 is no limit.
    ``deadlines`` are targets of the classes, where tokens have deadlines.
    """

    at: Endpoint
    trace: Trace
    model: str | None = None
    form: Form | None = None
    vocab: range = range(300, 500)
    seed: int = 0
    fresh: bool = False
    natural_end: bool = False
    body: Mapping[str, Any] | None = None
    slos: Mapping[str, Slo] | None = None
    concurrency: int = 0
    timeout_s: float = 600.0
    warm_up: int = 1
    deadlines: Mapping[str, Slo] | None = None


@dataclass(frozen=True)
class Replay:
    """What came of it. ``trace`` is the part of the plan's that the server can serve; times are ``perf_counter``'s."""

    loop: OpenLoop
    trace: Trace
    served: Served
    dialect: Dialect
    end_s: float
    cpu_s: float
    interrupted: bool
    notes: tuple[str, ...]


async def replay(plan: Plan, progress: Callable[[int, int], None] | None = None) -> Replay:
    """Run the plan on the current event loop. Ctrl-C ends it early, with what was measured.

    Parameters
    ----------
    progress : callable, optional
        Called with requests ended and requests in all, about ten times a second.

    Raises
    ------
    PenstockError
        The server is not there, refuses what is asked, fails at warming up, or can serve no request of the trace.
    """
    notes = list(_raise_file_limit(plan))
    client = HttpClient(connect_s=CONNECT_S)
    try:
        served = await served_model(client, plan.at, plan.model)
        wishes = Wishes(served.id, plan.form, plan.natural_end, dict(plan.body or {}))
        dialect = await find_dialect(client, plan.at, wishes, plan.vocab)
        notes += dialect.notes
        trace, skipped = fitting(plan.trace, served.max_model_len)
        notes += skipped
        salt = secrets.randbits(60) << 2 if plan.fresh else 0

        def bodies(some: Trace, more_salt: int) -> Bodies:
            prompts = Prompts(some, plan.vocab, plan.seed, salt ^ more_salt)
            return Bodies(plan.at, dialect, wishes, some, prompts, plan.slos, served.max_model_len)

        if plan.warm_up > 0:
            some = trace.head(plan.warm_up)
            some = replace(some, arrival_s=np.zeros(len(some)))
            await _warm_up(OpenLoop(client, plan.at, some, bodies(some, WARM_UP_SALT), WARM_UP_AT_ONCE, plan.timeout_s))
        n = len(trace)
        tell = None if progress is None else lambda done: progress(done, n)
        loop = OpenLoop(
            client, plan.at, trace, bodies(trace, 0), plan.concurrency, plan.timeout_s, tell, _pace(plan, trace)
        )
        cpu_s = process_time()
        with _no_collection():
            interrupted = await _until_done_or_interrupted(loop)
        end_s, cpu_s = perf_counter(), process_time() - cpu_s
        if interrupted and not loop.streams:
            raise KeyboardInterrupt
        if interrupted:
            notes.append(f"interrupted after {len(loop.streams):,} of {n:,} requests; those not sent are left out")
        return Replay(loop, trace, served, dialect, end_s, cpu_s, interrupted, tuple(notes))
    finally:
        await client.close()


def _pace(plan: Plan, trace: Trace) -> list[float]:
    """Seconds a token that each request's deadlines allow; empty where there are none."""
    if plan.deadlines is None:
        return []
    of_class = [plan.deadlines[name].tpot_s for name in trace.class_names]
    return [of_class[i] for i in trace.slo_class.tolist()]


def fitting(trace: Trace, max_model_len: int | None) -> tuple[Trace, list[str]]:
    """The requests that fit the model's length, and a note on those left out.

    Raises
    ------
    PenstockError
        None fits.
    """
    if max_model_len is None:
        return trace, []
    fits = trace.prompt_tokens + trace.output_tokens <= max_model_len
    left_out = len(trace) - int(np.count_nonzero(fits))
    if not left_out:
        return trace, []
    if left_out == len(trace):
        raise PenstockError(
            f"every request is longer than the {max_model_len:,} tokens of the model",
            "start the server with a larger --max-model-len, or give shorter requests",
        )
    note = f"left out {left_out:,} of {len(trace):,} requests: longer than the {max_model_len:,} tokens of the model"
    # Not Trace.select, which would move the first arrival that is left to 0: the others keep their times.
    rows = np.flatnonzero(fits)
    return replace(trace.select(rows), arrival_s=trace.arrival_s[rows]), [note]


async def _warm_up(loop: OpenLoop) -> None:
    await loop.run()
    found = failures(loop.streams)
    if found:
        kind, failure = next(iter(found.items()))
        detail = f" ({failure.example})" if failure.example else ""
        raise PenstockError(f"the server failed while warming up: {kind}{detail}", "see its log, or try --warmup 0")


async def _until_done_or_interrupted(loop: OpenLoop) -> bool:
    """Run it; True if Ctrl-C ended it. A second Ctrl-C is not caught."""
    interrupted = False
    running = asyncio.get_running_loop()

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        running.remove_signal_handler(signal.SIGINT)
        loop.stop()

    # Signals are for the main thread only; elsewhere (tests, embedding) Ctrl-C is not ours.
    with suppress(ValueError, RuntimeError):
        running.add_signal_handler(signal.SIGINT, stop)
    try:
        await loop.run()
    finally:
        if not interrupted:
            with suppress(ValueError, RuntimeError):
                running.remove_signal_handler(signal.SIGINT)
    return interrupted


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collector in the block: with 10,000 streams it would hold everything up for tens of milliseconds.

    Nothing is lost: streams live until the report anyway.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _raise_file_limit(plan: Plan) -> list[str]:
    """Let the process open as many connections as it may; a note where that looks too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    most = plan.concurrency or len(plan.trace)
    if most > soft - 64:
        return [f"at most {soft - 64:,} connections at once (ulimit -n is {soft:,}); more requests in flight will fail"]
    return []
