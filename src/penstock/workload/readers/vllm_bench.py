"""Results of ``vllm bench serve --save-result --save-detailed`` as traffic to replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.workload.arrivals import poisson_arrivals
from penstock.workload.assemble import OnZero, assemble
from penstock.workload.files import read_bytes
from penstock.workload.jsonlines import reason
from penstock.workload.trace import Trace

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class Result(msgspec.Struct):
    """The fields of a result file that say what was sent; the rest are measurements."""

    input_lens: list[_Tokens] | None = None
    output_lens: list[_Tokens] | None = None
    start_times: list[float] | None = None
    request_rate: float | str | None = None


def read(path: Path, *, on_zero: OnZero = "skip", rate_rps: float | None = None, seed: int = 0) -> Trace:
    """Read prompt lengths, generated lengths and start times of a benchmark run.

    Failed requests have 0 output tokens in such files: ``on_zero="skip"`` leaves them out and counts them in
    ``Trace.notes``. Results of older vLLM have no ``start_times``: arrivals are then a Poisson process of ``rate_rps``
    or, where that is None, of the request rate that the file names, and a note says so.

    Raises
    ------
    PenstockError
        For a file without per-request lists (saved without ``--save-detailed``), lists of different length, or values
        of the wrong kind.
    """
    result = _decode(path, read_bytes(path))
    if result.input_lens is None or result.output_lens is None:
        raise PenstockError(f"{path.name} has no input_lens and output_lens", "run the benchmark with --save-detailed")
    n = len(result.input_lens)
    lists = {"output_lens": result.output_lens, "start_times": result.start_times}
    for name, values in lists.items():
        if values is not None and len(values) != n:
            raise PenstockError(f"{path.name}: {name} has {len(values)} entries, input_lens {n}", "save it again")
    notes: tuple[str, ...] = ()
    if result.start_times is not None:
        time_s = np.array(result.start_times, np.float64)
        if not np.isfinite(time_s).all():
            entry = int(np.flatnonzero(~np.isfinite(time_s))[0])
            raise PenstockError(f"{path.name}: start_times[{entry}] is not a finite number", "fix the entry")
    else:
        rate = float(rate_rps) if rate_rps is not None else result.request_rate
        if not isinstance(rate, float) or not np.isfinite(rate):  # "inf" is what vLLM writes for all at once
            raise PenstockError(
                f"{path.name} has neither start_times nor a finite request_rate", "name a rate for the arrivals"
            )
        time_s = poisson_arrivals(n, rate, np.random.default_rng(seed))
        notes = (f"the file has no start times: Poisson arrivals at {rate:g} requests/s, seed {seed}",)
    return assemble(
        path,
        time_s,
        np.array(result.input_lens, np.int64),
        np.array(result.output_lens, np.int64),
        line_of=lambda row: row,
        row_word="entry",
        on_zero=on_zero,
        notes=notes,
    )


def _decode(path: Path, data: bytes) -> Result:
    try:
        try:
            return msgspec.json.decode(data, type=Result)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # Python writes NaN for a mean over nothing; strict JSON has no such word, Python's own reader does.
            loose: Any = json.loads(data)
            return msgspec.convert(loose, Result)
    except msgspec.ValidationError as error:
        raise PenstockError(f"{path.name}: {reason(error)}", "fix the entry") from None
    except json.JSONDecodeError as error:
        hint = "a file written with --append-result holds several: keep one" if "Extra data" in error.msg else ""
        raise PenstockError(f"{path.name}:{error.lineno}: not one JSON object ({error.msg})", hint) from None
