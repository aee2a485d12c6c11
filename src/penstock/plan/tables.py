"""The planner's tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.table import Table

from penstock.plan.closed_form import Answer
from penstock.plan.queueing import KINDS
from penstock.plan.rounding import Option
from penstock.plan.uncertainty import Range, Sensitivity
from penstock.plan.verify import Check
from penstock.report.columns import amount, number, percent, seconds
from penstock.report.repeat import Interval

QUEUE_WORDS = dict(
    zip(
        KINDS,
        ("M/M/1 each (the paper's)", "M/D/1 each", "M/G/1 each", "one queue for all (M/G/k)"),
        strict=True,
    )
)
FIGURES = {
    "prefill_throughput": ("Prefill tok/s", "one instance, at the TTFT target"),
    "decode_throughput": ("Decode tok/s", "one instance, at the TPOT target"),
    "pd_ratio": ("P : D", "prefill instances a decode instance"),
    "prefill_instances": ("Prefill instances", "fractional"),
    "decode_instances": ("Decode instances", "fractional"),
    "capacity_rps": ("Capacity, req/s", "of the recommended whole numbers"),
    "prefill_load": ("Prefill load", "demand over what prefill takes"),
    "decode_load": ("Decode load", "demand over what decode takes"),
    "ttft_s": ("TTFT", "at the demand"),
    "tpot_s": ("TPOT", "at the demand"),
    "cost_per_hour": ("Cost, $/h", "of the fractional instances"),
}
_WRITE: dict[str, Callable[[float], str]] = {
    "ttft_s": seconds,
    "tpot_s": seconds,
    "prefill_load": percent,
    "decode_load": percent,
}


def head(answer: Answer) -> str:
    """What was asked, in a line or two."""
    case = answer.case
    which = "mean" if case.percentile is None else f"P{case.percentile:g}"
    return (
        f"Demand {number(case.rate_rps)} req/s = {amount(case.rate_rps * case.tokens_a_request * 60)} input + output "
        f"tokens/min, mean lengths {number(round(case.isl))} in, {number(round(case.osl))} out. "
        f"Targets: {which} TTFT {seconds(case.ttft_s)}, {which} TPOT {seconds(case.tpot_s)}"
        + (f", of TTFT {seconds(case.overhead_s)} overhead" if case.overhead_s else "")
        + f". Figures from: {case.machine.source}. Prefill queue: {QUEUE_WORDS[case.queue]}."
    )


def figures_table(found: Mapping[str, Range]) -> Table:
    """Every predicted figure with its ranges."""
    table = _table("Figure", "predicted", "fit error", "arrival noise", "both")
    for name, (title, note) in FIGURES.items():
        if name not in found:
            continue
        table.add_row(f"{title} [dim]({note})[/dim]", *range_cells(name, found[name]))
    table.caption = "Ranges: step times off by their mean error; traffic of windows of the given length, 95 %."
    table.caption_justify = "left"
    return table


def range_cells(name: str, one: Range) -> list[str]:
    """A figure and its three ranges as text."""
    write = _WRITE.get(name, number)
    return [
        write(one.value) if one.value < float("inf") else "unstable",
        _span(one.fit_low, one.fit_high, write),
        _span(one.arrivals_low, one.arrivals_high, write),
        _span(one.low, one.high, write),
    ]


def options_table(found: Sequence[Option], chosen: Option) -> Table:
    """Whole instances under each rounding rule."""
    table = _table("Rounding", "P : D", "GPUs", "$/h", "capacity", "of demand", "P load", "D load", "TTFT", "TPOT")
    for one in found:
        mark = " ←" if one.rule == chosen.rule else ""
        table.add_row(
            one.rule + mark,
            f"{one.prefill} : {one.decode}",
            str(one.gpus),
            "–" if one.cost_per_hour is None else f"{one.cost_per_hour:,.2f}",
            f"{amount(one.capacity_tpm)} tok/min",
            percent(one.share_of_demand),
            percent(one.prefill_load),
            percent(one.decode_load),
            "unstable" if one.ttft_s is None else seconds(one.ttft_s),
            "off the ladder" if one.tpot_s is None else seconds(one.tpot_s),
        )
    return table


def sensitivity_table(found: Sequence[Sensitivity], instances: float) -> Table:
    """Instances when one input changes, the largest swing first."""
    table = _table(
        "Input", "10 % less", "10 % more", title=f"Instances (P + D, {instances:.2f}) when one input changes"
    )
    for one in found:
        table.add_row(one.input, *("no plan" if x is None else f"{x:.2f}" for x in (one.low, one.high)))
    return table


def checks_table(found: Sequence[Check], tokens_a_request: float) -> Table:
    """Predicted against simulated, split by split; the first row is the recommended one."""
    table = _table(
        "P : D", "predicted", "simulated", "ratio", "missed above", "holds", "TTFT", "simulated", "TPOT", "simulated"
    )
    unit = tokens_a_request * 60
    for one in found:
        within = "" if one.simulated_rps.half_width is None else f" ± {amount(one.simulated_rps.half_width * unit)}"
        table.add_row(
            f"{one.prefill} : {one.decode}",
            amount(one.predicted_rps * unit),
            amount(one.simulated_rps.mean * unit) + within,
            "–" if one.ratio is None else f"{one.ratio:.2f}",
            one.missed,
            "yes" if one.holds else "no",
            _latency(one.predicted_ttft_s),
            _interval(one.ttft_s),
            _latency(one.predicted_tpot_s),
            _interval(one.tpot_s),
        )
    table.caption = "Capacities in input + output tokens/min; holds, TTFT and TPOT at the demand. ±: 95 % over seeds."
    table.caption_justify = "left"
    return table


def _latency(x: float | None) -> str:
    return "–" if x is None else seconds(x)


def _interval(x: Interval | None) -> str:
    if x is None:
        return "unfinished"
    return seconds(x.mean) + ("" if x.half_width is None else f" ± {seconds(x.half_width, like=x.mean)}")


def _span(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    if low is None and high is None:
        return "no plan"
    if low is not None and high is not None and high - low <= 1e-6 * abs(high):
        return "–"
    return f"{'no plan' if low is None else write(low)} to {'no plan' if high is None else write(high)}"


def _table(first: str, *rest: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="")
    table.add_column(first)
    for name in rest:
        table.add_column(name, justify="right")
    return table
