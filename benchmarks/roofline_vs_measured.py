"""Set the roofline's default factors, and its steps, beside measured tables of A100, H100, H200 and two RTX cards.

``python benchmarks/roofline_vs_measured.py [--shared ../shared] [--out docs/results/roofline.md]``
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median

import polars as pl

from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.operator_profile import load_operator_profile
from penstock.perf.roofline import RooflineStepModel

CARDS = {"a100-80g": "a100_sxm", "h100": "h100_sxm", "h200": "h200_sxm"}
PROFILES = (
    ("rtx-4090", "llama-3.1-8b", "RTX4090/meta-llama/Llama-3.1-8B"),
    ("rtx-pro-6000", "llama-3.1-8b", "RTXPRO6000/meta-llama/Llama-3.1-8B"),
    ("rtx-pro-6000", "qwen3-32b", "RTXPRO6000/Qwen/Qwen3-32B"),
    ("rtx-pro-6000", "qwen3-30b-a3b", "RTXPRO6000/Qwen/Qwen3-30B-A3B-Instruct-2507"),
)
Step = tuple[int, int, list[int], list[int]]


def parquet(folder: Path, name: str) -> pl.DataFrame:
    """The one table of that name under ``folder`` (the engine's version is a folder between)."""
    return pl.read_parquet(next(folder.glob(f"*/vllm/*/{name}.parquet")))


def shares(shared: Path, card: str) -> list[float]:
    """Median shares of the data sheet's rates in AIConfigurator's tables (bf16), in the order of the page's columns.

    Large products (1,024 tokens and more; FLOP/s), reading large weights for at most 16 tokens (bytes/s), causal
    prefill attention of 2,048 and of 8,192 tokens (FLOP/s of visible pairs), decode attention of 0.2 to 1 GB and of
    more than 1 GB a call (bytes/s).
    """
    folder = shared / "perf_data" / "aiconfigurator_Apache2" / CARDS[card]
    spec = hardware_spec(card)
    peak, rate = spec.flops_of("bf16"), spec.bandwidth_Bps
    seconds = pl.col("latency") * 1e-3
    m, n, k = pl.col("m").cast(pl.Float64), pl.col("n"), pl.col("k")
    gemm = parquet(folder, "gemm_perf").filter(
        (pl.col("gemm_dtype") == "bfloat16") & n.is_between(1024, 32768) & k.is_between(2048, 16384)
    )
    gemm = gemm.with_columns(
        mfu=2.0 * m * n * k / seconds / peak, mbu=2.0 * (m * n + m * k + n.cast(pl.Float64) * k) / seconds / rate
    )
    prefill = _full_attention(parquet(folder, "context_attention_perf")).filter(pl.col("step") == 0)
    pairs = pl.col("batch_size") * pl.col("isl") * (pl.col("isl") + 1) / 2.0
    prefill = prefill.with_columns(mfu=512.0 * pl.col("num_heads") * pairs / seconds / peak)
    decode = _full_attention(parquet(folder, "generation_attention_perf")).filter(pl.col("num_key_value_heads") >= 4)
    size = 512.0 * pl.col("batch_size") * (pl.col("isl") + pl.col("step")) * pl.col("num_key_value_heads")
    decode = decode.with_columns(size=size, mbu=size / seconds / rate)
    return [
        _median(gemm.filter(m >= 1024)["mfu"]),
        _median(gemm.filter((m <= 16) & (n * k > 5e7))["mbu"]),
        _median(prefill.filter(pl.col("isl") == 2048)["mfu"]),
        _median(prefill.filter(pl.col("isl") == 8192)["mfu"]),
        _median(decode.filter(pl.col("size").is_between(2e8, 1e9))["mbu"]),
        _median(decode.filter(pl.col("size") > 1e9)["mbu"]),
    ]


def _full_attention(frame: pl.DataFrame) -> pl.DataFrame:
    frame = frame.filter(
        (pl.col("head_dim") == 128) & (pl.col("kv_cache_dtype") == "bfloat16") & (pl.col("num_heads") >= 16)
    )
    return frame.filter(pl.col("window_size") == 0) if "window_size" in frame.columns else frame


def _median(column: pl.Series) -> float:
    return float(median(column.to_list()))


def all_reduce_factor(shared: Path, card: str) -> float:
    """Root mean square of the log ratio of formula to measured all-reduce, as a factor; 8 KB to 64 MB, 2 to 8 GPUs."""
    folder = shared / "perf_data" / "aiconfigurator_Apache2" / CARDS[card]
    rows = parquet(folder, "custom_allreduce_perf").filter(
        (pl.col("backend") == "vllm_graph") & pl.col("message_size").is_between(8192, 64e6)
    )
    models = {n: RooflineStepModel(model_spec("llama-3.1-8b"), hardware_spec(card), tp=n) for n in (2, 4, 8)}
    logs = [
        math.log(models[n].all_reduce_s(size) / (milliseconds * 1e-3))
        for n, size, milliseconds in rows.select("num_gpus", "message_size", "latency").rows()
        if n in models
    ]
    return math.exp(math.sqrt(fmean(x * x for x in logs)))


def steps() -> dict[str, list[Step]]:
    """Kinds of steps to compare."""
    decode: list[Step] = [(n, n * kv, [], []) for n in (1, 8, 32, 64, 128) for kv in (256, 1024, 2048, 4096)]
    prefill: list[Step] = [(0, 0, [q], [past]) for q in (256, 512, 1024, 2048) for past in (0, 2048)]
    mixed: list[Step] = [(n, n * 1024, [q], [0]) for n in (8, 32, 64, 120) for q in (256, 1024, 1900)]
    return {"decode": decode, "prefill": prefill, "mixed": mixed}


def errors(ours: RooflineStepModel, folder: Path, model: str) -> Iterable[str]:
    """Signed mean and mean size of the relative error for each kind of step, as cells."""
    measured = load_operator_profile(folder, model_spec(model), skew=False)
    for rows in steps().values():
        found = [ours.step_s(*row) / measured.step_s(*row) - 1.0 for row in rows]
        yield f"{100 * fmean(found):+.0f} % ({100 * fmean(abs(x) for x in found):.0f} %)"


def splitwise(shared: Path) -> list[str]:
    """Rows: Llama-2-70B of Splitwise's end-to-end measurements (batch 1, tensor parallel 8) beside the roofline."""
    frame = pl.read_csv(shared / "perf_data" / "splitwise_sim_MIT" / "perf_model.csv")
    frame = frame.filter(
        (pl.col("model") == "llama2-70b") & (pl.col("tensor_parallel") == 8) & (pl.col("batch_size") == 1)
    )
    lines = []
    for name, card in (("a100-80gb", "a100-80g"), ("h100-80gb", "h100")):
        model = RooflineStepModel(model_spec("llama-2-70b"), hardware_spec(card), tp=8)
        for size in (512, 1024, 2048, 4096):
            rows = frame.filter((pl.col("hardware") == name) & (pl.col("prompt_size") == size))
            if rows.is_empty():
                continue
            prompt, token = _median(rows["prompt_time"]), _median(rows["token_time"])
            ours = 1e3 * model.step_s(0, 0, [size], [0]), 1e3 * model.step_s(1, size, [], [])
            lines.append(f"| {card} | {size} | {prompt:.0f} | {ours[0]:.0f} | {token:.1f} | {ours[1]:.1f} |")
    return lines


def main() -> None:
    """Print or write the tables between the markers of the result page."""
    parser = argparse.ArgumentParser()
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--shared", type=Path, default=here.parent / "shared")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        "| card | products ≥ 1,024 tokens, MFU | weights for ≤ 16 tokens, MBU | prefill attention 2,048, MFU "
        "| 8,192, MFU | decode attention 0.2-1 GB, MBU | > 1 GB, MBU | all-reduce formula off by a factor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for card in CARDS:
        cells = " | ".join(f"{x:.2f}" for x in shares(args.shared, card))
        lines.append(f"| {card} | {cells} | {all_reduce_factor(args.shared, card):.2f} |")
    lines += ["", "| card | model | decode | prefill | mixed |", "|---|---|---:|---:|---:|"]
    for card, model, folder in PROFILES:
        ours = RooflineStepModel(model_spec(model), hardware_spec(card))
        root = args.shared / "ground_truth" / "perf" / folder / "bf16" / "tp1"
        lines.append(f"| {card} | {model} | {' | '.join(errors(ours, root, model))} |")
    lines += ["", "| card | prompt | measured prompt, ms | roofline, ms | measured token, ms | roofline, ms |"]
    lines += ["|---|---:|---:|---:|---:|---:|", *splitwise(args.shared)]
    text = "\n".join(lines)
    if args.out is None:
        print(text)
        return
    head, _, rest = args.out.read_text().partition("<!-- generated -->\n")
    args.out.write_text(f"{head}<!-- generated -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
