"""The HTML page of ``penstock predictor eval --report``."""

from __future__ import annotations

from html import escape
from importlib.metadata import version

from penstock.predict.learned.evaluate import Evaluation
from penstock.predict.learned.figures import figures
from penstock.report.html import PAGE, plotly_js
from penstock.report.page import SCRIPT, STYLE


def page(e: Evaluation) -> str:
    """One self-contained page on an evaluation."""
    sections = []
    for title, (note, figure) in figures(e).items():
        data = figure.to_json().replace("<", "\\u003c")
        sections.append(
            f"<section><h2>{escape(title)}</h2><p class=note>{escape(note)}</p>"
            f'<div class=plot role=img aria-label="{escape(title)}" style="height:{figure.layout.height}px">'
            f"<script type=application/json>{data}</script></div></section>"
        )
    head = e.scores[0]
    before, _, after = PAGE.partition(" TTFT counts")  # the rest of that footer is about serving
    return (before + after[after.index("</footer>") :]).format(
        title=escape(f"Length prediction: {e.serving_model}"),
        style=STYLE,
        conclusion=escape(
            f"{head.name}: {head.mae.value:,.1f} tokens of mean absolute error over {e.predictions:,} predictions for "
            f"{e.requests:,} held-out requests of {e.mean_tokens:,.0f} tokens on average; {head.first:,.1f} before the "
            "first token."
        ),
        facts=escape(
            f"model {e.model} · trained on {e.train_requests:,} requests · up to {e.max_tokens:,} tokens of output"
        ),
        table=_table(e),
        sections="\n".join(sections),
        version=escape(version("penstock")),
        plotly=plotly_js(),
        script=SCRIPT,
    )


def _table(e: Evaluation) -> str:
    titles = ("Parameters", "MAE, tokens", "95 % interval", "First", "By request", "µs alone", "µs of 32", "Reads")
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Predictor", *titles))
    best = min((s.mae.value for s in e.scores if s.reads != "the truth"), default=None)
    lines = []
    for s in e.scores:
        mark = " class=best" if s.mae.value == best else ""
        lines.append(
            f'<tr><th scope="row">{escape(s.name)}</th><td>{s.parameters:,}</td><td{mark}>{s.mae.value:,.1f}</td>'
            f"<td>{s.mae.low:,.1f} to {s.mae.high:,.1f}</td><td>{s.first:,.1f}</td><td>{s.by_request:,.1f}</td>"
            f"<td>{s.us_1:,.1f}</td><td>{s.us_32:,.2f}</td><td class=word>{escape(s.reads)}</td></tr>"
        )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
