"""One self-contained page for one or several runs: it needs no network, and follows the reader's light or dark theme.

plotly.js (4.8 MB) is inlined once, gzipped to about 1.9 MB of text; the browser unpacks it (any browser since 2023).
The data of a run add 30 to 300 kB whatever the number of requests.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path

from penstock.core.errors import PenstockError
from penstock.report import figures
from penstock.report.classes import TITLES, class_rows
from penstock.report.columns import COMPARISON, Metrics, best, cells, percent, seconds, write_cell
from penstock.report.metrics import RunMetrics, Slos, summarize
from penstock.report.page import SCRIPT, STYLE
from penstock.report.words import compare, missed_target
from penstock.sim.result import SimResult


def write_html(
    path: str | Path,
    runs: Mapping[str, SimResult],
    slo: Slos,
    metrics: Mapping[str, Metrics] | None = None,
    title: str = "Penstock report",
    conclusion: str | None = None,
) -> None:
    """Write the page.

    Parameters
    ----------
    path : str or Path
        File to write.
    runs : mapping of name to SimResult
        One column of figures each; the distributions are overlaid. At least one.
    slo : Slo or mapping of class name to Slo
        Targets to judge by.
    metrics : mapping of name to RunMetrics or RepeatedMetrics, optional
        Rows of the table on top; computed from ``runs`` if left out. May hold more names than ``runs``.
    title, conclusion : str
        Heading, and the sentence below it (by default written from the figures).

    Raises
    ------
    PenstockError
        If the file cannot be written, or ``slo`` lacks a class.
    ValueError
        If there is no run.
    """
    page = render(runs, slo, metrics, title, conclusion)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as problem:
        raise PenstockError(
            f"cannot write {path} ({problem.strerror or problem})", "give a path you may write"
        ) from None


def render(
    runs: Mapping[str, SimResult],
    slo: Slos,
    metrics: Mapping[str, Metrics] | None = None,
    title: str = "Penstock report",
    conclusion: str | None = None,
) -> str:
    """The page as a string; parameters as for :func:`write_html`."""
    if not runs:
        raise ValueError("no run to report")
    given = dict(metrics or {})
    known = {name: m for name, m in given.items() if isinstance(m, RunMetrics)}
    single = {name: known[name] if name in known else summarize(result, slo) for name, result in runs.items()}
    rows: dict[str, Metrics] = given or dict(single)
    pairs = list(runs.items())
    inside = {name: result for name, result in pairs if len(result.instances.role)}
    sections = [
        _card("Latency", "Share of requests (for ITL: of gaps) within a duration, log scale. Dotted: targets.",
              _figure(figures.latency_cdfs(pairs, slo), "Cumulative distributions of TTFT, TPOT, ITL and E2E")),
        _card("SLO attainment over time", "By time of arrival; rejected and unfinished are misses. Dotted: 90%.",
              _figure(figures.attainment_over_time(pairs, slo), "Share of requests that met the SLO over time")),
    ]  # fmt: skip
    if inside:
        sections += [
            _card("Resident tokens",
                  "KV tokens each instance holds. Thin links: migrations, from source (open) to target.",
                  _columns({n: _figure(figures.resident_tokens(r), f"Resident tokens over time, {n}")
                            for n, r in inside.items()})),
            _card("Instances", "Share of the time spent in steps, and the most KV in use at once.",
                  _columns({n: _figure(figures.utilisation(single[n]), f"Busy share, peak KV, {n}") for n in inside})),
        ]  # fmt: skip
    classes = class_rows(rows)
    if classes:
        sections.insert(0, _card("SLO classes", "Each class by its own targets.", plain_table(TITLES, classes)))
    second = "simulated second" if inside else "second"
    return PAGE.format(
        title=escape(title),
        style=STYLE,
        conclusion=escape(conclusion if conclusion is not None else compare(single)),
        facts=escape(_facts(pairs, slo)),
        table=metrics_table(rows),
        sections="\n".join(sections),
        version=escape(version("penstock")),
        words=f" Goodput here: requests that met every target per {second}.",
        plotly=plotly_js(),
        script=SCRIPT,
    )


def metrics_table(rows: Mapping[str, Metrics]) -> str:
    """Policies by figures as an HTML table; the best of a column is bold and marked for readers of grey paper."""
    values = {name: cells(m) for name, m in rows.items()}
    winners = best(COMPARISON, list(values.values()))
    head = "".join(
        f'<th scope="col"{f" title={chr(34)}{escape(c.note)}{chr(34)}" if c.note else ""}>{escape(c.title)}</th>'
        for c in COMPARISON
    )
    lines = []
    for i, (name, row) in enumerate(values.items()):
        tds = "".join(
            f"<td{' class=best' if i in winners[c] else ''}>{escape(write_cell(column, cell))}</td>"
            for c, (column, cell) in enumerate(zip(COMPARISON, row, strict=True))
        )
        missed = escape(missed_target(rows[name]) or "nothing")
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{tds}<td class=word>{missed}</td></tr>')
    return (
        f'<div class=scroll><table><thead><tr><th scope="col">Policy</th>{head}<th scope="col">Missed most</th></tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as text; the first cell of a row is its name."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def plotly_js() -> str:
    """The bundled plotly.js as base64 of gzip (the same bytes on every call)."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _figure(figure: figures.Figure, label: str) -> str:
    data = figure.to_json().replace("<", "\\u003c")
    height = figure.layout.height
    return (
        f'<div class=plot role=img aria-label="{escape(label)}" style="height:{height}px">'
        f"<script type=application/json>{data}</script></div>"
    )


def _card(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class=note>{escape(note)}</p>{body}</section>"


def _columns(parts: Mapping[str, str]) -> str:
    if len(parts) == 1:
        return next(iter(parts.values()))
    return "<div class=columns>{}</div>".format(
        "".join(f"<div><h3>{escape(n)}</h3>{p}</div>" for n, p in parts.items())
    )


def _facts(pairs: list[tuple[str, SimResult]], slo: Slos) -> str:
    """Trace and targets in a line."""
    trace = pairs[0][1].trace
    rates = dict.fromkeys(f"{result.trace.rate_rps:.3g}" for _, result in pairs)
    facts = [f"{trace.source or 'trace'}: {len(trace):,} requests at {' / '.join(rates)}/s"]
    sizes = [len(result.instances.role) for _, result in pairs]
    facts.append(
        "or ".join(dict.fromkeys(f"{n} instances " if n else "measured at the client " for n in sizes)).strip()
    )
    for name in trace.class_names:
        s = slo[name] if isinstance(slo, Mapping) else slo
        wants = [f"{k} ≤ {seconds(x)}" for k, x in (("TTFT", s.ttft_s), ("TPOT", s.tpot_s)) if x != float("inf")]
        facts.append(f"{name if len(trace.class_names) > 1 else 'SLO'}: {', '.join(wants) or 'no target'}")
        if not isinstance(slo, Mapping):
            break
    finished = {percent(float((r.requests.outcome == 1).mean())) for _, r in pairs}
    facts.append(f"finished: {' / '.join(sorted(finished))}")
    return " · ".join(facts)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="lead">{conclusion}</p>
<p class="note">{facts}</p>
</header>
<section><h2>Figures</h2>{table}</section>
{sections}
<footer>Penstock {version}. TTFT counts queueing, TPOT counts the KV transfer.{words}</footer>
</main>
<noscript><p>The figures need JavaScript; the table above does not.</p></noscript>
<script type="text/plain" id="plotly">{plotly}</script>
<script>{script}</script>
</body>
</html>
"""
