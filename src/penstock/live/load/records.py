"""One JSON line a request, for people who look further."""

from __future__ import annotations

import math
from typing import BinaryIO

import msgspec

from penstock.live.load.openloop import OpenLoop
from penstock.sim.result import Outcome, SimResult


class Record(msgspec.Struct, frozen=True):
    """A request as the client saw it.

    ``arrival_s``, ``sent_s``, ``first_token_s`` and ``last_token_s`` are seconds since the replay began, ``ttft_s``,
    ``tpot_s``, ``e2e_s`` and ``longest_gap_s`` durations as in the results object; null where there is none.
    ``prompt_tokens`` is the server's count where it gave one, ``output_tokens`` what was asked for, ``emitted`` what
    came, counted by ``counted``. ``status`` is 0 where no answer came. ``error`` is null for what went well.
    """

    request: int
    slo_class: str
    arrival_s: float
    sent_s: float
    first_token_s: float | None
    last_token_s: float | None
    prompt_tokens: int
    output_tokens: int
    emitted: int
    counted: str
    outcome: str
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    longest_gap_s: float | None
    status: int
    error: str | None
    detail: str


def write_records(file: BinaryIO, loop: OpenLoop, result: SimResult) -> None:
    """Write every request sent, in order."""
    trace, encode = result.trace, msgspec.json.Encoder().encode
    classes = [trace.class_names[index] for index in trace.slo_class.tolist()]
    prompts, outputs = trace.prompt_tokens.tolist(), trace.output_tokens.tolist()
    for i, stream in enumerate(loop.streams):
        arrival, first, last = loop.due_s[i], stream.first_s - loop.start_s, stream.last_s - loop.start_s
        finished = result.requests.outcome[i] == Outcome.FINISHED
        record = Record(
            request=i,
            slo_class=classes[i],
            arrival_s=arrival,
            sent_s=stream.sent_s - loop.start_s,
            first_token_s=_number(first),
            last_token_s=_number(last),
            prompt_tokens=prompts[i],
            output_tokens=outputs[i],
            emitted=stream.emitted,
            counted=stream.counted,
            outcome=Outcome(int(result.requests.outcome[i])).name.lower(),
            ttft_s=_number(first - arrival),
            tpot_s=(last - first) / (stream.emitted - 1) if finished and stream.emitted > 1 else None,
            e2e_s=_number(last - arrival) if finished else None,
            longest_gap_s=stream.longest_s if stream.emitted > 1 else None,
            status=stream.status,
            error=stream.error,
            detail=stream.detail,
        )
        file.write(encode(record) + b"\n")


def _number(x: float) -> float | None:
    return None if math.isnan(x) else x
