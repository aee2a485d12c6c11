"""Plotly figures of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock.plan.closed_form import Answer
from penstock.plan.rounding import Option
from penstock.plan.verify import Check
from penstock.report.figures import COLOURS, MARK

POINTS = 60


def figures(answer: Answer, chosen: Option, checks: Sequence[Check] | None) -> dict[str, Any]:
    """Figures by title: TTFT over the rate, the decode ladder, capacity by split; simulated points where there are."""
    found = {
        f"TTFT of {chosen.prefill} prefill instances over the rate": _ttft(answer, chosen, checks),
        "Decode throughput of one instance over TPOT": _ladder(answer),
    }
    if checks:
        found["Capacity by split, predicted and simulated"] = _capacity(answer, checks)
    return found


def _ttft(answer: Answer, chosen: Option, checks: Sequence[Check] | None) -> Any:
    import plotly.graph_objects as go

    case = answer.case
    top = chosen.prefill / case.prefill.mean_s
    rates: list[float] = np.linspace(top / POINTS, top, POINTS, endpoint=False).tolist()
    ttft = [case.ttft_at(rate, chosen.prefill) for rate in rates]
    inside = [(r, t) for r, t in zip(rates, ttft, strict=True) if math.isfinite(t) and t < 5 * case.ttft_s]
    figure = go.Figure(
        go.Scatter(x=[r for r, _ in inside], y=[t for _, t in inside], name="predicted", line={"color": COLOURS[0]})
    )
    for check in checks or []:
        if (check.prefill, check.decode) == (chosen.prefill, chosen.decode) and check.ttft_s is not None:
            within = check.ttft_s.half_width
            figure.add_scatter(
                x=[case.rate_rps], y=[check.ttft_s.mean], name="simulated at the demand", mode="markers",
                marker={"color": COLOURS[1], "size": 10},
                error_y=None if within is None else {"type": "data", "array": [within]},
            )  # fmt: skip
    figure.add_hline(y=case.ttft_s, line={"color": MARK, "dash": "dot"})
    figure.add_vline(x=case.rate_rps, line={"color": MARK, "dash": "dot"})
    figure.update_xaxes(title="requests/s (dotted: demand)")
    figure.update_yaxes(title="TTFT, s (dotted: target)", rangemode="tozero")
    return figure


def _ladder(answer: Answer) -> Any:
    import plotly.graph_objects as go

    ladder, fit = answer.case.decode.ladder, answer.case.decode.fit
    tpot = np.array(ladder.tpot_s)
    figure = go.Figure(
        go.Scatter(
            x=tpot.tolist(), y=ladder.throughput.tolist(), name="ladder", mode="markers",
            text=[f"batch {b:g}" for b in ladder.batch], marker={"color": COLOURS[1], "size": 8},
        )
    )  # fmt: skip
    along = np.linspace(tpot[0], tpot[-1], POINTS)
    curve = [ladder.throughput_at(float(x), fit) for x in along]
    figure.add_scatter(x=along.tolist(), y=curve, name=fit, line={"color": COLOURS[0]})
    figure.add_vline(x=answer.decode_point.step_s, line={"color": MARK, "dash": "dot"})
    figure.update_xaxes(title="step, s (dotted: what the target allows)")
    figure.update_yaxes(title="output tokens/s", rangemode="tozero")
    return figure


def _capacity(answer: Answer, checks: Sequence[Check]) -> Any:
    import plotly.graph_objects as go

    names = [f"{check.prefill}P{check.decode}D" for check in checks]
    figure = go.Figure(
        go.Bar(x=names, y=[check.predicted_rps for check in checks], name="predicted", marker={"color": COLOURS[0]})
    )
    spread = [check.simulated_rps.half_width or 0.0 for check in checks]
    figure.add_bar(
        x=names, y=[check.simulated_rps.mean for check in checks], name="simulated", marker={"color": COLOURS[1]},
        error_y={"type": "data", "array": spread},
    )  # fmt: skip
    figure.add_hline(y=answer.case.rate_rps, line={"color": MARK, "dash": "dot"})
    figure.update_yaxes(title="requests/s (dotted: demand)")
    return figure
