"""ServeGen: traffic generated from published per-client statistics (arXiv 2505.09999, Apache-2.0)."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.workload.arrivals import Gaps, check_rate, window_arrivals
from penstock.workload.assemble import OnZero, assemble
from penstock.workload.files import read_bytes, row_error
from penstock.workload.trace import F64, I64, Trace

DEFAULT_WINDOW_S = 600.0

_NAME = re.compile(r"(.*)-(trace\.csv|dataset\.json)$")
_ORDER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Window:
    """Arrivals of one client for some minutes; ``shape`` is that of the fitted distribution of the gaps."""

    start_s: float
    stop_s: float
    rate_rps: float
    distribution: str
    shape: float


@dataclass(frozen=True)
class Lengths:
    """A discrete distribution of lengths: ``tokens`` int64[k] with cumulative probability ``cdf`` float64[k]."""

    tokens: I64
    cdf: F64

    def sample(self, n: int, rng: np.random.Generator) -> I64:
        """``n`` lengths, int64[n]."""
        rows = np.searchsorted(self.cdf, rng.random(n), side="right")
        return self.tokens[np.minimum(rows, len(self.tokens) - 1)]


def read(
    path: Path,
    *,
    seed: int = 0,
    rate_rps: float | None = None,
    start_s: float = 0.0,
    duration_s: float | None = None,
    on_zero: OnZero = "skip",
) -> Trace:
    """Generate requests of the clients in a directory, or of the one client that a chunk file belongs to.

    Per client and window of ``chunk-N-trace.csv`` (start, rate, cv, distribution, shape, scale; usually ten minutes)
    arrivals are a renewal process with the given family and shape, scaled so that the mean rate is the *measured* one
    (the fitted scale is off by a factor where the cv is 15). Prompt and output lengths are drawn independently from
    the ``{length: probability}`` dictionaries of ``chunk-N-dataset.json`` in force at the window's start, as ServeGen
    publishes no joint distribution. The output includes reasoning tokens.

    Parameters
    ----------
    rate_rps : float, optional
        Multiplies all client rates by one factor such that the expected mean rate of the stretch is this.
    start_s, duration_s : float
        The stretch of the day to generate. The draws of a window depend on seed, client and window only, so that a
        stretch is the same whether generated alone or cut out.

    Raises
    ------
    PenstockError
        For missing sibling files, malformed rows (file, line, reason), or a stretch without requests.
    """
    stop_s = math.inf if duration_s is None else start_s + duration_s
    clients = [(_client_number(stem), *_read_client(stem)) for stem in _stems(path)]
    expected = sum(
        window.rate_rps * max(0.0, min(window.stop_s, stop_s) - max(window.start_s, start_s))
        for _, windows, _, _ in clients
        for window in windows
    )
    if expected <= 0:
        raise PenstockError(f"{path} has no requests in the chosen stretch", "choose another start or duration")
    factor = 1.0
    if rate_rps is not None:
        check_rate(rate_rps)
        last = max(window.stop_s for _, windows, _, _ in clients for window in windows)
        factor = rate_rps * (min(stop_s, last) - start_s) / expected
    times, prompts, outputs = [], [], []
    for number, windows, prompt_at, output_at in clients:
        for window in windows:
            if window.rate_rps == 0 or window.stop_s <= start_s or window.start_s >= stop_s:
                continue
            rng = np.random.default_rng([seed, number, int(window.start_s)])
            length_s = window.stop_s - window.start_s
            arrival = window.start_s + window_arrivals(length_s, window.rate_rps * factor, _gaps(window, rng))
            prompt = prompt_at(window.start_s).sample(len(arrival), rng)
            output = output_at(window.start_s).sample(len(arrival), rng)
            kept = (arrival >= start_s) & (arrival < stop_s)
            times.append(arrival[kept])
            prompts.append(prompt[kept])
            outputs.append(output[kept])
    time_s = np.concatenate(times)
    order = np.argsort(time_s, kind="stable")  # clients are interleaved: nothing a note should mention
    scaled = f", client rates x {factor:.4g}" if rate_rps is not None else ""
    return assemble(
        path,
        time_s[order],
        np.concatenate(prompts)[order],
        np.concatenate(outputs)[order],
        line_of=lambda row: row,
        row_word="generated request",
        on_zero=on_zero,
        notes=(f"generated from ServeGen statistics of {len(clients)} client(s), seed {seed}{scaled}",),
    )


def _stems(path: Path) -> list[Path]:
    """Paths up to ``-trace.csv`` of the clients meant, in numeric order."""
    if path.is_dir():
        stems = [Path(str(file).removesuffix("-trace.csv")) for file in path.glob("*-trace.csv")]
        if not stems:
            raise PenstockError(f"{path} has no chunk-N-trace.csv", "give a ServeGen directory or a trace file")
        return sorted(stems, key=lambda stem: (_client_number(stem), stem.name))
    match = _NAME.match(path.name)
    if match is None:
        raise PenstockError(f"{path.name} is not named like chunk-N-trace.csv", "rename it; the sibling is found by it")
    return [path.with_name(match[1])]


def _client_number(stem: Path) -> int:
    match = _ORDER.search(stem.name)
    return int(match[1]) if match else 0


def _read_client(stem: Path) -> tuple[list[Window], Callable[[float], Lengths], Callable[[float], Lengths]]:
    windows = read_windows(stem.with_name(stem.name + "-trace.csv"))
    file = stem.with_name(stem.name + "-dataset.json")
    try:
        raw = msgspec.json.decode(read_bytes(file), type=dict[str, dict[str, str]])
        starts = np.array(sorted(float(start) for start in raw))
        by_start = {float(start): fields for start, fields in raw.items()}
    except (msgspec.MsgspecError, ValueError) as error:
        raise PenstockError(f"{file.name}: {error}", "give the dataset file as ServeGen publishes it") from None
    cache: dict[tuple[str, float], Lengths] = {}

    def at(field: str) -> Callable[[float], Lengths]:
        def lookup(start_s: float) -> Lengths:
            start = float(starts[max(0, int(np.searchsorted(starts, start_s, side="right")) - 1)])
            if (field, start) not in cache:
                cache[field, start] = _parse_lengths(file, start, field, by_start[start].get(field, ""))
            return cache[field, start]

        return lookup

    if not len(starts):
        raise PenstockError(f"{file.name} holds no window", "give the dataset file as ServeGen publishes it")
    return windows, at("input_tokens"), at("output_tokens")


def read_windows(file: Path) -> list[Window]:
    """The windows of a ``chunk-N-trace.csv``, checked row by row; PenstockError names file, line and reason."""
    rows: list[tuple[float, float, str, float]] = []
    reader = csv.reader(io.StringIO(read_bytes(file).decode("utf-8")))
    for fields in reader:
        line = reader.line_num
        if not fields:
            continue
        if len(fields) != 6:
            raise row_error(file, line, f"the row has {len(fields)} fields, expected 6")
        try:
            start, rate, shape = float(fields[0]), float(fields[1]), float(fields[4] or "nan")
        except ValueError as error:
            raise row_error(file, line, str(error)) from None
        if not (math.isfinite(start) and start >= 0 and math.isfinite(rate) and rate >= 0):
            raise row_error(file, line, f"start {start:g} and rate {rate:g} must be 0 or more")
        if rows and start <= rows[-1][0]:
            raise row_error(file, line, f"window start {start:g} does not come after {rows[-1][0]:g}")
        family = fields[3].strip().lower()
        if rate > 0 and family not in ("gamma", "weibull", "exponential", "expon"):
            raise row_error(file, line, f'distribution "{fields[3]}", expected Gamma, Weibull or Exponential')
        if rate > 0 and family in ("gamma", "weibull") and not (math.isfinite(shape) and shape > 0):
            raise row_error(file, line, f"shape {shape:g} is not positive")
        rows.append((start, rate, family, shape))
    starts = [row[0] for row in rows]
    last_s = starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else DEFAULT_WINDOW_S)
    return [Window(row[0], stop, *row[1:]) for row, stop in zip(rows, [*starts[1:], last_s], strict=True)]


def _gaps(window: Window, rng: np.random.Generator) -> Gaps:
    """A drawer of gaps with mean 1 of the window's family and shape."""
    shape = window.shape
    if window.distribution == "gamma":
        return lambda n: rng.standard_gamma(shape, n) / shape
    if window.distribution == "weibull":
        mean = math.gamma(1 + 1 / shape)
        return lambda n: rng.weibull(shape, n) / mean
    return rng.standard_exponential


def _parse_lengths(file: Path, start_s: float, field: str, text: str) -> Lengths:
    """``"{5: 0.01, 7: 0.02}"``: a Python dictionary as text, whose keys keep it from being JSON."""
    where = f"{file.name}: {field} of window {start_s:g}"
    try:
        flat = np.array(text.strip().strip("{}").replace(":", ",").split(","), dtype=np.float64)
        pairs = flat.reshape(-1, 2)
    except ValueError:
        raise PenstockError(f"{where} is not a {{length: probability}} dictionary", "fix the file") from None
    tokens, weights = pairs[:, 0], pairs[:, 1]
    if not np.isfinite(pairs).all() or tokens.min() < 0 or weights.min() < 0 or weights.sum() <= 0:
        raise PenstockError(f"{where} has a negative or non-finite length or probability", "fix the file")
    return Lengths(np.rint(tokens).astype(np.int64), np.cumsum(weights) / weights.sum())
