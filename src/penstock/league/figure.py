"""The league as one figure of small multiples: a workload each, a bar a policy, as shares of the bound."""

from __future__ import annotations

import math
from typing import Any

from penstock.league.play import League
from penstock.report.figures import COLOURS, MARK

ROW_PX, HEAD_PX = 19, 90
COLUMNS = 3
NARROW = 0.15
"""Bars below this share of the longest have no room for their figure."""


def shares_figure(league: League) -> Any:
    """Share of the bound by policy, best mean on top, each workload's winner in another colour. A plotly Figure.

    Dotted: the bound, and what is left of it where nobody knows outputs.
    """
    from plotly.subplots import make_subplots

    order = [name for name, _, _ in league.standing()][::-1]
    count = len(league.grounds)
    columns = min(COLUMNS, count)
    lines = math.ceil(count / columns)
    figure = make_subplots(
        rows=lines, cols=columns, shared_yaxes=True, horizontal_spacing=0.015, vertical_spacing=0.16 / lines,
        subplot_titles=[f"{g.name}, {g.bound.any_rps:.3g}/s" for g in league.grounds],
    )  # fmt: skip
    top = max((row.share for row in league.rows), default=0.0)
    for k, ground in enumerate(league.grounds):
        rows = {row.policy: row for row in league.of(ground.name)}
        first = league.of(ground.name)[0].policy
        where = {"row": k // columns + 1, "col": k % columns + 1}
        played = [rows[name] for name in order if name in rows]
        figure.add_bar(
            y=[row.policy for row in played], x=[round(row.share, 4) for row in played], orientation="h",
            marker={"color": [COLOURS[2 if row.policy == first else 0] for row in played], "line": {"width": 0}},
            customdata=[f"{row.goodput_rps:.3g}" for row in played],
            text=[f"{row.share:.0%}" for row in played], insidetextanchor="end", showlegend=False,
            textposition=["inside" if row.share > NARROW * top else "outside" for row in played],
            hovertemplate="%{y}: %{customdata} requests/s, %{x:.1%} of the bound<extra></extra>", **where,
        )  # fmt: skip
        for x in {1.0, round(ground.bound.blind_rps / ground.bound.any_rps, 2)}:
            figure.add_vline(x=x, line={"color": MARK, "dash": "dot", "width": 1.5}, **where)
        figure.update_xaxes(tickformat=".0%", range=[0, max(1.05, top * 1.02)], **where)
    figure.update_yaxes(showgrid=False, ticksuffix=" ")
    figure.update_layout(template="none", bargap=0.25, height=lines * (HEAD_PX + ROW_PX * len(order)))
    figure.update_layout(margin={"l": 8 * max(len(name) for name in order) + 10, "t": 40})
    figure.update_layout(uniformtext={"minsize": 9, "mode": "show"})
    return figure
