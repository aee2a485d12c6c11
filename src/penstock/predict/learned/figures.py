"""The curves of an evaluation: as plotly figures for the page, and one picture as SVG for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from penstock.predict.learned.evaluate import Evaluation, Scores
from penstock.report.figures import COLOURS, DASHES, Figure

Points = Sequence[tuple[float, float]]

_HEIGHT = 380
_HEAD_WIDTH: Final = 3.5  # pixels: the head's line among its rivals'


def figures(e: Evaluation) -> dict[str, tuple[str, Figure]]:
    """Title to (note, figure)."""
    generated = [float(max(x, 0.5)) for x in e.generated_from]
    remaining = [float(x) for x in e.remaining_from]
    points = [float(x) for x in e.longest_at]
    return {
        "Error by tokens generated": (
            "Mean absolute error in tokens over all predictions of a class; a class begins at its mark. The first is "
            "before the first token.",
            _lines({s.name: _pairs(generated, s.by_generated) for s in e.scores}, "tokens generated so far", "log"),
        ),
        f"The longest {e.longest_requests:,} outputs": (
            f"Those with {e.longest_from:,} tokens and more; the same requests at every point.",
            _lines({s.name: _pairs(points, s.longest) for s in e.scores}, "tokens generated so far", "linear"),
        ),
        "Error by true remaining length": (
            "A class begins at its mark.",
            _lines({s.name: _pairs(remaining, s.by_remaining) for s in e.scores}, "tokens remaining", "log"),
        ),
        "Coverage of the head's quantiles": (
            "Share of true values at or below the quantile; on the dotted line it says what it means.",
            _coverage(e),
        ),
    }


def _pairs(x: Sequence[float], y: Sequence[float | None]) -> Points:
    return [(a, b) for a, b in zip(x, y, strict=True) if b is not None]


def _lines(curves: dict[str, Points], x_title: str, x_type: str) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for k, (name, points) in enumerate(curves.items()):
        figure.add_scatter(
            x=[x for x, _ in points], y=[y for _, y in points], name=name, mode="lines+markers",
            line={"color": COLOURS[k % len(COLOURS)], "dash": DASHES[k // len(COLOURS) % len(DASHES)],
                  "width": _HEAD_WIDTH if k == 0 else 1.5},
            marker={"size": 5 if k == 0 else 3},
            hovertemplate="%{y:,.0f} tokens at %{x:,.0f}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title=x_title, type=x_type)
    figure.update_yaxes(title="mean absolute error, tokens", rangemode="tozero")
    return _plain(figure)


def _coverage(e: Evaluation) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="exact", line={"dash": "dot", "color": "#808890"})
    levels = [c.level for c in e.coverage]
    curves = {"all predictions": [c.share for c in e.coverage], "before the first token": [c.first for c in e.coverage]}
    for k, (name, values) in enumerate(curves.items()):
        figure.add_scatter(x=levels, y=values, name=name, mode="lines+markers", line={"color": COLOURS[k], "width": 2})
    figure.update_xaxes(title="quantile", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(title="coverage", range=[0, 1], tickformat=".0%")
    return _plain(figure)


def _plain(figure: Figure) -> Figure:
    figure.update_layout(
        template="none",
        height=_HEIGHT,
        margin={"l": 62, "r": 12, "t": 8, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "v"},
    )
    figure.update_xaxes(showgrid=True, zeroline=False)
    figure.update_yaxes(showgrid=True, zeroline=False)
    return figure


_WIDE, _TALL, _LEFT, _TOP, _PLOT_W, _PLOT_H = 900, 340, 62, 34, 520, 250


def svg(e: Evaluation) -> str:
    """The error of the longest outputs over their progress, one line a predictor, as a small picture."""
    shown = [(s, _pairs([float(x) for x in e.longest_at], s.longest)) for s in e.scores]
    top = max((y for _, points in shown for _, y in points), default=1.0) * 1.05
    right = float(max(e.longest_at, default=1)) or 1.0
    step = _round_step(top / 5)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {_TALL}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDE}" height="{_TALL}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20">mean absolute error in tokens, outputs of {e.longest_from:,} tokens and more '
        f"({e.longest_requests:,} requests)</text>",
    ]
    for i in range(int(top / step) + 1):
        y = _TOP + _PLOT_H * (1 - i * step / top)
        out.append(f'<path d="M{_LEFT} {y:.1f}h{_PLOT_W}" stroke="#ddd"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{i * step:,.0f}</text>')
    step = _round_step(right / 6)
    for i in range(int(right / step) + 1):
        x = _LEFT + _PLOT_W * i * step / right
        out.append(f'<text x="{x:.0f}" y="{_TOP + _PLOT_H + 18}" text-anchor="middle">{i * step:,.0f}</text>')
    out.append(f'<text x="{_LEFT + _PLOT_W / 2}" y="{_TALL - 14}" text-anchor="middle">tokens generated so far</text>')
    for k, (s, points) in enumerate(shown):
        out += _svg_line(k, s, [(_LEFT + _PLOT_W * x / right, _TOP + _PLOT_H * (1 - y / top)) for x, y in points])
    return "\n".join([*out, "</svg>"]) + "\n"


def _svg_line(k: int, s: Scores, points: Points) -> list[str]:
    dash = "" if k < len(COLOURS) else ' stroke-dasharray="5 3"'
    style = f'fill="none" stroke="{COLOURS[k % len(COLOURS)]}" stroke-width="{3 if k == 0 else 1.5}"{dash}'
    path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    key, y = _LEFT + _PLOT_W + 24, _TOP + 8 + 20 * k
    drawn = [f'<path d="M{path}" {style}/>'] if points else []
    return [*drawn, f'<path d="M{key} {y}h24" {style}/><text x="{key + 32}" y="{y + 4}">{escape(s.name)}</text>']


def _round_step(at_least: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is no less."""
    size = 1.0
    while True:
        for factor in (1, 2, 5):
            if size * factor >= at_least:
                return size * factor
        size *= 10
