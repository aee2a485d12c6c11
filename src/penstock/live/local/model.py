"""The bundled model: a small Qwen3 that writes out the solutions of puzzles, and the predictor of their lengths.

``penstock-tiny/README.md`` is its card; ``scripts/train_model.py`` made it.
"""

from __future__ import annotations

from pathlib import Path

NAME = "penstock-tiny"


def bundled_model() -> Path:
    """Folder of the bundled model, in the Hugging Face layout."""
    return Path(__file__).parent / NAME


def bundled_head() -> Path:
    """Folder of its remaining-length predictor."""
    return bundled_model() / "head"
