"""Where the measured tables lie, and a skip with a message when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def shared(path: str) -> Path:
    """``path`` under the folder of shared material, or a skip."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} is not here (measured tables are not part of the repository)")
    return found
