"""Read an operator profile (CSV folder) into an :class:`OperatorStepModel`.

The folder layout is LLMServingSim's profiler for vLLM 0.19 (MIT): ``dense.csv`` (layer, tokens, time_us),
``per_sequence.csv`` (layer, sequences, time_us), ``attention.csv`` (prefill_chunk, kv_prefill, n_decode, kv_decode,
time_us), ``moe.csv`` (tokens, activated_experts, time_us) and ``skew.csv``. One layer of the model was run eagerly
with each GPU's share of the shapes (heads, MLP and vocabulary divided by the tensor-parallel degree), and the time of
each kernel was taken; collectives between GPUs are not in it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from penstock.core.errors import PenstockError
from penstock.perf.models import ModelSpec, expected_experts
from penstock.perf.operators import AttentionTable, OperatorStepModel, locate

ONCE = ("embedding", "final_layernorm")
"""Operators that run once a step; every other row of ``dense.csv`` runs in each layer."""
TWICE = ("layernorm",)
"""Operators that run twice a layer (before attention and before the MLP); their time is that of one call."""

_US = 1e-6
Curve = list[tuple[int, float]]


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes for which vLLM captures CUDA graphs; smaller batches are padded up to the next one.

    1, 2, 4, then every 8 up to 256 and every 16 up to ``min(2 * max_num_seqs, 512)``. Source: vLLM 0.19's
    ``cudagraph_capture_sizes`` (listed in ``ground_truth/*/*/meta.json``).
    """
    last = min(2 * max_num_seqs, 512)
    return [n for n in [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)] if n <= last]


def padding_table(sizes: list[int]) -> list[int]:
    """Index = tokens: tokens the engine runs, given the ascending sizes of its captured graphs (beyond: unpadded)."""
    table = [0]
    for size in sizes:
        table += [size] * (size - len(table) + 1)
    return table


def load_operator_profile(
    folder: str | Path,
    model: ModelSpec,
    ep: int = 1,
    exchange_Bps: float = 0.0,
    exchange_latency_s: float = 0.0,
    all_reduce_s: list[float] | None = None,
    max_num_seqs: int = 256,
    skew: bool | None = None,
    overhead_s: float = 0.0,
    eager_gap_s: float = 0.0,
) -> OperatorStepModel:
    """An :class:`OperatorStepModel` from the CSV files in ``folder`` (of one tensor-parallel degree).

    Parameters
    ----------
    folder : path
        Holds ``dense.csv``, ``per_sequence.csv``, ``attention.csv``, for experts ``moe.csv``, and maybe ``skew.csv``.
    model : ModelSpec
        Gives the number of layers and, for experts, how many there are.
    ep : int
        Expert-parallel ranks in a data-parallel group, each with the same tokens: every rank holds ``1/ep`` of the
        experts and works on the tokens of all.
    exchange_Bps, exchange_latency_s : float
        Bytes/s and seconds of one collective between the ranks (two a MoE layer: all-gather, reduce-scatter).
    all_reduce_s : list of float, optional
        Index = tokens: seconds of one tensor-parallel all-reduce (two a layer); none with one GPU.
    max_num_seqs : int
        The engine's limit, which sets the captured graph sizes.
    skew : bool, optional
        Whether to use ``skew.csv``. By default as the profile's own ``meta.yaml`` (one folder up) says under
        ``skew_profile: enabled``; without that file, if the folder has a ``skew.csv``.
    overhead_s, eager_gap_s : float
        Seconds added to every step, and to a step with prefill besides.

    Raises
    ------
    PenstockError
        If a file is missing, a row does not parse (file and line are named), or an attention grid has holes.
    """
    root = Path(folder)
    dense = _curves(root / "dense.csv")
    per_layer: list[float] = []
    once: list[float] = []
    for name, curve in dense.items():
        table = _expand(curve)
        into = once if name in ONCE else per_layer
        times = 2.0 if name in TWICE else 1.0
        into.extend([0.0] * (len(table) - len(into)))
        for i, seconds in enumerate(table):
            into[i] += times * seconds
    if all_reduce_s:
        per_layer = [t + 2.0 * all_reduce_s[min(i, len(all_reduce_s) - 1)] for i, t in enumerate(per_layer)]
    rows = [0.0] * 1
    for curve in _curves(root / "per_sequence.csv").values():
        table = _expand(curve)
        rows.extend([0.0] * (len(table) - len(rows)))
        rows = [a + b for a, b in zip(rows, table, strict=True)]
    experts: list[float] | None = None
    if model.is_moe:
        experts = _experts(root / "moe.csv", model, len(per_layer) - 1, ep, exchange_Bps, exchange_latency_s)
    return OperatorStepModel(
        layers=model.layers,
        dense_s=per_layer,
        once_s=once,
        rows_s=rows,
        attention=_attention(root, _wants_skew(root) if skew is None else skew),
        moe_layers=model.moe_layers,
        experts_s=experts,
        pad=padding_table(capture_sizes(max_num_seqs)),
        overhead_s=overhead_s,
        eager_gap_s=eager_gap_s,
    )


def _rows(path: Path, columns: list[str]) -> list[list[str]]:
    if not path.is_file():
        raise PenstockError(f"{path}: no such file", "give the folder that holds the CSV files of one tp degree")
    with path.open(newline="") as handle:
        reader = csv.DictReader(handle)
        missing = [c for c in columns if c not in (reader.fieldnames or [])]
        if missing:
            raise PenstockError(f"{path}:1: no column {', '.join(missing)}", "is this an operator profile?")
        return [[row[c] for c in columns] for row in reader]


def _number(text: str, path: Path, row: int) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise PenstockError(f"{path}:{row + 2}: {text!r} is not a number", "mend or remove the row") from error


def _curves(path: Path) -> dict[str, Curve]:
    second = "sequences" if path.name == "per_sequence.csv" else "tokens"
    curves: dict[str, Curve] = {}
    for i, (layer, count, micros) in enumerate(_rows(path, ["layer", second, "time_us"])):
        curves.setdefault(layer, []).append((int(_number(count, path, i)), _number(micros, path, i) * _US))
    return {name: sorted(curve) for name, curve in curves.items()}


def _expand(curve: Curve) -> list[float]:
    """Index = tokens, 0 to the largest measured: linear between measured points; nothing costs nothing."""
    axis = [n for n, _ in curve]
    table = [0.0]
    for n in range(1, axis[-1] + 1):
        i = locate(axis, n) if len(axis) > 1 else 0
        (x0, y0), (x1, y1) = curve[i], curve[min(i + 1, len(curve) - 1)]
        table.append(y0 if x1 == x0 else y0 + (y1 - y0) * (n - x0) / (x1 - x0))
    return table


def _experts(path: Path, model: ModelSpec, most: int, ep: int, rate: float, latency: float) -> list[float]:
    """Index = tokens of one rank: seconds of one MoE layer's experts on one rank, exchange included.

    A rank sees the tokens of all ranks but runs ``1/ep`` of their picks: as much work as its own tokens with all
    picks. The experts it touches are its share of the expected distinct ones among all ranks' tokens.
    """
    table: dict[int, Curve] = {}
    for i, cells in enumerate(_rows(path, ["tokens", "activated_experts", "time_us"])):
        tokens, active, micros = (_number(c, path, i) for c in cells)
        table.setdefault(int(tokens), []).append((int(active), micros * _US))
    axis = sorted(table)

    def at(tokens: int, active: float) -> float:
        curve = sorted(table[tokens])
        if len(curve) == 1 or active <= curve[0][0]:
            return curve[0][1]
        i = locate([a for a, _ in curve], active)
        (a0, t0), (a1, t1) = curve[i], curve[i + 1]
        # A token row with few tokens was not measured with more experts than those can pick.
        return t0 + (t1 - t0) * (min(active, a1) - a0) / (a1 - a0)

    seconds = [0.0]
    for n in range(1, most + 1):
        active = expected_experts(model.experts, model.experts_per_token, n * ep) / ep
        i = locate(axis, n)
        n0, n1 = axis[i], axis[i + 1]
        low, high = at(n0, active), at(n1, active)
        moved = (ep - 1) * n * model.hidden * 2.0
        exchange = 2.0 * (latency + (moved / rate if rate > 0.0 else 0.0)) if ep > 1 else 0.0
        seconds.append(low + (high - low) * (n - n0) / (n1 - n0) + exchange)
    return seconds


def _attention(root: Path, skew: bool) -> AttentionTable:
    path = root / "attention.csv"
    cells: dict[tuple[int, int, int, int], float] = {}
    for row, line in enumerate(_rows(path, ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"])):
        c, p, n, k, micros = (_number(x, path, row) for x in line)
        cells[int(c), int(p), int(n), int(k)] = micros * _US
    chunks = _doubling(c for c, _, n, _ in cells if n > 0)
    pasts = [0, *_doubling(p for c, p, n, _ in cells if c > 0 and n > 0)]
    kv_axis = _doubling(k for _, _, n, k in cells if n > 0)
    n_axis = _doubling(n for c, _, n, _ in cells if c == 0)
    mixed_n = [0, *_doubling(n for c, _, n, _ in cells if c > 0)]
    wanted = [(0, 0, n, k) for n in n_axis for k in kv_axis]
    wanted += [(c, p, 0, 0) for c in chunks for p in pasts]
    wanted += [(c, p, n, k) for c in chunks for p in pasts for n in mixed_n[1:] for k in kv_axis]
    holes = [key for key in wanted if key not in cells]
    if holes or min(len(chunks), len(pasts), len(kv_axis), len(n_axis), len(mixed_n)) < 2:
        raise PenstockError(
            f"{path}: the attention grid has {len(holes)} holes, first (chunk, past, decodes, kv) = {holes[:1]}",
            "profile every combination of a doubling grid, at least two values an axis",
        )
    prefill = [[cells[c, p, 0, 0] for p in pasts] for c in chunks]
    mixed = [
        [
            # No decodes beside the chunk: the chunk alone, at every KV length.
            [[cells[c, p, 0, 0]] * len(kv_axis)] + [[cells[c, p, n, k] for k in kv_axis] for n in mixed_n[1:]]
            for p in pasts
        ]
        for c in chunks
    ]
    skews = _skew(root / "skew.csv") if skew and (root / "skew.csv").is_file() else {}
    return AttentionTable(
        n_axis=n_axis,
        kv_axis=kv_axis,
        decode_s=[[cells[0, 0, n, k] for k in kv_axis] for n in n_axis],
        chunk_axis=chunks,
        past_axis=pasts,
        prefill_s=prefill,
        mixed_n_axis=mixed_n,
        mixed_s=mixed,
        skew_pure=[_nearest(skews.get("pure", {}), n) for n in n_axis],
        skew_mixed=[_nearest(skews.get("mixed", {}), n) for n in mixed_n],
    )


def _doubling(values: Iterable[int]) -> list[int]:
    """The values that are the smallest positive one times a power of two, sorted.

    Some profiles hold points off this grid for a part of the combinations only; a table needs every combination.
    """
    present = sorted({v for v in values if v > 0})
    axis: list[int] = []
    value = present[0] if present else 0
    while present and value <= present[-1]:
        if value in present:
            axis.append(value)
        value *= 2
    return axis


def _wants_skew(root: Path) -> bool:
    meta = root.parent / "meta.yaml"
    if not meta.is_file():
        return True
    section = meta.read_text().partition("skew_profile:")[2].lstrip()
    return not section.startswith("enabled: false")


def _skew(path: Path) -> dict[str, dict[int, float]]:
    """Regime -> decodes -> mean of measured time of an unequal batch over that of an equal one with the same total.

    Over the profile's batches in which an eighth to three quarters of the requests are four times as long as the
    rest: real batches (ShareGPT lengths) have that spread, 0.4 to 0.7 of the mean. One factor for each batch size,
    because a step is described by its total context only.
    """
    ratios: dict[str, dict[int, list[float]]] = {}
    columns = ["regime", "n", "ratio", "t_mean_us", "t_skew_us"]
    for i, (regime, *cells) in enumerate(_rows(path, columns)):
        n, ratio, mean, measured = (_number(c, path, i) for c in cells)
        if 0.1 <= ratio <= 0.8 and mean > 0.0:
            ratios.setdefault(regime, {}).setdefault(int(n), []).append(measured / mean)
    return {regime: {n: sum(r) / len(r) for n, r in by_n.items()} for regime, by_n in ratios.items()}


def _nearest(factors: dict[int, float], n: int) -> float:
    # One decode cannot be unequal to itself.
    return factors[min(factors, key=lambda m: abs(m - n))] if factors and n > 1 else 1.0
