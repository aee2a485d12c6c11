"""Plain tables of lengths (ShareGPT style), with or without arrival times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penstock.core.errors import PenstockError
from penstock.workload.arrivals import poisson_arrivals
from penstock.workload.assemble import OnZero, assemble
from penstock.workload.files import head
from penstock.workload.table import Column, header_fields, read_table
from penstock.workload.trace import Trace

# Names used by Vidur, vLLM, SGLang, Mooncake-style exports and this project, most common first.
PROMPT_NAMES = ("num_prefill_tokens", "prompt_tokens", "input_tokens", "prompt_len", "input_len", "input_length")
OUTPUT_NAMES = (
    "num_decode_tokens",
    "output_tokens",
    "completion_tokens",
    "generated_tokens",
    "output_len",
    "output_length",
)
ARRIVAL_NAMES = ("arrival_s", "arrived_at", "arrival_time_s")

DEFAULT_RATE_RPS = 1.0


def find_names(header: Sequence[str]) -> tuple[str, str, str | None] | None:
    """Prompt, output and arrival column of a header, or None where it has no pair of lengths."""
    lowered = {name.lower() for name in header}

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in lowered), None)

    prompt, output = first(PROMPT_NAMES), first(OUTPUT_NAMES)
    return None if prompt is None or output is None else (prompt, output, first(ARRIVAL_NAMES))


def read(path: Path, *, on_zero: OnZero = "skip", rate_rps: float | None = None, seed: int = 0) -> Trace:
    """Read a CSV with a prompt-length and an output-length column; other columns are not looked at.

    Where an arrival column (``arrival_s`` or Vidur's ``arrived_at``, seconds) exists it is used. Otherwise requests
    keep the order of the file and arrive as a Poisson process of ``rate_rps`` (1 request/s where it is None), which a
    note says.

    Raises
    ------
    PenstockError
        Naming file, line and reason of the first malformed row; see ``read_table`` and ``assemble``.
    """
    first_line = next((line for line in head(path).decode("utf-8", "replace").splitlines() if line.strip()), "")
    names = find_names(header_fields(first_line))
    if names is None:
        raise PenstockError(
            f"{path.name}:1: no pair of length columns in the header ({first_line[:80]})",
            f"name them {PROMPT_NAMES[0]} and {OUTPUT_NAMES[0]}",
        )
    prompt, output, arrival = names
    columns = [Column(prompt, "tokens"), Column(output, "tokens")]
    table = read_table(path, columns if arrival is None else [*columns, Column(arrival, "seconds")])
    prompts, outputs = table.tokens(prompt), table.tokens(output)
    notes: tuple[str, ...] = ()
    if arrival is not None:
        time_s = table.seconds(arrival)
    else:
        rate = DEFAULT_RATE_RPS if rate_rps is None else rate_rps
        time_s = poisson_arrivals(len(prompts), rate, np.random.default_rng(seed))
        notes = (f"the file has no arrival times: Poisson arrivals at {rate:g} requests/s, seed {seed}",)
    return assemble(path, time_s, prompts, outputs, line_of=table.line_of, on_zero=on_zero, notes=notes)
