"""``penstock rank``: every arrangement of a GPU budget, by goodput."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import CLUSTER, Jobs, JsonFile, Quiet, Repeat, ReportFile, takes_setup_but

if TYPE_CHECKING:
    from collections.abc import Iterator

    from penstock.cli.show import Show
    from penstock.experiment.setup import Setup
    from penstock.rank.commands import Commands
    from penstock.rank.search import Ranking
    from penstock.rank.sensitivity import Swing
    from penstock.rank.spread import Spread

SCHEMA = "penstock.rank/1"
SPACE = "What is tried"


@takes_setup_but(
    "rate", "prefill", "decode", "mixed", "tp", "prefill_tp", "decode_tp", "prefill_hardware", "decode_hardware",
    "chunked_prefill", "weight_dtype", "fault",
)  # fmt: skip
def rank(
    setup: Setup,
    gpus: Annotated[
        str, typer.Option(help="Budget: 8 (of --hardware), or a100-80g=8,h100=4.", rich_help_panel=SPACE)
    ] = "8",
    tps: Annotated[str, typer.Option(help="Tensor parallelism of an instance.", rich_help_panel=SPACE)] = "1,2,4,8",
    chunks: Annotated[
        str, typer.Option(help="Token budgets of mixed instances with chunked prefill.", rich_help_panel=SPACE)
    ] = "512,2048,8192",
    weight_dtypes: Annotated[
        str, typer.Option(help="Number types of the weights; own is the model's.", rich_help_panel=SPACE)
    ] = "own",
    kv_dtypes: Annotated[
        str | None, typer.Option(help="Of the KV cache, as bf16,fp8; --kv-dtype if left out.", rich_help_panel=SPACE)
    ] = None,
    policy: Annotated[str, typer.Option(help="Of disaggregated arrangements.", rich_help_panel=CLUSTER)] = "least-kv",
    set: Annotated[
        list[str] | None, typer.Option(help="Option of that policy, as ares.horizon=4096; repeat it.")
    ] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="US dollars a GPU-hour, as 2.5 or h100=2.5; repeat it.")
    ] = None,
    goal: Annotated[float, typer.Option(help="Share of requests that must meet the SLO.")] = 0.9,
    tolerance: Annotated[float, typer.Option(help="Relative precision of the rate.")] = 0.02,
    top: Annotated[int, typer.Option(help="So many places are never pruned.")] = 5,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Skip what bounds rule out.")] = True,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity/--no-sensitivity", help="Which input moves the winner most.")
    ] = True,
    ray: Annotated[
        str | None, typer.Option(help="Spread over a Ray cluster: auto, HOST:PORT, or local.", metavar="ADDRESS")
    ] = None,
    repeat: Repeat = 1,
    jobs: Jobs = 0,
    json: JsonFile = None,
    report: ReportFile = None,
    quiet: Quiet = False,
) -> None:
    """Rank all arrangements of a GPU budget by goodput per GPU and per dollar; print how to start the best one.

    Mixed instances with and without chunked prefill, prefill and decode instances in all splits, tensor parallelism
    and hardware per role, number types: each is searched as by penstock goodput, unless a bound rules it out.

    penstock rank --gpus 8 --trace azure_code_2023.csv --ttft 2s --tpot 40ms

    penstock rank --gpus a100-80g=8,h100=4 --price h100=2.5 --weight-dtypes own,fp8 --repeat 3
    """
    import penstock
    from penstock.cli.progress import running
    from penstock.cli.show import Show, check_writable
    from penstock.core.errors import PenstockError
    from penstock.experiment.build import with_policy
    from penstock.experiment.floors import check_targets
    from penstock.experiment.parse import names
    from penstock.experiment.repeat import repeats_differ, seeds
    from penstock.experiment.settings import options_of
    from penstock.plan.prices import parse_prices, price_of
    from penstock.policy.registry import preset
    from penstock.rank.commands import commands
    from penstock.rank.report import conclusion, ranking_table, swing_text
    from penstock.rank.search import rank as search
    from penstock.rank.sensitivity import swings
    from penstock.rank.space import Space, parse_gpus, whole_numbers

    show = Show(quiet, json)
    check_writable(report)
    if not preset(policy).disaggregated:
        raise PenstockError(f"policy {policy!r} does not disaggregate", "name one for the disaggregated arrangements")
    base = with_policy(setup, policy, options_of([policy], set or [])[policy])
    check_targets(base)
    space = Space(
        gpus=parse_gpus(gpus, setup.cluster.hardware),
        tps=whole_numbers(tps, "--tps"),
        chunks=whole_numbers(chunks, "--chunks") if chunks.strip() not in ("", "none") else (),
        step_tokens=setup.cluster.max_num_batched_tokens,
        weight_dtypes=tuple(None if name == "own" else name for name in names(weight_dtypes, "number type")),
        kv_dtypes=tuple(names(kv_dtypes or setup.cluster.kv_dtype, "number type")),
    )
    if setup.cluster.profile is not None and tps == "1,2,4,8":
        space = Space(space.gpus, (1,), space.chunks, space.step_tokens, space.weight_dtypes, space.kv_dtypes)
        show.note("--tps 1: a profile describes one kind of instance")
    given = parse_prices(price or [])
    prices = {name: cost for name in space.gpus if (cost := price_of(name, given)) is not None}
    if len(prices) < len(space.gpus):
        lacking = ", ".join(name for name in space.gpus if name not in prices)
        show.note(f"no price of {lacking} is known: cost is counted in GPUs (give --price {lacking}=2.5)")
    if repeat > 1 and not repeats_differ(base):
        show.note("the trace is recorded and nothing is random: all seeds give the same run (add --noise or --cv)")
    with _spread(ray, jobs) as spread:
        with running(show, "arrangements") as done:
            ranking = search(
                base,
                space,
                seeds(base, repeat),
                spread,
                goal=goal,
                tolerance=tolerance,
                top=top,
                prune=prune,
                prices=prices,
                done=done,
            )
        winner = ranking.winner()
        moved: list[Swing] = []
        if sensitivity:
            one = ranking.setup_of(base, winner)
            moved = swings(one, ranking.seeds[0], goal, tolerance, spread, winner.goodput_rps)
    how = commands(base, winner.arrangement, ranking.longest)
    show.print(ranking_table(ranking))
    show.print(conclusion(ranking))
    show.print(*swing_text(moved, winner.name))
    _print_commands(show, how, winner.name)
    if report is not None:
        _write_report(report, ranking, moved, base)
        show.wrote(report)
    document: dict[str, Any] = {"schema": SCHEMA, "penstock": penstock.__version__, "setup": base.plain()}
    document |= {"space": space, "goal": goal, "tolerance": tolerance, "top": top, "seeds": ranking.seeds}
    document |= {"prices_usd_per_gpu_hour": prices, "conclusion": conclusion(ranking)}
    document |= {"candidates": ranking.documents(), "sensitivity": moved, "commands": how}
    show.json(document)


@contextmanager
def _spread(address: str | None, jobs: int) -> Iterator[Spread]:
    from penstock.rank.spread import OverCores, over_ray

    if address is None:
        yield OverCores(jobs)
        return
    with over_ray(address) as spread:
        yield spread


def _print_commands(show: Show, how: Commands, name: str) -> None:
    show.print(f"To run {name}, its vLLM servers:", *(f"  {line}" for line in how.vllm))
    show.print("and the gateway over them:", f"  {how.serve}")
    if how.all_in_one is not None:
        show.print("or all at once on one machine:", f"  {how.all_in_one}")
    for note in how.notes:
        show.note(note)


def _write_report(path: str, ranking: Ranking, moved: list[Swing], base: Setup) -> None:
    from penstock.cli.figures_page import write_page
    from penstock.experiment.traffic import build_trace
    from penstock.rank.report import TITLES, conclusion, front, front_figure, rows, swing_text

    trace = build_trace(base.at_rate(1.0))
    searched = len(ranking.searched())
    slo = base.slo.slo()
    facts = [
        f"{trace.source}: {len(trace):,} requests",
        f"TTFT ≤ {slo.ttft_s:g} s, TPOT ≤ {slo.tpot_s:g} s for {ranking.goal:.0%}",
        f"{len(ranking.candidates)} arrangements, {searched} searched",
        "front: " + ", ".join(c.name for c in front(ranking)),
        *swing_text(moved, ranking.winner().name)[1:],
    ]
    write_page(
        path,
        "Penstock: ranking",
        conclusion(ranking),
        " · ".join(line.strip() for line in facts),
        (TITLES, rows(ranking)),
        {"cost and goodput": front_figure(ranking)},
    )
