"""The SLO classes of several runs side by side: one row a run and class, as text."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.report.columns import number, percent, seconds
from penstock.report.metrics import RunMetrics
from penstock.report.repeat import RepeatedMetrics
from penstock.report.schema import ClassMetrics

TITLES = (
    "Policy", "Class", "Requests", "SLO met", "TTFT met", "TTFT target", "TTFT p99", "TPOT met", "TPOT target",
    "TPOT p99", "Goodput req/s",
)  # fmt: skip
"""Heads of :func:`class_rows`."""


def class_rows(runs: Mapping[str, RunMetrics | RepeatedMetrics]) -> list[list[str]]:
    """Rows under ``TITLES``, by class, so that the runs of a class stand together; none where there is one class only.

    Repeated runs have no figures by class here.
    """
    single = {name: run for name, run in runs.items() if isinstance(run, RunMetrics) and len(run.classes) > 1}
    names = dict.fromkeys(label for run in single.values() for label in run.classes)
    return [
        [policy, label, *_cells(run.classes[label])]
        for label in names
        for policy, run in single.items()
        if label in run.classes
    ]


def _cells(c: ClassMetrics) -> list[str]:
    def share(x: float | None) -> str:
        return "–" if x is None else percent(x)

    def latency(x: float | None, none: str = "–") -> str:
        return none if x is None else seconds(x)

    return [
        number(c.requests),
        share(c.attainment),
        share(c.ttft_attainment),
        latency(c.ttft_target_s, "none"),
        latency(c.ttft_s.p99),
        share(c.tpot_attainment),
        latency(c.tpot_target_s, "none"),
        latency(c.tpot_s.p99),
        number(c.goodput_rps),
    ]
