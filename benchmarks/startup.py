"""What a command costs beyond its work: ``penstock --help`` and a whole 1,000-request simulation, as processes.

Run: ``python benchmarks/startup.py``. Wall seconds of whole processes, median of nine, beside a bare interpreter.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

PENSTOCK = str(Path(sys.executable).parent / "penstock")
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "penstock --help": [PENSTOCK, "--help"],
    "penstock simulate, 1,000 requests": [
        *(PENSTOCK, "simulate", "--synthetic", "azure-conv", "--requests", "1000", "--rate", "5"),
        *("--model", "llama-3.1-8b", "--hardware", "a100-80g", "--prefill", "2", "--decode", "2"),
    ],
}


def wall_s(command: list[str], runs: int = 9) -> float:
    """Median wall seconds of a whole process, after one run that fills the file cache."""
    times = []
    for i in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        if i:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print one line a command."""
    for label, command in COMMANDS.items():
        print(f"{label:36} {wall_s(command):.3f} s")


if __name__ == "__main__":
    main()
