"""The HTML page of ``penstock trace describe --report``."""

from __future__ import annotations

from pathlib import Path

from penstock.cli.figures_page import write_page
from penstock.workload.describe import TraceSummary
from penstock.workload.plots import figures
from penstock.workload.trace import Trace


def write_trace_page(path: str, trace: Trace, summary: TraceSummary) -> None:
    """Write one self-contained page on a trace. Raises PenstockError where the file cannot be written."""
    rows = [
        (f"{name} tokens", *(f"{value:,.0f}" for value in (s.mean, s.p50, s.p90, s.p99, s.max, s.total)))
        for name, s in (("prompt", summary.prompt), ("output", summary.output))
    ]
    burst = "" if summary.gap_cv is None else f", gaps with a coefficient of variation of {summary.gap_cv:.2g}"
    write_page(
        path,
        f"Trace {Path(trace.source).name}",
        f"{summary.requests:,} requests in {summary.duration_s:,.0f} s: {summary.rate_rps:.3g} requests/s on "
        f"average, {summary.peak_rate_rps:.3g} at the peak{burst}; "
        f"{summary.prompt_share:.0%} of the tokens are prompt.",
        " · ".join(summary.notes) or trace.source,
        (("Per request", "mean", "p50", "p90", "p99", "max", "total"), rows),
        figures(trace),
    )
