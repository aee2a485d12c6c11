"""A self-contained HTML page of one table and several figures, in the style of the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from penstock.cli.show import writing
from penstock.report.html import PAGE, plain_table, plotly_js
from penstock.report.page import SCRIPT, STYLE

HEIGHT = 340


def write_page(
    path: str,
    title: str,
    conclusion: str,
    facts: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    figures: Mapping[str, Any],
) -> None:
    """Write the page.

    Parameters
    ----------
    table : (titles, rows)
        Cells as text; the first cell of a row is its name.
    figures : mapping of title to plotly Figure
        Of a height of ``HEIGHT``, unless the figure has its own.

    Raises
    ------
    PenstockError
        The file cannot be written.
    """
    sections = []
    for name, figure in figures.items():
        height, margin = figure.layout.height or HEIGHT, figure.layout.margin
        figure.update_layout(
            height=height,
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            margin={"l": margin.l or 60, "r": 20, "t": margin.t or 20, "b": 50},
        )
        data = figure.to_json().replace("<", "\\u003c")
        sections.append(
            f"<section><h2>{escape(name[:1].upper() + name[1:])}</h2><div class=plot role=img "
            f'aria-label="{escape(name)}" style="height:{height}px"><script type=application/json>{data}</script>'
            "</div></section>"
        )
    page = PAGE.format(
        title=escape(title),
        style=STYLE,
        conclusion=escape(conclusion),
        facts=escape(facts),
        table=plain_table(*table),
        sections="\n".join(sections),
        version=escape(version("penstock")),
        words="",
        plotly=plotly_js(),
        script=SCRIPT,
    )
    with writing(path):
        Path(path).write_text(page, encoding="utf-8")
