"""Running commands in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from penstock.cli.main import app

SMALL = ("-n", "60", "--rate", "20")


def penstock(*args: str | Path) -> Result:
    """Run a command; the result has exit_code, stdout and stderr."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ok(*args: str | Path) -> Result:
    """The same, for what must succeed."""
    result = penstock(*args)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def document(*args: str | Path) -> Any:
    """The JSON that a command writes to stdout."""
    return json.loads(ok(*args, "--json", "-").stdout)
