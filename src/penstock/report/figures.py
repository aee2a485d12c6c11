"""Plotly figures of one or several runs. They carry no background and no ink of their own: the page's CSS gives both.

Colours hold a contrast of at least 3:1 on white and on the dark page, and neighbours differ in lightness and dash too,
so that they survive colour blindness and grey paper (hues after Okabe and Ito, 2008; shades ours).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.core.types import Role
from penstock.report.metrics import RunMetrics, Slos, Verdicts, role_name
from penstock.report.shrink import block_means, cdf, cdf_of_gaps, evenly, extremes
from penstock.sim.result import SimResult, Timeline
from penstock.workload.trace import F64

Figure = Any
"""A ``plotly.graph_objects.Figure`` (plotly has no types and is imported late)."""

Height = Callable[[NDArray[np.int32], F64], F64]

COLOURS = ("#2f7fd0", "#d9620f", "#009a70", "#c4568f", "#a8801a", "#7d6ad6", "#5b8791", "#d04a4a")
DASHES = ("solid", "dash", "dot", "dashdot")
ROLE_COLOURS = {Role.PREFILL: "#d9620f", Role.DECODE: "#2f7fd0", Role.MIXED: "#009a70"}
MARK = "#808890"
TICKS = [float(f"{step}e{power}") for power in range(-5, 5) for step in (1, 3)]
LINES_AT_MOST = 8
"""Instances drawn as lines; a larger cluster becomes a heat map."""
POINTS_A_LINE, HEAT_TIMES, HEAT_ROWS, MARKS, BINS = 500, 240, 160, 300, 60


def latency_cdfs(runs: Sequence[tuple[str, SimResult]], slo: Slos) -> Figure:
    """CDFs of TTFT, TPOT, ITL and E2E, the runs overlaid, targets as vertical lines. Durations on a log axis."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=4, shared_yaxes=True, horizontal_spacing=0.025)
    titles = ("TTFT, s", "TPOT, s", "ITL, s", "E2E, s")
    marks: list[set[float]] = [set(), set(), set(), set()]
    for k, (name, result) in enumerate(runs):
        v = Verdicts(result, slo)
        curves = (cdf(v.ttft_s), cdf(v.tpot_s), cdf_of_gaps(result.gaps), cdf(v.e2e_s))
        for c, (x, y) in enumerate(curves):
            x = np.maximum(x, 1e-6)
            figure.add_scatter(
                x=_small(x), y=_small(y), name=name, legendgroup=name, showlegend=c == 0,
                mode="lines", row=1, col=c + 1,
                line={"color": COLOURS[k % len(COLOURS)], "dash": DASHES[k % len(DASHES)], "width": 2},
                hovertemplate="%{y:.1%} within %{x:.3~s}s<extra>" + name + "</extra>",
            )  # fmt: skip
        marks[0] |= set(v.ttft_target_s[np.isfinite(v.ttft_target_s)].tolist())
        marks[1] |= set(v.tpot_target_s[np.isfinite(v.tpot_target_s)].tolist())
    for c, title in enumerate(titles):
        figure.update_xaxes(
            type="log", title=title, row=1, col=c + 1, tickangle=0, tickvals=TICKS[:: 2 if c == 3 else 1]
        )
        for target in sorted(marks[c])[:6]:
            figure.add_vline(x=target, line={"color": MARK, "dash": "dot", "width": 1.5}, row=1, col=c + 1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.01])
    figure.update_yaxes(title="share of requests (gaps for ITL)", row=1, col=1)
    return _plain(figure, 340)


def attainment_over_time(runs: Sequence[tuple[str, SimResult]], slo: Slos, goal: float = 0.9) -> Figure:
    """Share of requests that met their SLO, by time of arrival; for a single run TTFT and TPOT apart too."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for k, (name, result) in enumerate(runs):
        v, arrival = Verdicts(result, slo), result.trace.arrival_s
        n = int(np.clip(len(arrival) // 20, 1, BINS))
        edges = np.linspace(0, max(float(arrival[-1]), 1e-9), n + 1)
        where = np.clip(np.searchsorted(edges, arrival, side="right") - 1, 0, n - 1)
        total = np.bincount(where, minlength=n)
        parts = [(name if len(runs) > 1 else "TTFT and TPOT", v.met)]
        if len(runs) == 1:
            parts += [("TTFT", v.ttft_met), ("TPOT", v.tpot_met)]
        for p, (label, met) in enumerate(parts):
            share = np.bincount(where, weights=met, minlength=n) / np.where(total, total, np.nan)
            figure.add_scatter(
                x=_small((edges[1:] + edges[:-1]) / 2), y=_small(share), name=label, mode="lines", customdata=total,
                line={"color": COLOURS[(k + p) % 8], "dash": DASHES[(k + p) % 4], "width": 2.5 if p == 0 else 1.5},
                hovertemplate="%{y:.1%} of %{customdata} requests<extra>" + label + "</extra>",
            )  # fmt: skip
    figure.add_hline(y=goal, line={"color": MARK, "dash": "dot", "width": 1.5})
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], title="requests that met")
    figure.update_xaxes(title="time of arrival, s", rangemode="tozero")
    return _plain(figure, 300)


def resident_tokens(result: SimResult) -> Figure:
    """Resident KV tokens of each instance over time, with migrations (source to target) and flips marked.

    Up to ``LINES_AT_MOST`` instances are lines, more are rows of a heat map. Of very many migrations an even sample is
    drawn, and the legend says how many. A run without a timeline gives an empty figure that says so.
    """
    import plotly.graph_objects as go

    figure, t = go.Figure(), result.timeline
    if t is None or len(t.time_s) < 2:
        figure.add_annotation(text="This run recorded no timeline.", showarrow=False)
        return _plain(figure, 200)
    n = t.resident_tokens.shape[1]
    if n <= LINES_AT_MOST:
        _resident_lines(figure, result, t)
    else:
        _resident_heat(figure, t)
    height = _height_of(t, n <= LINES_AT_MOST)
    _mark_migrations(figure, result, height, MARK if n <= LINES_AT_MOST else "#b8bec8")
    _mark_flips(figure, result, height)
    figure.update_xaxes(title="time, s", range=[0, float(t.time_s[-1])])
    figure.update_yaxes(title="resident tokens" if n <= LINES_AT_MOST else "instance")
    return _plain(figure, 360)


def utilisation(run: RunMetrics) -> Figure:
    """Busy share (bars, by role) and peak KV use (diamonds) of each instance."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = [f"{role_name_short(i.role)}{i.instance}" for i in run.instances]
    for role, colour in ROLE_COLOURS.items():
        rows = [k for k, i in enumerate(run.instances) if i.role == role_name(role)]
        if rows:
            figure.add_bar(
                x=[names[k] for k in rows], y=[round(run.instances[k].busy_share, 4) for k in rows],
                name=f"busy ({role_name(role)})", marker={"color": colour, "line": {"width": 0}},
                hovertemplate="%{x} busy %{y:.1%}<extra></extra>",
            )  # fmt: skip
    peaks = [
        (name, i.peak_kv_share) for name, i in zip(names, run.instances, strict=True) if i.peak_kv_share is not None
    ]
    figure.add_scatter(
        x=[name for name, _ in peaks], y=[round(peak, 4) for _, peak in peaks], name="peak KV use", mode="markers",
        marker={"symbol": "diamond", "size": 9, "color": "#1a1f26", "line": {"width": 1.5, "color": "white"}},
        hovertemplate="%{x} peak KV %{y:.1%}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[0, 1.04], title="share of time, of KV")
    figure.update_xaxes(title="instance (P prefill, D decode, M mixed)", categoryorder="array", categoryarray=names)
    figure.update_layout(barmode="overlay", bargap=0.25)
    return _plain(figure, 300)


def role_name_short(role: str) -> str:
    """P, D or M."""
    return role[0].upper()


def _resident_lines(figure: Figure, result: SimResult, t: Timeline) -> None:
    for i in range(t.resident_tokens.shape[1]):
        values = t.resident_tokens[:, i].astype(np.float64)
        rows = extremes(values, POINTS_A_LINE)
        label = f"{role_name_short(role_name(int(result.instances.role[i])))}{i}"
        figure.add_scatter(
            x=_small(t.time_s[rows]), y=t.resident_tokens[rows, i].astype(np.int32), name=label, mode="lines",
            line={"color": COLOURS[i % 8], "width": 1.6, "dash": DASHES[0 if i < 4 else 1]},
            hovertemplate="%{y:,} tokens at %{x:.1f} s<extra>" + label + "</extra>",
        )  # fmt: skip


def _resident_heat(figure: Figure, t: Timeline) -> None:
    values = block_means(block_means(t.resident_tokens.astype(np.float64), 0, HEAT_TIMES), 1, HEAT_ROWS)
    rows = np.linspace(0, t.resident_tokens.shape[1] - 1, values.shape[1])
    figure.add_heatmap(
        z=values.T.astype(np.int32), x=_small(np.linspace(t.time_s[0], t.time_s[-1], values.shape[0])), y=_small(rows),
        colorscale="Cividis", colorbar={"title": {"text": "tokens"}, "thickness": 10, "outlinewidth": 0},
        hovertemplate="instance %{y:.0f}: %{z:,} tokens at %{x:.1f} s<extra></extra>",
    )  # fmt: skip


def _height_of(t: Timeline, lines: bool) -> Height:
    """Where a mark for (instance, time) goes on the y axis."""

    def height(instance: NDArray[np.int32], time_s: F64) -> F64:
        if not lines:
            return instance.astype(np.float64)
        row = np.searchsorted(t.time_s, time_s).clip(0, len(t.time_s) - 1)
        held: F64 = t.resident_tokens[row, instance].astype(np.float64)
        return held

    return height


def _mark_migrations(figure: Figure, result: SimResult, height: Height, colour: str) -> None:
    m = result.migrations
    rows = evenly(len(m.request), MARKS)
    if not len(rows):
        return
    start, done = m.start_s[rows], m.done_s[rows]
    gap = np.full(len(rows), np.nan)
    x = np.stack([start, done, gap], axis=1).ravel()
    y = np.stack([height(m.source[rows], start), height(m.target[rows], done), gap], axis=1).ravel()
    label = (
        f"migration ({len(m.request):,})"
        if len(rows) == len(m.request)
        else f"migration ({len(rows)} of {len(m.request):,})"
    )
    text = [
        f"request {r}: {s} to {t}"
        for r, s, t in zip(*(c[rows].tolist() for c in (m.request, m.source, m.target)), strict=True)
    ]
    figure.add_scatter(
        x=_small(x), y=_small(y), mode="lines+markers", name=label, line={"color": colour, "width": 0.8},
        marker={"symbol": ["circle-open", "circle", "circle"] * len(rows), "size": 4.5, "color": colour},
        text=[part for line in text for part in (line, line, "")], hovertemplate="%{text}<extra>migration</extra>",
    )  # fmt: skip


def _mark_flips(figure: Figure, result: SimResult, height: Height) -> None:
    f = result.flips
    rows = evenly(len(f.instance), MARKS)
    if not len(rows):
        return
    for row in rows[:40].tolist():
        figure.add_vline(x=float(f.time_s[row]), line={"color": MARK, "dash": "dash", "width": 1})
    figure.add_scatter(
        x=_small(f.time_s[rows]), y=_small(height(f.instance[rows], f.time_s[rows])), mode="markers",
        name=f"flip ({len(f.instance):,})",
        marker={"symbol": "star-triangle-up", "size": 13, "color": COLOURS[7], "line": {"width": 1, "color": "white"}},
        text=[f"instance {f.instance[row]} becomes {role_name(int(f.role[row]))}" for row in rows],
        hovertemplate="%{text} at %{x:.1f} s<extra>flip</extra>",
    )  # fmt: skip


def _small(values: F64) -> Any:
    """Four bytes a number, and bytes rather than digits on the page."""
    return values.astype(np.float32)


def _plain(figure: Figure, height: int) -> Figure:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 58, "r": 12, "t": 8, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hoverlabel={"font": {"size": 12}},
    )
    figure.update_xaxes(showgrid=True, zeroline=False, automargin=True, title_standoff=6)
    figure.update_yaxes(showgrid=True, zeroline=False, automargin=True, title_standoff=6)
    return figure
