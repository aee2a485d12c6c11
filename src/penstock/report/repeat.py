"""The same run over several seeds: means with 95 % confidence intervals, for ``--repeat N``."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from penstock.report.metrics import RunMetrics

CONFIDENCE = 0.95


class Interval(msgspec.Struct, frozen=True):
    """A mean over seeds and its 95 % confidence interval ``mean ± half_width`` (Student t, ``n - 1`` degrees).

    ``n`` counts the runs that have the figure; ``half_width`` is None with fewer than two. ``min`` and ``max`` are
    the extremes seen. Units: of the figure.
    """

    n: int
    mean: float
    half_width: float | None
    min: float
    max: float


class RepeatedMetrics(msgspec.Struct, frozen=True):
    """What ``repeats`` runs of one policy achieved.

    ``figures`` has the numbers of :class:`RunMetrics` under dotted names (``attainment``, ``ttft_s.p99``,
    ``classes.chat.attainment``, ``reject_reasons.queue_full``), without the per-instance ones. A count by reason that
    a run lacks is 0 there; any other figure that a run lacks (no sample) leaves the run out.
    """

    policy: str
    trace: str
    repeats: int
    figures: dict[str, Interval]


def combine(runs: list[RunMetrics]) -> RepeatedMetrics:
    """Combine runs of one policy that differ in their seed.

    Raises
    ------
    ValueError
        If there is no run, or the runs are of different policies.
    """
    if not runs:
        raise ValueError("no runs to combine")
    if len({run.policy for run in runs}) > 1:
        raise ValueError(f"runs of different policies: {sorted({run.policy for run in runs})}")
    flat = [flatten(run) for run in runs]
    names = dict.fromkeys(name for figures in flat for name in figures)
    return RepeatedMetrics(
        policy=runs[0].policy,
        trace=runs[0].trace,
        repeats=len(runs),
        figures={name: interval(_column(name, flat)) for name in names},
    )


def flatten(run: RunMetrics) -> dict[str, float]:
    """Every number of a run under its dotted name, per-instance figures and missing ones left out."""
    figures: dict[str, float] = {}
    _walk("", {key: value for key, value in msgspec.to_builtins(run).items() if key != "instances"}, figures)
    return figures


def interval(values: list[float]) -> Interval:
    """Mean and 95 % confidence interval of at least one value."""
    n = len(values)
    mean = math.fsum(values) / n
    half_width = None
    if n > 1:
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
        half_width = _student_t(n - 1) * deviation / math.sqrt(n)
    return Interval(n, mean, half_width, min(values), max(values))


def _column(name: str, flat: list[dict[str, float]]) -> list[float]:
    if name.startswith(("reject_reasons.", "failed_migrations.")):
        return [figures.get(name, 0.0) for figures in flat]
    return [figures[name] for figures in flat if name in figures]


def _student_t(degrees: int) -> float:
    # Imported here: importing scipy costs most of a short run's time.
    from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def _walk(prefix: str, value: Any, figures: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _walk(f"{prefix}.{key}" if prefix else str(key), inner, figures)
    elif isinstance(value, (int, float)):
        figures[prefix] = float(value)
