"""The ranking as a table, in words, and as a figure of cost against goodput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from penstock.rank.search import SEARCHED, Candidate, Ranking
from penstock.rank.sensitivity import Swing
from penstock.report.columns import number, percent
from penstock.report.figures import COLOURS

TITLES = ("Arrangement", "GPUs", "$/h", "Goodput, req/s", "per GPU", "req per $", "at most", "What binds, or why not")


def rows(ranking: Ranking) -> list[list[str]]:
    """One row a candidate under ``TITLES``, in order."""
    return [_row(c) for c in ranking.candidates]


def _row(c: Candidate) -> list[str]:
    rate = "–"
    if c.status == SEARCHED and c.goodput_rps is not None:
        half = c.goodput_rps.half_width
        rate = number(c.rate_rps) + ("" if half is None else f" ± {number(half)}")
    searched = c.status == SEARCHED
    return [
        c.name,
        str(c.gpus),
        "–" if c.usd_per_hour is None else f"{c.usd_per_hour:.2f}",
        rate,
        number(c.per_gpu) if searched else "–",
        "–" if c.per_usd is None or not searched else number(round(c.per_usd)),
        "–" if c.bound_rps is None else number(c.bound_rps),
        c.binding if searched else f"{c.status}: {c.reason}",
    ]


def ranking_table(ranking: Ranking) -> Table:
    """All candidates; those on the front of cost and goodput in bold with a star, the best of a column in green."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=f"Goodput: the highest rate with {ranking.goal:.0%} of requests within the SLO. By goodput per GPU; "
        "* is on the front of cost and goodput. At most: what no simulation can exceed.",
        caption_justify="left",
    )
    for i, name in enumerate(TITLES):
        table.add_column(name, justify="left" if i in (0, len(TITLES) - 1) else "right", no_wrap=i == 0)
    searched = ranking.searched()
    best = [
        max((c.rate_rps for c in searched), default=0.0),
        max((c.per_gpu for c in searched), default=0.0),
        max((c.per_usd or 0.0 for c in searched), default=0.0),
    ]
    for c, row in zip(ranking.candidates, rows(ranking), strict=True):
        style = "bold" if c.on_front else "" if c.status == SEARCHED else "dim"
        cells = [Text(("* " if c.on_front else "  ") + row[0], style=style), *(Text(x, style=style) for x in row[1:])]
        if c.status == SEARCHED:
            for at, (value, top) in enumerate(zip((c.rate_rps, c.per_gpu, c.per_usd or 0.0), best, strict=True)):
                if value == top > 0:
                    cells[3 + at].style = "bold green"
        table.add_row(*cells)
    return table


def conclusion(ranking: Ranking) -> str:
    """Who wins, against whom, and why the other loses."""
    first = ranking.winner()
    text = f"{first.name} has the highest goodput per GPU: {_each(first)}."
    dear = ranking.best_per_usd()
    if dear is not None and dear is not first:
        text += f" Per dollar it is {dear.name}: {number(round(dear.per_usd or 0))} requests/$."
    other = ranking.most(not first.arrangement.disaggregated)
    kind = "Disaggregation" if first.arrangement.disaggregated else "Mixed"
    rest = "mixed" if first.arrangement.disaggregated else "disaggregated"
    if other is None:
        return f"{text} {kind} wins: no {rest} arrangement sustains any rate."
    text += f" {kind} wins by {percent(first.per_gpu / other.per_gpu - 1)} per GPU over the best {rest} arrangement, "
    return text + f"{other.name} ({_each(other)}). Just above that rate: {other.reason}"


def _each(c: Candidate) -> str:
    return f"{number(c.rate_rps)} requests/s on {c.gpus} GPUs, {number(c.per_gpu)} each"


def front(ranking: Ranking) -> list[Candidate]:
    """The arrangements on the front, cheapest first."""
    return sorted((c for c in ranking.candidates if c.on_front), key=lambda c: (c.cost(), c.rate_rps))


def swing_text(swings: Sequence[Swing], name: str) -> list[str]:
    """One line an input, the one that moves the answer most first."""
    if not swings:
        return []
    lines = [f"What moves the goodput of {name} most:"]
    for s in swings:
        lines.append(
            f"  {s.input} ± {percent(s.error)}: {number(min(s.worse_rps, s.better_rps))} to "
            f"{number(max(s.worse_rps, s.better_rps))} requests/s"
        )
    return lines


def front_figure(ranking: Ranking) -> Any:
    """Cost against goodput: mixed and disaggregated apart, the front as a line. A plotly Figure."""
    import plotly.graph_objects as go

    figure = go.Figure()
    unit = "US dollars an hour" if ranking.priced else "GPUs"
    for k, (kind, disaggregated) in enumerate((("disaggregated", True), ("mixed", False))):
        some = [c for c in ranking.searched() if c.arrangement.disaggregated is disaggregated]
        half = [0.0 if c.goodput_rps is None else c.goodput_rps.half_width or 0.0 for c in some]
        figure.add_scatter(
            x=[c.cost() for c in some], y=[c.rate_rps for c in some], mode="markers", name=kind,
            error_y={"type": "data", "array": half, "visible": any(half)},
            text=[c.name for c in some], hovertemplate="%{text}<br>%{y:.3g} requests/s for %{x:.4g}<extra></extra>",
            marker={"color": COLOURS[k], "symbol": "circle" if k == 0 else "diamond", "size": 8, "opacity": 0.75},
        )  # fmt: skip
    line = front(ranking)
    figure.add_scatter(
        x=[c.cost() for c in line], y=[c.rate_rps for c in line], mode="lines", name="front",
        line={"shape": "hv", "color": COLOURS[2], "width": 2}, hoverinfo="skip",
    )  # fmt: skip
    figure.update_xaxes(title=unit, rangemode="tozero")
    figure.update_yaxes(title="goodput, requests/s", rangemode="tozero")
    figure.update_layout(template="none", legend={"orientation": "h", "y": 1.12})
    return figure
