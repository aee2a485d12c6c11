"""Reading an engine's log: how far its start has come, and why it failed."""

from __future__ import annotations

import re
from pathlib import Path

_PREFIX = re.compile(r"^(\([\w-]+ pid=\d+\) )?((INFO|WARNING|ERROR) \d\d-\d\d [\d:]+ \[[^\]]*\] )?")
_CAUSE = re.compile(
    r"^(\w+\.)*(\w*(Error|Exception|Interrupt)): .|^Value error, |\berror: .|^Killed|Segmentation fault"
)
_CONSEQUENCES = (
    "validation error for",
    "Engine core initialization failed",
    "Worker failed",
    "WorkerProc initialization failed",
    "Engine core proc",
)
_PHASES = (
    ("loading the model", "Starting to load model"),
    ("making room for KV", "KV cache size"),
    ("opening", "Started server process"),
)


def phase(log: Path) -> str:
    """What a starting engine is doing, in a word or three."""
    text = _text(log)
    return next((name for name, sign in reversed(_PHASES) if sign in text), "starting")


def reason(log: Path) -> str:
    """The line of the log that says best why an engine ended, without prefixes; empty if it said nothing."""
    lines = [_PREFIX.sub("", line).strip() for line in _text(log).splitlines()]
    lines = [line for line in lines if line]
    causes = [line for line in lines if _CAUSE.search(line) and not any(text in line for text in _CONSEQUENCES)]
    # Consequences follow causes, and processes that failed for the same reason repeat it.
    chosen = causes[-1] if causes else (lines[-1] if lines else "")
    return chosen[:300]


def _text(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
