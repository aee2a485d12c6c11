"""What a replay measured, in the columns that the reports read: nothing that the client cannot see is filled in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.core.types import Slo
from penstock.live.load.openloop import OpenLoop
from penstock.live.load.stream import Gaps, Stream
from penstock.report.metrics import spread
from penstock.report.schema import Spread
from penstock.sim.result import Flips, InstanceColumns, Migrations, Outcome, RequestColumns, SimResult, TokenGaps
from penstock.workload.trace import F64, Trace

REFUSALS = frozenset((429, 503))
"""Statuses by which a server says that it will not take the request now; the request counts as rejected."""


class Failure(msgspec.Struct, frozen=True):
    """A kind of failure: how many requests, and what the server said to the first of them."""

    count: int
    example: str


class ClientFigures(msgspec.Struct, frozen=True):
    """What the load generator says about itself.

    ``send_lag_s`` is sending minus arrival: how far the load was from what the trace asks for. ``counted`` are the
    requests by how their tokens were counted (``token_ids``, ``usage``, ``chunks``). ``cpu_us_per_token`` is the
    processor time of this process over the replay, per output token. ``short`` are finished requests with fewer
    tokens than asked for. ``held`` are those that waited for a place under the concurrency limit, up to ``held_max_s``.
    """

    sent: int
    send_lag_s: Spread
    counted: dict[str, int]
    cpu_us_per_token: float | None
    short: int
    held: int
    held_max_s: float


def as_result(
    trace: Trace, loop: OpenLoop, end_s: float, name: str, deadlines: Mapping[str, Slo] | None = None
) -> SimResult:
    """The replay as a run without instances (:func:`penstock.report.metrics.summarize` takes it).

    Arrivals are when requests were due; under a concurrency limit, when they got a place. Prompt lengths are the
    server's own counts where it gave them. Requests that were never sent are left out.

    Parameters
    ----------
    end_s : float
        ``perf_counter`` time at which the run ended.
    name : str
        Stands where a simulation has its policy.
    deadlines : mapping of class name to Slo, optional
        Targets of the classes, where tokens have deadlines: those that the replay was given.

    Raises
    ------
    PenstockError
        Nothing was sent.
    """
    streams = loop.streams
    sent = trace.head(len(streams)) if streams else trace.select(np.empty(0, np.int64))
    reported = np.array([stream.prompt_tokens or 0 for stream in streams], np.int64)
    sent = replace(
        sent,
        arrival_s=np.array(loop.due_s, np.float64),
        prompt_tokens=np.where(reported > 0, reported, sent.prompt_tokens),
    )
    n = len(sent)
    nothing, nowhere = np.full(n, np.nan), np.full(n, -1, np.int32)
    finish = _column(streams, "last_s") - loop.start_s
    outcome = np.array([_outcome(stream) for stream in streams], np.int8)
    return SimResult(
        trace=sent,
        policy=name,
        requests=RequestColumns(
            outcome=outcome,
            prefill_start_s=nothing,
            first_token_s=_column(streams, "first_s") - loop.start_s,
            decode_start_s=nothing,
            finish_s=np.where(outcome == Outcome.FINISHED, finish, np.nan),
            emitted=np.array([stream.emitted for stream in streams], np.int64),
            prefill_instance=nowhere,
            decode_instance=nowhere,
            preemptions=np.zeros(n, np.int32),
            migrations=np.zeros(n, np.int32),
            lateness_s=None if deadlines is None else _lateness_s(sent, loop, outcome, deadlines),
        ),
        gaps=token_gaps(loop.gaps),
        migrations=_no_migrations(),
        flips=Flips(np.empty(0), np.empty(0, np.int32), np.empty(0, np.int8)),
        timeline=None,
        instances=_no_instances(),
        simulated_s=end_s - loop.start_s,
        wall_s=end_s - loop.start_s,
        events=0,
        reject_reasons=dict(Counter(s.error for s in streams if s.error is not None and s.status in REFUSALS)),
        failed_migrations={},
    )


def _lateness_s(sent: Trace, loop: OpenLoop, outcome: NDArray[np.int8], deadlines: Mapping[str, Slo]) -> F64:
    """As :class:`RequestColumns` has it: the most that a token after the first came after its deadline."""
    ttft = np.array([deadlines[name].ttft_s for name in sent.class_names])[sent.slo_class]
    late = _column(loop.streams, "latest_s") - loop.start_s - sent.arrival_s - ttft
    return np.where(outcome == Outcome.FINISHED, late, np.nan)


def client_figures(loop: OpenLoop, cpu_s: float) -> ClientFigures:
    """The load generator's own figures; ``cpu_s`` is the processor time of the process over the run."""
    streams = loop.streams
    tokens = sum(stream.emitted for stream in streams)
    lag = _column(streams, "sent_s") - loop.start_s - np.array(loop.due_s, np.float64)
    wanted = loop.wanted
    return ClientFigures(
        sent=len(streams),
        send_lag_s=spread(lag),
        counted=dict(Counter(stream.counted for stream in streams if stream.emitted)),
        cpu_us_per_token=cpu_s / tokens * 1e6 if tokens else None,
        short=sum(s.ended and s.error is None and s.emitted < wanted[s.index] for s in streams),
        held=loop.delayed,
        held_max_s=loop.delay_s,
    )


def failures(streams: Sequence[Stream]) -> dict[str, Failure]:
    """Failed requests by kind, the most frequent first."""
    counts = Counter(stream.error for stream in streams if stream.error is not None)
    examples = {stream.error: stream.detail for stream in reversed(streams)}
    return {kind: Failure(count, examples[kind]) for kind, count in counts.most_common()}


def token_gaps(gaps: Gaps) -> TokenGaps:
    """Measured gaps in the form that simulations give theirs; equal ones share a row."""
    seconds, batch = np.unique(np.frombuffer(gaps.seconds, np.float64), return_counts=True)
    if gaps.zeros:
        seconds, batch = np.append(seconds, 0.0), np.append(batch, gaps.zeros)
    batch = batch.astype(np.int64)
    return TokenGaps(seconds, np.zeros(len(seconds)), np.ones(len(seconds), np.int64), batch)


def _outcome(stream: Stream) -> Outcome:
    if stream.ended and stream.error is None:
        return Outcome.FINISHED
    refused = stream.error is not None and stream.status in REFUSALS
    return Outcome.REJECTED if refused else Outcome.UNFINISHED


def _column(streams: Sequence[Stream], name: str) -> F64:
    return np.array([getattr(stream, name) for stream in streams], np.float64)


def _no_migrations() -> Migrations:
    f, i, n = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int32)
    return Migrations(f, f, i, n, n, i, np.empty(0, np.int8), f)


def _no_instances() -> InstanceColumns:
    f, i = np.empty(0), np.empty(0, np.int64)
    role: NDArray[np.int8] = np.empty(0, np.int8)
    return InstanceColumns(role, i, i, f, i, i, i, i, i, f, f)
