"""Make the built-in length profiles (src/penstock/workload/profiles/*.json) from trace files.

Usage: python scripts/make_length_profiles.py [TRACES]    (default: ../shared/traces beside the repository)

Needed only when a source or the form of the tables changes; the results are committed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from penstock.workload.lengths import quantile_grid
from penstock.workload.read import read_trace
from penstock.workload.trace import I64

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "src" / "penstock" / "workload" / "profiles"

PROMPT_POINTS = 128
OUTPUT_BINS = 16
OUTPUT_POINTS = 56

SOURCES = {
    "azure-conv": (
        "azure_conv_2023.csv",
        "Azure Public Dataset, LLM inference trace 2023, conversation (Patel et al., Splitwise, ISCA 2024)",
        "CC-BY-4.0",
    ),
    "azure-code": (
        "azure_code_2023.csv",
        "Azure Public Dataset, LLM inference trace 2023, coding (Patel et al., Splitwise, ISCA 2024)",
        "CC-BY-4.0",
    ),
    "sharegpt": ("sharegpt_lengths.csv", "ShareGPT length table published with the Vidur simulator", "MIT"),
}

REASONING = {
    "name": "reasoning",
    "source": "reconstruction from two published shares of the output lengths of DeepSeek-R1-Distill-Qwen-7B on "
    "ShareGPT prompts (STAR, arXiv 2510.13668 v2): 29.2 % below 1,000 tokens, 17.3 % above 30,000, cap 32,768",
    "licence": "Apache-2.0 (figures of our own from published facts)",
    "prompt_like": "sharegpt",
    # Below 1,000 and from there to 30,000 linear in log length; of the 17.3 % above, 1.3 % end by themselves and 16 %
    # are cut at the cap (the shares are published, this split is not).
    "output_share": [0.0, 0.292, 0.827, 0.84, 1.0],
    "output_tokens": [64, 1000, 30000, 32768, 32768],
}


def table(prompt: I64, output: I64) -> dict[str, Any]:
    """Quantiles of the prompts, and of the outputs per bin of prompt rank (ties broken by order in the file)."""
    order = np.argsort(prompt, kind="stable")
    rows = [
        np.quantile(output[part], quantile_grid(OUTPUT_POINTS)).round(1).tolist()
        for part in np.array_split(order, OUTPUT_BINS)
    ]
    return {"prompt": np.quantile(prompt, quantile_grid(PROMPT_POINTS)).round(1).tolist(), "output": rows}


def compact(value: dict[str, Any]) -> str:
    """JSON with one line per field and per table row, without ``.0``."""

    def short(item: Any) -> Any:
        if isinstance(item, list):
            return [short(part) for part in item]
        return int(item) if isinstance(item, float) and item.is_integer() else item

    lines = []
    for key, item in value.items():
        text = json.dumps(short(item), separators=(",", ":"), ensure_ascii=False).replace("],[", "],\n[")
        lines.append(f'"{key}":{text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Write all profiles."""
    traces = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "traces"
    PROFILES.mkdir(exist_ok=True)
    for name, (file, source, licence) in SOURCES.items():
        trace = read_trace(traces / file)
        value = {"name": name, "source": source, "licence": licence, "requests": len(trace)}
        value |= table(trace.prompt_tokens, trace.output_tokens)
        (PROFILES / f"{name}.json").write_text(compact(value))
    (PROFILES / "reasoning.json").write_text(compact(REASONING))


if __name__ == "__main__":
    main()
