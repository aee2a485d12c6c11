"""Telling the format of a trace from its content; file names play no part."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Literal, get_args

from penstock.core.errors import PenstockError
from penstock.workload.files import head
from penstock.workload.readers.lengths_csv import find_names
from penstock.workload.recording import FORMAT as RECORDING
from penstock.workload.table import header_fields

Format = Literal["penstock", "azure", "mooncake", "burstgpt", "lengths", "vllm-bench", "servegen"]

FORMATS: tuple[Format, ...] = get_args(Format)

DESCRIPTIONS: dict[Format, str] = {
    "penstock": "our own recording, JSON lines with a header line",
    "azure": "CSV with TIMESTAMP,ContextTokens,GeneratedTokens",
    "mooncake": "JSON lines with timestamp, input_length, output_length, hash_ids",
    "burstgpt": "CSV with Timestamp, Request tokens, Response tokens",
    "lengths": "CSV with prompt and output lengths, such as num_prefill_tokens,num_decode_tokens",
    "vllm-bench": "JSON result of vllm bench serve --save-detailed",
    "servegen": "chunk-N-trace.csv with chunk-N-dataset.json, or a directory of them",
}

_VLLM_KEYS = ('"input_lens"', '"request_throughput"', '"total_input_tokens"', '"request_rate"', '"start_times"')


def detect_format(path: Path | str) -> Format:
    """Name of the format of a file or (ServeGen) directory, judged by its first 64 KiB, gzip or not.

    Raises
    ------
    PenstockError
        For a missing or empty file, or content of no known format (the known ones are listed).
    """
    path = Path(path)
    if path.is_dir():
        if next(path.glob("*-trace.csv"), None) is not None:
            return "servegen"
        raise _unknown(path, "the directory has no chunk-N-trace.csv")
    text = head(path).decode("utf-8", "replace")
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if not first:
        raise PenstockError(f"{path} is empty", "give a trace with rows")
    found = _from_json(text, first) if first.startswith("{") else _from_csv(first)
    if found is None:
        raise _unknown(path, f'it starts with "{first[:60]}"')
    return found


def _from_json(text: str, first: str) -> Format | None:
    if re.search(rf'"format"\s*:\s*"{RECORDING}"', first):
        return "penstock"
    if all(f'"{key}"' in first for key in ("timestamp", "input_length", "output_length")):
        return "mooncake"
    if re.match(r'\{\s*"\d+(\.\d+)?"\s*:\s*\{\s*"\w+"\s*:', text.lstrip()) and '"input_tokens"' in text:
        return "servegen"
    # A result may be one line of many megabytes: ask for the keys that stand before its long lists.
    if any(key in text for key in _VLLM_KEYS):
        return "vllm-bench"
    return None


def _from_csv(first: str) -> Format | None:
    try:
        header = header_fields(first)
    except csv.Error:
        return None
    names = {name.lower() for name in header}
    if {"timestamp", "contexttokens", "generatedtokens"} <= names:
        return "azure"
    if {"timestamp", "request tokens", "response tokens"} <= names:
        return "burstgpt"
    if find_names(header) is not None:
        return "lengths"
    if len(header) == 6 and all(_is_number(field) for field in (*header[:3], *header[4:]) if field):
        return "servegen"  # has no header: start, rate, cv, distribution, shape, scale
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown(path: Path, why: str) -> PenstockError:
    known = "; ".join(f"{name} ({DESCRIPTIONS[name]})" for name in FORMATS)
    return PenstockError(f"{path} is of no known trace format ({why})", f"give one of: {known}")
