"""What is in a trace: figures, and a drawing for the terminal."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penstock.workload.trace import F64, I64, Trace

if TYPE_CHECKING:
    from rich.console import Console

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_BAR_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class LengthStats:
    """Tokens per request."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: int
    total: int


@dataclass(frozen=True)
class PrefixStats:
    """What an unlimited prefix cache, filled in order of arrival, would save.

    Attributes
    ----------
    blocks, reused_blocks : int
        Prompt blocks, and those in the longest leading run that an earlier request had already brought.
    reused_prompt_share : float
        Prompt tokens of reused blocks over all prompt tokens.
    """

    block_tokens: int
    blocks: int
    reused_blocks: int
    reused_prompt_share: float


@dataclass(frozen=True)
class TraceSummary:
    """Statistics of a trace; plain numbers and strings, so that msgspec or ``dataclasses.asdict`` make JSON of it.

    Attributes
    ----------
    gap_cv : float or None
        Coefficient of variation of the gaps between arrivals (1 for Poisson); None below three requests or where all
        arrive at once.
    peak_rate_rps : float
        Highest rate over one of ``rate_curve``'s intervals.
    prompt_share : float
        Prompt tokens over all tokens.
    length_correlation : float or None
        Spearman's rank correlation of prompt and output length; None where one of them is constant.
    classes : dict
        Requests per SLO class.
    """

    source: str
    requests: int
    duration_s: float
    rate_rps: float
    peak_rate_rps: float
    gap_cv: float | None
    prompt: LengthStats
    output: LengthStats
    prompt_share: float
    length_correlation: float | None
    classes: dict[str, int]
    prefix: PrefixStats | None
    notes: tuple[str, ...]


def describe(trace: Trace) -> TraceSummary:
    """Statistics of a trace (ours)."""
    gaps = np.diff(trace.arrival_s)
    mean_gap = float(gaps.mean()) if len(gaps) else 0.0
    prompt, output = _lengths(trace.prompt_tokens), _lengths(trace.output_tokens)
    per_class = np.bincount(trace.slo_class, minlength=len(trace.class_names)).tolist()
    return TraceSummary(
        source=trace.source,
        requests=len(trace),
        duration_s=trace.duration_s,
        rate_rps=trace.rate_rps,
        peak_rate_rps=float(rate_curve(trace)[1].max()),
        gap_cv=float(gaps.std()) / mean_gap if len(gaps) > 1 and mean_gap > 0 else None,
        prompt=prompt,
        output=output,
        prompt_share=prompt.total / (prompt.total + output.total),
        length_correlation=_rank_correlation(trace.prompt_tokens, trace.output_tokens),
        classes=dict(zip(trace.class_names, per_class, strict=True)),
        prefix=_prefix(trace),
        notes=trace.notes,
    )


def rate_curve(trace: Trace, intervals: int = 60) -> tuple[F64, F64]:
    """Arrival rate over time.

    Returns
    -------
    start_s, rate_rps : float64[intervals]
        Start of each of the equal intervals of the trace, and requests per second in it. A trace of no duration has one
        interval, of rate 0, as a rate is undefined there.
    """
    if trace.duration_s == 0:
        return np.zeros(1), np.zeros(1)
    counts, edges = np.histogram(trace.arrival_s, bins=intervals, range=(trace.arrival_s[0], trace.arrival_s[-1]))
    return edges[:-1], counts / (edges[1] - edges[0])


def length_histogram(tokens: I64, bins: int = 12) -> tuple[F64, I64]:
    """Requests per bin of length; bins of equal width in log length, as lengths span orders of magnitude.

    Returns
    -------
    edges : float64[k + 1]
        Whole numbers; bin i holds lengths ``edges[i] <= tokens < edges[i + 1]``.
    counts : int64[k]
        With ``k <= bins``: short ranges have fewer whole-number edges.
    """
    low, high = int(tokens.min()), int(tokens.max())
    edges = np.unique(np.rint(np.geomspace(low, high + 1, bins + 1)))
    counts, _ = np.histogram(tokens, bins=edges)
    return edges, counts.astype(np.int64)


def render(summary: TraceSummary, trace: Trace, console: Console) -> None:
    """Print the statistics, the arrival rate over time and both length distributions."""
    from rich.markup import escape  # only who draws pays for rich
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(summary):
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(facts)

    table = Table(title="tokens per request", title_justify="left", title_style="bold", pad_edge=False, box=None)
    for heading in ("", "mean", "p50", "p90", "p99", "max", "total"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, stats in (("prompt", summary.prompt), ("output", summary.output)):
        figures = (stats.mean, stats.p50, stats.p90, stats.p99, stats.max, stats.total)
        table.add_row(name, *(f"{value:,.0f}" for value in figures))
    console.print(table)

    if trace.duration_s > 0:
        width = max(10, min(console.width - 2, 100))
        _, rate = rate_curve(trace, width)
        console.print(
            f"\n[bold]arrival rate[/bold], peak {rate.max():.4g} requests/s per {trace.duration_s / width:.3g} s"
        )
        console.print(sparkline(rate), markup=False, highlight=False)
        end = _seconds(trace.duration_s)
        console.print("0 s" + end.rjust(width - len("0 s")), markup=False, highlight=False)
    for name, tokens in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        console.print(f"\n[bold]{name} tokens[/bold], share of requests")
        for line in _bars(tokens, min(console.width, 100)):
            console.print(line, markup=False, highlight=False)
    for note in summary.notes:
        console.print(f"[dim]note: {escape(note)}[/dim]")


def sparkline(values: F64) -> str:
    """One character per value, in eighths of the highest; anything above 0 is visible."""
    top = float(values.max()) if len(values) else 0.0
    if top <= 0:
        return _EIGHTHS[0] * len(values)
    return "".join(_EIGHTHS[int(np.ceil(value / top * 8))] for value in values)


def _facts(summary: TraceSummary) -> list[tuple[str, str]]:
    facts = [
        ("source", summary.source or "(none)"),
        ("requests", f"{summary.requests:,} in {_seconds(summary.duration_s)}"),
        ("arrival rate", f"{summary.rate_rps:.4g} requests/s on average, {summary.peak_rate_rps:.4g} at the peak"),
    ]
    if summary.gap_cv is not None:
        facts.append(("gap cv", f"{summary.gap_cv:.3g} (Poisson: 1)"))
    facts.append(("tokens", f"{summary.prompt_share:.1%} prompt, {1 - summary.prompt_share:.1%} output"))
    if summary.length_correlation is not None:
        facts.append(("correlation", f"{summary.length_correlation:+.2f} of prompt and output length (rank)"))
    if len(summary.classes) > 1:
        facts.append(("classes", ", ".join(f"{name} {count:,}" for name, count in summary.classes.items())))
    if summary.prefix is not None:
        share = summary.prefix.reused_prompt_share
        facts.append(("prefix reuse", f"{share:.1%} of prompt tokens with an unlimited cache"))
    return facts


def _bars(tokens: I64, width: int) -> list[str]:
    edges, counts = length_histogram(tokens)
    labels = [
        f"{int(low):,}" if high - low == 1 else f"{int(low):,}–{int(high) - 1:,}"
        for low, high in itertools.pairwise(edges)
    ]
    margin = max(map(len, labels))
    room = max(8, width - margin - 9)
    lines = []
    for label, count in zip(labels, counts.tolist(), strict=True):
        eighths = round(count / int(counts.max()) * room * 8)
        bar = _BAR_EIGHTHS[8] * (eighths // 8) + (_BAR_EIGHTHS[eighths % 8] if eighths % 8 else "")
        lines.append(f"{label:>{margin}} {count / len(tokens):6.1%} {bar}")
    return lines


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _lengths(tokens: I64) -> LengthStats:
    p50, p90, p99 = np.percentile(tokens, (50, 90, 99)).tolist()
    return LengthStats(float(tokens.mean()), p50, p90, p99, int(tokens.max()), int(tokens.sum()))


def _rank_correlation(a: I64, b: I64) -> float | None:
    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: I64) -> F64:
    """Ranks with ties at their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _prefix(trace: Trace) -> PrefixStats | None:
    hashes = trace.prefixes
    if hashes is None or len(hashes.values) == 0:
        return None
    counts = np.diff(hashes.offsets)
    request = np.repeat(np.arange(len(trace)), counts)
    position = np.arange(len(request)) - np.repeat(hashes.offsets[:-1], counts)
    _, first, inverse = np.unique(hashes.values, return_index=True, return_inverse=True)
    seen = request[first][inverse] < request
    # The run of reused blocks ends at a request's first unseen block: a cache serves leading blocks only.
    run = counts.copy()
    np.minimum.at(run, request[~seen], position[~seen])
    tokens = np.minimum(run * hashes.block_tokens, trace.prompt_tokens)
    return PrefixStats(
        hashes.block_tokens, len(request), int(run.sum()), float(tokens.sum() / trace.prompt_tokens.sum())
    )
