"""Where things are in a work folder of the predictor."""

from __future__ import annotations

from pathlib import Path


def head_folder(work: str | Path) -> Path:
    """The head's own folder: what an engine is given."""
    return Path(work) / "head"


def rivals_folder(work: str | Path) -> Path:
    """Networks that the head is compared with, a file each."""
    return Path(work) / "rivals"
