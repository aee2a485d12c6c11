"""Roles over time as SVG: what arrives, which instance has which role, and the share of requests that meet the SLO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.types import Role
from penstock.experiment.build import run
from penstock.experiment.setup import Setup, replace
from penstock.report.figures import ROLE_COLOURS
from penstock.report.metrics import Verdicts
from penstock.sim.result import SimResult

WIDE, LEFT, RIGHT = 1100, 92, 20
TOP, ARRIVE, BAR, SHARE = 68, 70, 22, 110
GAP = 34
ARROW, STATIC = "#009a70", "#707780"


def ink(colour: str, content: str) -> str:
    """Text of another colour."""
    return f'<tspan fill="{colour}">{content}</tspan>'


def draw(path: Path, title: str, setup: Setup, marks: Sequence[tuple[float, str]], bin_s: float) -> None:
    """Arrivals, roles and attainment of one run of arrow over time, with static 4P4D's attainment, as SVG."""
    ours = run(setup, sample=False)
    static = run(replace(setup, policy="static", options={}), sample=False)
    trace, end = ours.trace, max(float(ours.trace.arrival_s[-1]), 1.0)
    width = WIDE - LEFT - RIGHT
    bins = np.arange(0.0, end + bin_s, bin_s)
    where = np.minimum((trace.arrival_s // bin_s).astype(int), len(bins) - 2)
    middle = (bins[:-1] + bins[1:]) / 2
    out: list[str] = []

    def x(time_s: float) -> float:
        return LEFT + width * min(time_s / end, 1.0)

    def text(at: float, y: float, content: str, more: str = "") -> None:
        out.append(f'<text x="{at:.1f}" y="{y:.1f}" {more}>{content}</text>')

    def line(values: Any, y0: float, height: float, colour: str, more: str = "") -> None:
        known = np.flatnonzero(~np.isnan(values))  # bins without arrivals break the line
        for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
            points = " ".join(f"{x(middle[i]):.1f},{y0 + height * (1 - values[i]):.1f}" for i in part)
            points += f" {x(middle[part[-1]]) + 0.1:.1f},{y0 + height * (1 - values[part[-1]]):.1f}"
            out.append(f'<polyline points="{points}" stroke="{colour}" {more}/>')

    def frame(y0: float, height: float, name: str) -> None:
        out.append(f'<rect x="{LEFT}" y="{y0}" width="{width}" height="{height}" fill="none" stroke="#c4c9d0"/>')
        text(LEFT, y0 - 7, name)

    prefill, decode = ROLE_COLOURS[Role.PREFILL], ROLE_COLOURS[Role.DECODE]
    text(LEFT, 20, title, 'class="t"')
    y = TOP
    tokens = (trace.prompt_tokens, trace.output_tokens)
    loads = [np.bincount(where, weights=w, minlength=len(middle)) / bin_s for w in tokens]
    peaks = [float(load.max()) for load in loads]
    keys = (ink(prefill, f"prompt (peak {peaks[0]:,.0f})"), ink(decode, f"output (peak {peaks[1]:,.0f})"))
    frame(y, ARRIVE, f"arriving tokens/s: {', '.join(keys)}")
    for load, peak, colour in zip(loads, peaks, (prefill, decode), strict=True):
        line(0.95 * load / peak, y, ARRIVE, colour)
    y += ARRIVE + GAP
    flips = len(ours.flips.time_s)
    text(LEFT, y - 7, f"roles: {ink(prefill, '■ prefill')} {ink(decode, '■ decode')} ({flips} flips)")
    for i, spans in enumerate(role_spans(ours, setup, end)):
        text(LEFT - 8, y + BAR * i + 15, f"instance {i}", 'text-anchor="end"')
        for start, stop, role in spans:
            out.append(f'<rect x="{x(start):.1f}" y="{y + BAR * i + 1}" width="{max(x(stop) - x(start), 0.6):.1f}" '
                       f'height="{BAR - 2}" fill="{ROLE_COLOURS[role]}"/>')  # fmt: skip
    y += BAR * (setup.cluster.prefill + setup.cluster.decode) + GAP
    slo = setup.slo
    lines = (ink(ARROW, "arrow"), ink(STATIC, "static 4P4D (dashed)"), "goal 90 % (dotted)")
    target = f"TTFT {slo.ttft_s:g} s and TPOT {slo.tpot_s:g} s"
    frame(y, SHARE, f"share of arriving requests that meet {target}: {', '.join(lines)}")
    for result, drawn in ((static, (STATIC, 'stroke-dasharray="6 4"')), (ours, (ARROW, ""))):
        met, count = Verdicts(result, slo.slo()).met, np.bincount(where, minlength=len(middle))
        line(np.bincount(where, weights=met, minlength=len(middle)) / np.where(count, count, np.nan), y, SHARE, *drawn)
    out.append(f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y + SHARE * 0.1}" y2="{y + SHARE * 0.1}" class="d"/>')
    for share in (0, 0.5, 1):
        text(LEFT - 8, y + SHARE * (1 - share) + 4, f"{share:.0%}", 'text-anchor="end"')
    for start, name in marks:
        if start > 0:
            at = f"{x(start):.1f}"
            out.append(f'<line x1="{at}" x2="{at}" y1="{TOP - 34}" y2="{y + SHARE}" stroke="#30363d"/>')
        text(x(start) + 5, TOP - 25, name, 'class="m"')
    step = next(s for s in (10, 30, 60, 100, 300, 600) if end / s <= 12)
    for time_s in np.arange(0, end + 1e-9, step):
        text(x(float(time_s)), y + SHARE + 16, f"{time_s:g}", 'text-anchor="middle"')
    text(LEFT + width / 2, y + SHARE + 34, "time, s", 'text-anchor="middle"')
    tall = y + SHARE + 44
    style = (
        "text{font:12px sans-serif;fill:#30363d}.t{font:bold 14px sans-serif}.m{font-style:italic}"
        ".d{stroke:#30363d;stroke-dasharray:1 4;stroke-width:1.5}"
        "polyline{fill:none;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDE}" height="{tall}" viewBox="0 0 {WIDE} {tall}">'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, f"<style>{style}</style>", '<rect width="100%" height="100%" fill="#fff"/>', *out,
                               "</svg>"]) + "\n")  # fmt: skip


def role_spans(result: SimResult, setup: Setup, end_s: float) -> list[list[tuple[float, float, Role]]]:
    """Per instance, the stretches (start, end, role) until ``end_s``."""
    role = [Role.PREFILL] * setup.cluster.prefill + [Role.DECODE] * setup.cluster.decode
    since = [0.0] * len(role)
    spans: list[list[tuple[float, float, Role]]] = [[] for _ in role]
    flips = result.flips
    for time_s, i, new in zip(flips.time_s.tolist(), flips.instance.tolist(), flips.role.tolist(), strict=True):
        if time_s >= end_s:
            break
        spans[i].append((since[i], time_s, role[i]))
        since[i], role[i] = time_s, Role(new)
    return [[*some, (since[i], end_s, role[i])] for i, some in enumerate(spans)]
