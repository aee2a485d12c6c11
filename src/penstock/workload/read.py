"""Reading a trace of any known format."""

from __future__ import annotations

from pathlib import Path

from penstock.core.errors import PenstockError
from penstock.workload.assemble import OnZero
from penstock.workload.detect import FORMATS, Format, detect_format
from penstock.workload.readers import azure, burstgpt, lengths_csv, mooncake, servegen, vllm_bench
from penstock.workload.recording import read_recording
from penstock.workload.trace import Trace


def read_trace(
    path: Path | str,
    *,
    format: str | None = None,
    on_zero: OnZero = "skip",
    start_s: float = 0.0,
    duration_s: float | None = None,
    limit: int | None = None,
    rate_rps: float | None = None,
    seed: int = 0,
) -> Trace:
    """Read, cut and rescale a trace.

    Parameters
    ----------
    path : Path or str
        A file, plain or gzip, or a directory of ServeGen files.
    format : str, optional
        One of ``detect.FORMATS``; told from the content where None.
    on_zero : "skip" or "error"
        Requests with 0 prompt or output tokens (failed ones, in BurstGPT and in benchmark results): leave out and
        count in ``Trace.notes``, or refuse.
    start_s, duration_s : float
        Keep requests with ``start_s <= arrival < start_s + duration_s``, in the file's own time.
    limit : int, optional
        Keep at most this many, counted from the first kept.
    rate_rps : float, optional
        Mean rate after cutting: timestamps are multiplied by one factor, which keeps the pattern. For ServeGen the
        clients' rates are multiplied instead, which keeps the time of day.
    seed : int
        For what is drawn: arrivals of files without arrival times, and everything of ServeGen.

    Returns
    -------
    Trace
        Sorted by arrival, the first at 0; what was changed stands in ``notes``.

    Raises
    ------
    PenstockError
        Naming file, line and reason of a malformed row; for an unknown format, an empty file or an empty cut.
    """
    path = Path(path)
    known = detect_format(path) if format is None else _checked(format)
    if limit is not None and limit < 1:
        raise PenstockError(f"limit {limit} keeps no request", "give a limit of 1 or more")
    if not start_s >= 0 or (duration_s is not None and not duration_s > 0):
        raise PenstockError(
            f"start {start_s} s, duration {duration_s} s", "give a start of 0 or more, a duration above 0"
        )
    if known == "servegen":
        trace = servegen.read(
            path, seed=seed, rate_rps=rate_rps, start_s=start_s, duration_s=duration_s, on_zero=on_zero
        )
        return trace if limit is None else trace.head(limit)
    trace = _read(path, known, on_zero, rate_rps, seed)
    if start_s > 0 or duration_s is not None:
        stop_s = trace.duration_s + start_s + 1 if duration_s is None else start_s + duration_s
        trace = trace.between(start_s, stop_s)
    if limit is not None:
        trace = trace.head(limit)
    # A single request has no rate that could be changed.
    return trace if rate_rps is None or len(trace) == 1 else trace.rescaled(rate_rps)


def _read(path: Path, format: Format, on_zero: OnZero, rate_rps: float | None, seed: int) -> Trace:
    if format == "penstock":
        return read_recording(path, on_zero=on_zero)
    if format == "azure":
        return azure.read(path, on_zero=on_zero)
    if format == "mooncake":
        return mooncake.read(path, on_zero=on_zero)
    if format == "burstgpt":
        return burstgpt.read(path, on_zero=on_zero)
    if format == "vllm-bench":
        return vllm_bench.read(path, on_zero=on_zero, rate_rps=rate_rps, seed=seed)
    return lengths_csv.read(path, on_zero=on_zero, rate_rps=rate_rps, seed=seed)


def _checked(name: str) -> Format:
    for known in FORMATS:
        if name == known:
            return known
    raise PenstockError(f'format "{name}" is unknown', f"give one of {', '.join(FORMATS)}")
