"""Plotly figures of a trace, for the HTML report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.workload.describe import rate_curve
from penstock.workload.trace import I64, Trace

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MAX_POINTS = 5000


def figures(trace: Trace) -> dict[str, go.Figure]:
    """Figures by title: arrival rate over time, length distributions, and output against prompt length.

    Sizes stay bounded however long the trace is: the rate has at most 200 intervals, distributions 200 points, and the
    scatter every k-th request.
    """
    import plotly.graph_objects as go  # 0.3 s: only who draws pays

    out: dict[str, Any] = {}
    if trace.duration_s > 0:
        start_s, rate = rate_curve(trace, 200)
        out["arrival rate"] = go.Figure(
            go.Scatter(x=start_s.tolist(), y=rate.tolist(), mode="lines", line_shape="hv", name="arrivals"),
            {
                "xaxis": {"title": {"text": "time, s"}},
                "yaxis": {"title": {"text": "requests/s"}, "rangemode": "tozero"},
            },
        )
    lines = []
    for name, tokens in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        length, share = _cdf(tokens)
        lines.append(go.Scatter(x=length, y=share, mode="lines", name=name))
    out["lengths"] = go.Figure(
        lines,
        {
            "xaxis": {"title": {"text": "tokens"}, "type": "log"},
            "yaxis": {"title": {"text": "share of requests with at most this many"}, "range": [0, 1]},
        },
    )
    step = -(-len(trace) // _MAX_POINTS)
    out["output against prompt"] = go.Figure(
        go.Scattergl(
            x=trace.prompt_tokens[::step].tolist(),
            y=trace.output_tokens[::step].tolist(),
            mode="markers",
            marker={"size": 3, "opacity": 0.4},
            name="requests",
        ),
        {
            "xaxis": {"title": {"text": "prompt tokens"}, "type": "log"},
            "yaxis": {"title": {"text": "output tokens"}, "type": "log"},
        },
    )
    return out


def _cdf(tokens: I64) -> tuple[list[float], list[float]]:
    share = np.linspace(0, 1, 200)
    return np.quantile(tokens, share).tolist(), share.tolist()
