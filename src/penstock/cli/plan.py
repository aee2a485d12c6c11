"""``penstock plan``: how many prefill and decode instances, in closed form, and checked by simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import OUTPUT, SLO, WORKLOAD, Jobs, JsonFile, Quiet, ReportFile, takes_setup_but

if TYPE_CHECKING:
    from penstock.cli.show import Show
    from penstock.experiment.setup import Setup
    from penstock.plan.closed_form import Answer
    from penstock.plan.question import Posed
    from penstock.plan.rounding import Option
    from penstock.plan.verify import Check

SCHEMA = "penstock.plan/1"
BENCHMARK = "Benchmark figures, instead of a step model"
COST = "Cost"


@takes_setup_but(
    "rate", "synthetic", "cv", "classes", "prefill", "decode", "mixed", "handshake", "migration_level", "slo", "fault",
    "predictor", "until", "belief_profile", "belief_error",
)  # fmt: skip
def plan(
    setup: Setup,
    rps: Annotated[float | None, typer.Option(help="Demand, requests/s.", rich_help_panel=WORKLOAD)] = None,
    tpm: Annotated[
        float | None, typer.Option(help="Demand, input + output tokens a minute.", rich_help_panel=WORKLOAD)
    ] = None,
    isl: Annotated[float | None, typer.Option(help="Mean input tokens.", rich_help_panel=WORKLOAD)] = None,
    osl: Annotated[float | None, typer.Option(help="Mean output tokens.", rich_help_panel=WORKLOAD)] = None,
    synthetic: Annotated[
        str | None, typer.Option(help="Lengths of a profile: azure-conv, reasoning, ...", rich_help_panel=WORKLOAD)
    ] = None,
    cv: Annotated[
        float, typer.Option(help="Burstiness of arrivals: 0 regular, 1 Poisson.", rich_help_panel=WORKLOAD)
    ] = 1.0,
    own_arrivals: Annotated[
        bool, typer.Option("--own-arrivals", help="Keep a trace's arrivals.", rich_help_panel=WORKLOAD)
    ] = False,
    percentile: Annotated[
        float | None,
        typer.Option(help="Targets hold for this percentile, as 90; the mean if left out.", rich_help_panel=SLO),
    ] = None,
    overhead: Annotated[
        str, typer.Option(help="Part of TTFT besides queue and prefill.", metavar="TIME", rich_help_panel=SLO)
    ] = "0s",
    queue: Annotated[
        str, typer.Option(help="Prefill queue: mm1, md1, mg1, pooled; auto: mm1 for a benchmark, else pooled.")
    ] = "auto",
    prefill_throughput: Annotated[
        float | None, typer.Option(help="Prompt tokens/s of one saturated prefill instance.", rich_help_panel=BENCHMARK)
    ] = None,
    decode_ladder: Annotated[
        str | None, typer.Option(help="CSV with the columns batch,tpot_s.", metavar="FILE", rich_help_panel=BENCHMARK)
    ] = None,
    ladder_fit: Annotated[
        str, typer.Option(help="quadratic (throughput over TPOT), linear (batch), auto.", rich_help_panel=BENCHMARK)
    ] = "auto",
    gpus_per_instance: Annotated[int, typer.Option(help="Of the benchmark.", rich_help_panel=BENCHMARK)] = 1,
    price: Annotated[
        list[str] | None, typer.Option(help="US dollars a GPU-hour, as 2.5 or h100=2.5.", rich_help_panel=COST)
    ] = None,
    shortfall: Annotated[
        float, typer.Option(help="Share of the demand that may be missed, to save an instance.", rich_help_panel=COST)
    ] = 0.0,
    fit_error: Annotated[
        float | None, typer.Option(help="Relative error of step times, as 0.1; known for profiles.")
    ] = None,
    window: Annotated[str, typer.Option(help="Arrival noise is that of windows this long.", metavar="TIME")] = "10min",
    verify: Annotated[
        bool, typer.Option("--verify", help="Simulate the answer and its neighbours.", rich_help_panel=OUTPUT)
    ] = False,
    policy: Annotated[
        str, typer.Option(help="Policy of --verify, with a step model.", rich_help_panel=OUTPUT)
    ] = "least-kv",
    repeat: Annotated[int, typer.Option(help="Seeds of --verify.", rich_help_panel=OUTPUT)] = 3,
    jobs: Jobs = 0,
    json: JsonFile = None,
    report: ReportFile = None,
    quiet: Quiet = False,
) -> None:
    """Plan how many prefill and decode instances a demand needs.

    Answers in closed form (arXiv 2603.04716), with the binding constraint, cost, and how sure it is.

    penstock plan --tpm 5e6 --isl 6144 --osl 512 --ttft 2 --tpot 20ms --overhead 100ms --prefill-throughput 28300 \
--decode-ladder ladder.csv --gpus-per-instance 8 --shortfall 0.03 --verify

    penstock plan --rps 40 --trace azure_conv_2023.csv --model llama-3.1-8b --hardware h100 --percentile 90 --verify
    """
    from penstock.cli.show import Show, check_writable
    from penstock.experiment.build import with_policy
    from penstock.experiment.parse import duration
    from penstock.experiment.setup import replace
    from penstock.plan.closed_form import solve
    from penstock.plan.question import Question, pose
    from penstock.plan.rounding import choose, options
    from penstock.plan.tables import figures_table, head, options_table, sensitivity_table
    from penstock.plan.uncertainty import ranges, sensitivity

    show = Show(quiet, json)
    check_writable(report)
    question = Question(
        rps=rps,
        tpm=tpm,
        isl=isl,
        osl=osl,
        percentile=percentile,
        overhead_s=duration(overhead, "--overhead"),
        queue=queue,
        cv=None if own_arrivals else cv,
        prefill_throughput=prefill_throughput,
        decode_ladder=decode_ladder,
        ladder_fit=ladder_fit,
        gpus_per_instance=gpus_per_instance,
        fit_error=fit_error,
        prices=tuple(price or ()),
    )
    setup = replace(setup, workload=replace(setup.workload, synthetic=synthetic or ""))
    posed = pose(question, with_policy(setup, policy))
    answer = solve(posed.case)
    rounded = options(answer, posed.bill)
    chosen = choose(rounded, shortfall)
    window_s = duration(window, "--window")
    spread = ranges(answer, chosen.prefill, chosen.decode, posed.bill.cost, setup.seed, window_s=window_s)
    moves = sensitivity(answer)
    notes = [*posed.notes, *_notes(answer, posed, chosen)]
    for note in notes:
        show.note(note)
    show.print(head(answer), figures_table(spread), options_table(rounded, chosen))
    show.print(f"{chosen.prefill}P{chosen.decode}D ({chosen.rule}): {chosen.text}")
    show.print(sensitivity_table(moves, answer.prefill_instances + answer.decode_instances))
    show.print(f"The {moves[0].input} moves the answer most.")
    checks = _verify(show, posed, answer, chosen, setup.seed, repeat, jobs) if verify else None
    if report is not None:
        from penstock.cli.plan_page import write_plan_page

        write_plan_page(report, answer, chosen, spread, checks)
        show.wrote(report)
    show.json(_document(question, setup, posed, answer, rounded, chosen, spread, moves, checks, notes))


def _notes(answer: Answer, posed: Posed, chosen: Option) -> list[str]:
    from penstock.report.columns import number, percent

    case, found = answer.case, []
    ladder, fit = case.decode.ladder, case.decode.fit
    if posed.setup is None and fit == "quadratic":
        step = case.decode.handoff.step_for(case.tpot_s, case.percentile)
        other = ladder.throughput_at(step, "linear")
        found.append(
            f"decode throughput {number(answer.decode_throughput)} tok/s is the quadratic fit; linear interpolation "
            f"gives {number(other)}"
        )
    if chosen.share_of_demand < 1 - 1e-9:
        found.append(f"{chosen.prefill}P{chosen.decode}D falls {percent(1 - chosen.share_of_demand)} short of demand")
    if chosen.cost_per_hour is None:
        found.append("no price is known: give --price, in US dollars a GPU-hour")
    return found


def _verify(show: Show, posed: Posed, answer: Answer, chosen: Option, seed: int, repeat: int, jobs: int) -> list[Check]:
    from penstock.core.errors import PenstockError
    from penstock.plan.question import LENGTHS_DRAWN
    from penstock.plan.tables import checks_table
    from penstock.plan.verify import requests_for, splits, verify

    if repeat < 1:
        raise PenstockError(f"{repeat} repetitions", "give --repeat of 1 or more")
    near = splits(chosen.prefill, chosen.decode)
    requests = requests_for(posed.case, chosen.capacity_rps, LENGTHS_DRAWN)
    with show.bar("simulating splits", len(near) * repeat) as progress:
        seeds = [seed + i for i in range(repeat)]
        checks = verify(posed.case, answer, near, posed.setup, seeds, requests, jobs, progress)
    show.print(checks_table(checks, posed.case.tokens_a_request))
    show.print(_verdict(checks[0]))
    return checks


def _verdict(check: Check) -> str:
    from penstock.report.columns import number

    split = f"{check.prefill}P{check.decode}D"
    if check.ratio is None:
        return f"Simulated, {split} holds the targets at no rate tried."
    return (
        f"Simulated, {split} {'holds' if check.holds else 'does not hold'} both targets at the demand, and sustains "
        f"{number(check.simulated_rps.mean)} req/s; predicted {number(check.predicted_rps)} ({check.ratio - 1:+.1%})."
    )


def _document(
    question: Any,
    setup: Setup,
    posed: Posed,
    answer: Answer,
    rounded: list[Option],
    chosen: Option,
    spread: Any,
    moves: Any,
    checks: list[Check] | None,
    notes: list[str],
) -> dict[str, Any]:
    import math

    import penstock
    from penstock.plan.uncertainty import plain

    case, point = answer.case, answer.decode_point
    swings = [
        {"input": one.input, "low": one.low, "high": one.high, "swing": one.swing if math.isfinite(one.swing) else None}
        for one in moves
    ]
    return {
        "schema": SCHEMA,
        "penstock": penstock.__version__,
        "demand_rps": case.rate_rps,
        "demand_tpm": case.rate_rps * case.tokens_a_request * 60,
        "isl": case.isl,
        "osl": case.osl,
        "prefill_throughput": answer.prefill_throughput,
        "decode_throughput": answer.decode_throughput,
        "decode_batch": point.batch,
        "decode_step_s": point.step_s,
        "decode_bound": point.bound,
        "pd_ratio": answer.pd_ratio,
        "prefill_instances": answer.prefill_instances,
        "decode_instances": answer.decode_instances,
        "options": rounded,
        "recommended": chosen,
        "ranges": plain(spread),
        "sensitivity": swings,
        "verify": checks,
        "queue": case.queue,
        "source": case.machine.source,
        "notes": notes,
        "question": question,
        "setup": None if posed.setup is None else posed.setup.plain(),
    }
