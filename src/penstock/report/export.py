"""One row a request, for people who look further with pandas or polars."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.report.metrics import Slos, Verdicts
from penstock.sim.result import Outcome, SimResult

NO_TARGET = Slo()


def write_requests_csv(path: str | Path, result: SimResult, slo: Slos | None = None) -> None:
    """Write one row a request of the trace, in order of arrival; an empty field means it never happened.

    Columns: request, slo_class, arrival_s, prompt_tokens, output_tokens, outcome (finished, rejected, unfinished),
    emitted, prefill_start_s, first_token_s, decode_start_s, finish_s (seconds since the trace began), ttft_s, tpot_s,
    e2e_s (durations), prefill_instance, decode_instance, preemptions, migrations; and with ``slo`` also ttft_met,
    tpot_met, met (true or false); late_s where token deadlines were watched. A million rows take about a second.

    Raises
    ------
    PenstockError
        If the file cannot be written, or ``slo`` lacks a class.
    """
    import polars as pl  # Late: most commands do not need it.

    trace, r = result.trace, result.requests
    v = Verdicts(result, NO_TARGET if slo is None else slo)
    outcomes = np.array([outcome.name.lower() for outcome in sorted(Outcome)])
    columns = {
        "request": np.arange(len(trace)),
        "slo_class": np.array(trace.class_names)[trace.slo_class],
        "arrival_s": trace.arrival_s,
        "prompt_tokens": trace.prompt_tokens,
        "output_tokens": trace.output_tokens,
        "outcome": outcomes[r.outcome],
        "emitted": r.emitted,
        "prefill_start_s": r.prefill_start_s,
        "first_token_s": r.first_token_s,
        "decode_start_s": r.decode_start_s,
        "finish_s": r.finish_s,
        "ttft_s": v.ttft_s,
        "tpot_s": v.tpot_s,
        "e2e_s": v.e2e_s,
        "prefill_instance": r.prefill_instance,
        "decode_instance": r.decode_instance,
        "preemptions": r.preemptions,
        "migrations": r.migrations,
    }
    if v.late_s is not None:
        columns["late_s"] = np.where(np.isfinite(v.late_s), v.late_s, np.nan)
    if slo is not None:
        columns |= {"ttft_met": v.ttft_met, "tpot_met": v.tpot_met, "met": v.met}
    frame = pl.DataFrame(columns)
    placed = [pl.when(pl.col(c) >= 0).then(pl.col(c)).alias(c) for c in ("prefill_instance", "decode_instance")]
    try:
        frame.with_columns(*placed).fill_nan(None).write_csv(path)
    except OSError as problem:
        raise PenstockError(
            f"cannot write {path} ({problem.strerror or problem})", "give a path you may write"
        ) from None
