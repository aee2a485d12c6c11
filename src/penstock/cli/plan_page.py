"""The HTML page of ``penstock plan --report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.cli.figures_page import write_page
from penstock.plan.closed_form import Answer
from penstock.plan.plots import figures
from penstock.plan.rounding import Option
from penstock.plan.tables import FIGURES, head, range_cells
from penstock.plan.uncertainty import Range
from penstock.plan.verify import Check


def write_plan_page(
    path: str, answer: Answer, chosen: Option, spread: Mapping[str, Range], checks: Sequence[Check] | None
) -> None:
    """Write one self-contained page on a plan. Raises PenstockError where the file cannot be written."""
    rows = [
        (f"{title} ({note})", *range_cells(name, spread[name]))
        for name, (title, note) in FIGURES.items()
        if name in spread
    ]
    write_page(
        path,
        f"Plan: {chosen.prefill}P{chosen.decode}D",
        chosen.text,
        head(answer),
        (("Figure", "predicted", "fit error", "arrival noise", "both"), rows),
        figures(answer, chosen, checks),
    )
