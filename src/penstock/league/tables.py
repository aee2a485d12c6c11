"""The league as rows of text: who stands where, and every figure by workload; for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from penstock.league.play import AT, FRACTIONS, League, Row
from penstock.report.columns import number, percent, seconds

BOUND = "clairvoyant bound"
SPLIT_BOUND = "bound of fixed roles"
BLIND = "outputs unknown"
DETAILS = (
    "Policy",
    "Goodput, req/s",
    "of the bound",
    *(f"SLO met at {x:.0%}" for x in FRACTIONS),
    "TTFT p99",
    "TPOT p99",
    "J/token",
    "Migrations",
    "Flips",
)
"""Heads of :func:`details`; the last five figures are those at the rate ``AT`` of the bound."""


def standing_titles(league: League) -> list[str]:
    """Heads of :func:`standing`."""
    return ["Policy", *(f"{g.name} ({g.split})" for g in league.grounds), "mean share", "least"]


def standing(league: League) -> list[list[str]]:
    """Goodput and its share of the bound, policies by their mean share; the bounds come first."""
    bounds = [g.bound for g in league.grounds]
    found = [
        [BOUND, *(number(b.any_rps) for b in bounds), "", ""],
        [SPLIT_BOUND, *(_shared(b.split_rps, b.split_rps / b.any_rps) for b in bounds), "", ""],
        [BLIND, *(_shared(b.blind_rps, b.blind_rps / b.any_rps) for b in bounds), "", ""],
    ]
    by_name = {(row.policy, row.workload): row for row in league.rows}
    for policy, mean, least in league.standing():
        cells = [_goodput(by_name.get((policy, g.name))) for g in league.grounds]
        found.append([policy, *cells, percent(mean), percent(least)])
    return found


def _goodput(row: Row | None) -> str:
    if row is None:
        return "not played"
    return "cannot run" if row.problem else _shared(row.goodput_rps, row.share)


def details(league: League, workload: str) -> list[list[str]]:
    """One row a policy under ``DETAILS``, the highest goodput first; the bound on top."""
    ground = next(g for g in league.grounds if g.name == workload)
    most = [percent(ground.bound_attainment[f"{x:g}"]) for x in FRACTIONS]
    found = [[BOUND, number(ground.bound.any_rps), percent(1.0), *most, *["–"] * 5]]
    return found + [_detail(row) for row in league.of(workload)]


def _detail(row: Row) -> list[str]:
    if row.problem:
        return [row.policy, "cannot run", *["–"] * (len(DETAILS) - 2)]
    return [
        row.policy,
        number(row.goodput_rps),
        percent(row.share),
        *(percent(row.attainment[f"{x:g}"]) for x in FRACTIONS),
        _or_dash(row.ttft_p99_s, seconds),
        _or_dash(row.tpot_p99_s, seconds),
        _or_dash(row.joules_per_token, number),
        _or_dash(row.migrations, number),
        _or_dash(row.flips, number),
    ]


def _or_dash(x: float | None, write: Callable[[float], str]) -> str:
    return "–" if x is None else write(x)


def _shared(rate: float, share: float) -> str:
    return f"{number(rate)} ({share:.0%})" if rate > 0 else "none"


def conclusion(league: League) -> str:
    """Who leads, overall and by workload."""
    first = league.standing()[0]
    wins = [row for g in league.grounds for row in league.of(g.name)[:1]]
    best = ", ".join(f"{row.policy} on {row.workload} ({row.share:.0%})" for row in wins if row.goodput_rps > 0)
    return (
        f"{first[0]} comes closest to the clairvoyant bound: {percent(first[1])} of it in the mean, "
        f"{percent(first[2])} at least. Highest goodput: {best or 'none'}."
    )


def legend(league: League) -> str:
    """What the figures mean, in a few sentences."""
    return (
        f"Goodput: the highest rate at which {league.goal:.0%} of the requests meet their SLO. The bound is what no "
        "policy can pass on the same instances while traffic goes on (a run that ends may, a little: docs/bound.md); "
        "below it, what is left of it for those who do not know how long an output will be. In brackets, shares of the "
        "bound, and under a workload's name the split of the policies that disaggregate. Latencies, energy, moves and "
        f"flips at {AT:.0%} of the bound."
    )


def standing_table(league: League) -> Table:
    """For the terminal; the best of each workload in bold green."""
    rows = standing(league)
    wins = {g.name: {row.policy for row in league.of(g.name)[:1] if row.goodput_rps > 0} for g in league.grounds}
    table = _table(standing_titles(league), legend(league))
    for row in rows:
        style = "dim" if row[0] in (BOUND, SPLIT_BOUND, BLIND) else ""
        cells = [Text(row[0], style=style or "bold")]
        for ground, text in zip(league.grounds, row[1:], strict=False):
            cells.append(Text(text, style="bold green" if row[0] in wins[ground.name] else style))
        table.add_row(*cells, *row[1 + len(league.grounds) :])
    return table


def details_table(league: League, workload: str) -> Table:
    """For the terminal: one workload."""
    table = _table(list(DETAILS), None, title=workload)
    for row in details(league, workload):
        table.add_row(*row)
    return table


def _table(titles: Sequence[str], caption: str | None, title: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=caption, caption_justify="left",
        title=title, title_justify="left",
    )  # fmt: skip
    for i, name in enumerate(titles):
        table.add_column(name.replace(" ", "\n", 1), justify="right" if i else "left", no_wrap=True)
    return table


def markdown(league: League) -> str:
    """Both kinds of tables as Markdown."""
    parts = [conclusion(league), legend(league), _markdown(standing_titles(league), standing(league))]
    for ground in league.grounds:
        parts += [f"### {ground.name}", about(league, ground.name), _markdown(DETAILS, details(league, ground.name))]
    if league.left_out:
        parts.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in league.left_out.items()) + ".")
    return "\n\n".join(parts) + "\n"


def about(league: League, workload: str) -> str:
    """The ground of a workload in a line: requests, targets, split, and what else bounds it."""
    g = next(g for g in league.grounds if g.name == workload)
    w, slo = g.setup.workload, g.setup.slo
    size = f"{w.requests:,} requests" if w.requests is not None else f"{w.duration_s:g} s" if w.duration_s else "all"
    targets = f"TTFT {_target(slo.ttft_s)}, TPOT {_target(slo.tpot_s)}"
    if workload == "multi-class":
        targets = "each class its own targets"
    tried = ", ".join(f"{p}P {number(rate)}" for p, rate in g.split_rps.items())
    share = g.bound.prefill_share * g.bound.instances
    finite = "" if g.bound.finite_rps is None else f"; {number(g.bound.finite_rps)}/s for this finite run"
    return (
        f"{size}, {targets}. Best real-valued split {share:.2f}P{g.bound.instances - share:.2f}D, played {g.split}"
        + (f" (static goodput by prefill instances: {tried})" if len(g.split_rps) > 1 else "")
        + f". Bound {number(g.bound.any_rps)}/s{finite}."
    )


def _target(x: float | None) -> str:
    return "none" if x is None else seconds(x)


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
