"""The published worked example (arXiv 2603.04716) and small cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from penstock.plan.closed_form import Case
from penstock.plan.ladder import Ladder
from penstock.plan.machine import Benchmark

BATCH = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
TPOT_S = (0.0128, 0.0164, 0.0188, 0.0216, 0.0239, 0.0262)
LADDER = Ladder(BATCH, TPOT_S)
ISL, OSL = 6144.0, 512.0
PREFILL_TPS = 28_300.0
TPM = 5e6


def worked_example(fit: str = "quadratic", tpm: float = TPM, **changes: Any) -> Case:
    """DeepSeek-V3.1 on nodes of eight H200: TTFT 2 s, TPOT 20 ms, 5 M tokens/min, overhead 0.1 s."""
    given: dict[str, Any] = {
        "machine": Benchmark(PREFILL_TPS, LADDER, fit),
        "rate_rps": tpm / 60 / (ISL + OSL),
        "prompts": np.array([ISL]),
        "outputs": np.array([OSL]),
        "ttft_s": 2.0,
        "tpot_s": 0.020,
        "overhead_s": 0.1,
    }
    return Case(**(given | changes))


def ladder_file(folder: Path) -> Path:
    """The published ladder as a CSV file."""
    path = folder / "ladder.csv"
    rows = [f"{b:g},{t:g}" for b, t in zip(BATCH, TPOT_S, strict=True)]
    path.write_text("\n".join(["batch,tpot_s", *rows]) + "\n")
    return path
