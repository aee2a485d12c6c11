"""The last step of every reader: sort, drop what is asked to be dropped, and say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError
from penstock.workload.trace import F64, I64, PrefixHashes, Trace

OnZero = Literal["skip", "error"]

_SHOWN_LINES = 5
_LONGEST_S = 1e11  # three thousand years: whatever is longer is a wrong unit or a stray number


def assemble(
    path: Path,
    time_s: F64,
    prompt_tokens: I64,
    output_tokens: I64,
    *,
    line_of: Callable[[int], int],
    row_word: str = "line",
    on_zero: OnZero = "skip",
    slo_class: NDArray[np.int16] | None = None,
    class_names: tuple[str, ...] = ("default",),
    prefixes: PrefixHashes | None = None,
    source: str | None = None,
    notes: tuple[str, ...] = (),
) -> Trace:
    """Make a trace of columns in file order: zero-length rows handled, sorted by time, time shifted to 0.

    Parameters
    ----------
    path : Path
        For messages, and the trace's ``source`` unless ``source`` is given.
    time_s : float64[n]
        Seconds on any clock, in any order.
    prompt_tokens, output_tokens : int64[n]
        0 or more.
    line_of : callable
        Row number (0-based) to line of the file (1-based), for messages.
    row_word : str
        What ``line_of`` counts, where it is not lines ("entry" of a JSON array).
    on_zero : "skip" or "error"
        What to do with rows of zero prompt or zero output tokens (failed requests in BurstGPT and in benchmark
        results): leave them out and count them in ``Trace.notes``, or refuse the file.

    Raises
    ------
    PenstockError
        For zero-length rows when ``on_zero="error"`` (the first lines are listed), when no row remains, or when the
        times lie absurdly far apart.
    """
    if on_zero not in ("skip", "error"):
        raise PenstockError(f'on_zero is "{on_zero}"', 'give "skip" or "error"')
    first_s, last_s = (float(time_s.min()), float(time_s.max())) if len(time_s) else (0.0, 0.0)
    if not last_s - first_s <= _LONGEST_S:  # Python floats: an overflow gives inf without a warning
        span = f"arrivals span {last_s - first_s:.3g} s, from {first_s:g} to {last_s:g}"
        raise PenstockError(f"{path.name}: {span}", "give times in the unit of the format")
    notes_out = list(notes)
    rows = np.arange(len(time_s), dtype=np.int64)
    for what, tokens in (("output", output_tokens), ("prompt", prompt_tokens)):
        zero = rows[tokens[rows] == 0]
        if len(zero) == 0:
            continue
        if on_zero == "error":
            raise _zero_error(path, what, [line_of(int(i)) for i in zero[:_SHOWN_LINES]], len(zero), row_word)
        rows = rows[tokens[rows] != 0]
        notes_out.append(f"skipped {len(zero)} of {len(time_s)} rows with zero {what} tokens")
    if len(rows) == 0:
        skipped = f" ({'; '.join(notes_out)})" if notes_out else ""
        raise PenstockError(f"{path} holds no usable request{skipped}", "give a trace with rows")
    time_s = time_s[rows]
    if np.any(np.diff(time_s) < 0):
        moved = int(np.count_nonzero(np.diff(time_s) < 0))
        notes_out.append(f"sorted by arrival time: {moved} rows came before their predecessor")
        order = np.argsort(time_s, kind="stable")
        time_s, rows = time_s[order], rows[order]
    return Trace(
        arrival_s=time_s - time_s[0],
        prompt_tokens=prompt_tokens[rows],
        output_tokens=output_tokens[rows],
        slo_class=np.zeros(len(rows), np.int16) if slo_class is None else slo_class[rows],
        class_names=class_names,
        prefixes=None if prefixes is None else prefixes.take(rows),
        source=str(path) if source is None else source,
        notes=tuple(notes_out),
    )


def _zero_error(path: Path, what: str, lines: list[int], count: int, row_word: str) -> PenstockError:
    more = f" and {count - len(lines)} more" if count > len(lines) else ""
    others = f" (as in {row_word} {', '.join(map(str, lines[1:]))}{more})" if count > 1 else ""
    first = f"{path.name}:{lines[0]}" if row_word == "line" else f"{path.name}: {row_word} {lines[0]}"
    return PenstockError(f"{first}: zero {what} tokens{others}", 'delete the rows or read with on_zero="skip"')
