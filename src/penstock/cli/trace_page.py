"""The HTML page of ``penstock trace describe --report``."""

from __future__ import annotations

from html import escape
from importlib.metadata import version
from pathlib import Path

from penstock.cli.show import writing
from penstock.report.html import PAGE, plotly_js
from penstock.report.page import SCRIPT, STYLE
from penstock.workload.describe import TraceSummary
from penstock.workload.plots import figures
from penstock.workload.trace import Trace


def write_trace_page(path: str, trace: Trace, summary: TraceSummary) -> None:
    """Write one self-contained page on a trace. Raises PenstockError where the file cannot be written."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("mean", "p50", "p90", "p99", "max", "total"))
    lines = []
    for name, s in (("prompt", summary.prompt), ("output", summary.output)):
        cells = "".join(f"<td>{value:,.0f}</td>" for value in (s.mean, s.p50, s.p90, s.p99, s.max, s.total))
        lines.append(f'<tr><th scope="row">{name} tokens</th>{cells}</tr>')
    table = (
        f'<div class=scroll><table><thead><tr><th scope="col">Per request</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    sections = []
    for title, figure in figures(trace).items():
        figure.update_layout(
            height=340,
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            margin={"l": 60, "r": 20, "t": 20, "b": 50},
        )
        data = figure.to_json().replace("<", "\\u003c")
        sections.append(
            f'<section><h2>{escape(title.capitalize())}</h2><div class=plot role=img aria-label="{escape(title)}" '
            f'style="height:340px"><script type=application/json>{data}</script></div></section>'
        )
    burst = "" if summary.gap_cv is None else f", gaps with a coefficient of variation of {summary.gap_cv:.2g}"
    page = PAGE.format(
        title=escape(f"Trace {Path(trace.source).name}"),
        style=STYLE,
        conclusion=escape(
            f"{summary.requests:,} requests in {summary.duration_s:,.0f} s: {summary.rate_rps:.3g} requests/s on "
            f"average, {summary.peak_rate_rps:.3g} at the peak{burst}; "
            f"{summary.prompt_share:.0%} of the tokens are prompt."
        ),
        facts=escape(" · ".join(summary.notes) or trace.source),
        table=table,
        sections="\n".join(sections),
        version=escape(version("penstock")),
        plotly=plotly_js(),
        script=SCRIPT,
    )
    with writing(path):
        Path(path).write_text(page, encoding="utf-8")
