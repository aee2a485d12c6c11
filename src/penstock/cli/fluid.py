"""``penstock fluid``: what one engine's KV cache can hold at which rates, and WAIT's thresholds."""

from __future__ import annotations

from math import inf, isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import JsonFile, Quiet, takes_setup_but

if TYPE_CHECKING:
    from penstock.cli.show import Show
    from penstock.experiment.setup import Setup
    from penstock.plan.fluid import Flow, StepCost

SCHEMA = "penstock.fluid/1"
COST = "Cost of a step, instead of a model's"
NESTED = "Unknown output lengths"


@takes_setup_but(
    "trace", "format", "synthetic", "requests", "rate", "start", "duration", "cv", "classes", "seed", "ttft", "tpot",
    "slo", "noise", "fault", "predictor", "until", "belief_profile", "belief_error", "prefill_hardware",
    "decode_hardware", "prefill_tp", "decode_tp", "prefill", "decode", "mixed", "link", "link_bandwidth",
    "link_latency", "handshake", "migration_level", "async_scheduling", "prefix_caching", "chunked_prefill",
)  # fmt: skip
def fluid(
    setup: Setup,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type", help="Requests as PROMPT:OUTPUT@RATE; OUTPUT counts the tokens after the first. Repeat it."
        ),
    ] = None,
    capacity: Annotated[float | None, typer.Option(help="KV tokens of the engine; a model's own if left out.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Check these, one a type, as 26,26; the smallest that keep up if left out.")
    ] = None,
    cap: Annotated[
        float | None, typer.Option(help="Thresholds that share this many running requests (the practical rules).")
    ] = None,
    margin: Annotated[float, typer.Option(help="How much longer batches gather than they run, at least.")] = 0.03,
    rates: Annotated[str | None, typer.Option(help="Total rates at which M* is wanted, as 50,60,70.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Of an empty step (d0).", metavar="TIME", rich_help_panel=COST)
    ] = None,
    per_token: Annotated[
        str | None, typer.Option(help="Of a KV token in the batch (d1).", metavar="TIME", rich_help_panel=COST)
    ] = None,
    nested: Annotated[
        bool, typer.Option("--nested", help="Nested WAIT: one prompt length.", rich_help_panel=NESTED)
    ] = False,
    eta: Annotated[float, typer.Option(help="Slack of a segment's threshold.", rich_help_panel=NESTED)] = 0.05,
    delta: Annotated[
        float, typer.Option(help="Probability that the memory bound fails.", rich_help_panel=NESTED)
    ] = 0.05,
    horizon: Annotated[
        str, typer.Option(help="Time that the bound holds for.", metavar="TIME", rich_help_panel=NESTED)
    ] = "100s",
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Fluid limits of one engine, and the thresholds of WAIT and Nested WAIT (arXiv 2504.11320).

    Memory, step time and batch at which arrivals and completions balance; nothing is simulated.

    penstock fluid --type 10:10@1000 --type 10:20@1000 --base 10ms --per-token 1us --capacity 16000 --rates 500,2000

    penstock fluid --type 10:10@1000 --type 10:20@1000 --base 10ms --per-token 1us --nested --delta 0.05 --horizon 100s

    penstock fluid --type 512:200@12 --model llama-3.1-8b --hardware h100 --cap 64
    """
    import penstock
    from penstock.cli.show import Show
    from penstock.experiment.parse import rates as read_rates
    from penstock.plan.fluid import curve, judge, require_room, shared_cap, solve, whole_thresholds
    from penstock.report.columns import seconds

    show = Show(quiet, json)
    flows = _flows(types or [])
    cost, room = _cost(setup, base, per_token, capacity)
    over = curve(flows, cost)
    found = solve(flows, cost)
    require_room(found, flows, cost, room)
    show.print(
        f"M* {found.memory_tokens:,.1f} KV tokens"
        + (f" of {room:,.0f}" if isfinite(room) else "")
        + f", step {seconds(found.step_s)}, {found.tokens_per_s:,.0f} tokens/s after the first, load {found.load:.3f}"
    )
    limit = f"KV cache full at {over.rate_at(room):,.2f} req/s, " if isfinite(room) else ""
    show.print(f"{limit}no memory is enough at {over.pole_rps():,.2f}")
    asked = [] if rates is None else read_rates(rates)
    for rate in asked:
        show.print(f"M* at {rate:g} req/s: {over.memory_tokens(rate):,.0f} KV tokens")
    document: dict[str, Any] = {"schema": SCHEMA, "penstock": penstock.__version__, "types": flows, "cost": cost}
    document |= {"capacity_tokens": room if isfinite(room) else None, "equilibrium": found}
    document |= {"curve": {"a": over.a, "b": over.b, "pole_rps": _finite(over.pole_rps())}}
    document["curve"]["full_rps"] = over.rate_at(room) if isfinite(room) else None
    document["memory_at"] = [{"rate_rps": x, "memory_tokens": _finite(over.memory_tokens(x))} for x in asked]
    if nested:
        document["nested"] = _nested(show, flows, cost, room, thresholds, cap, eta, margin, delta, horizon)
    else:
        chosen: tuple[float, ...] = whole_thresholds(flows, cost, margin) if cap is None else shared_cap(flows, cap)
        chosen = chosen if thresholds is None else _numbers(thresholds)
        verdict = judge(flows, cost, chosen, room)
        show.print(
            f"WAIT with thresholds {_write(chosen)}: at most {verdict.memory_tokens:,.0f} KV tokens "
            f"({verdict.over:.2f} M*), batch {seconds(verdict.batch_s)}, gathered in {seconds(verdict.gather_s)}: "
            + _judgement(verdict.keeps_up, verdict.fits)
        )
        document |= {"thresholds": chosen, "verdict": verdict}
    show.json(document)


def _nested(
    show: Show,
    flows: list[Flow],
    cost: StepCost,
    room: float,
    thresholds: str | None,
    cap: float | None,
    eta: float,
    margin: float,
    delta: float,
    horizon: str,
) -> dict[str, Any]:
    from penstock.core.errors import PenstockError
    from penstock.experiment.parse import duration
    from penstock.plan.fluid import nested_cap
    from penstock.plan.nested import Segments, bound, whole_thresholds
    from penstock.report.columns import seconds

    if len({flow.prompt for flow in flows}) != 1:
        raise PenstockError("--nested with several prompt lengths", "give all types the same prompt")
    ordered = sorted(flows, key=lambda flow: flow.output)
    segments = Segments(
        ordered[0].prompt, tuple(flow.output for flow in ordered), tuple(flow.rate_rps for flow in ordered)
    )
    chosen: tuple[float, ...]
    if thresholds is not None:
        chosen = _numbers(thresholds)
    elif cap is not None:
        chosen = nested_cap(segments.survival(), segments.stages(), cap, eta)
    else:
        chosen = whole_thresholds(segments, cost, eta, margin)
    found = bound(segments, cost, chosen, duration(horizon, "--horizon"), delta)
    show.print(
        f"Nested WAIT with thresholds {_write(chosen)}: batch {found.batch_tokens:,.0f} KV tokens, "
        f"{seconds(found.batch_s)}, gathered in {seconds(found.gather_s)}; queues between segments "
        f"{found.buffer_tokens:,.0f}, together {found.memory_tokens:,.0f} but with probability {delta:g}: "
        + _judgement(found.keeps_up, found.memory_tokens <= room)
    )
    return {"thresholds": chosen, "delta": delta, "bound": found}


def _judgement(keeps_up: bool, fits: bool) -> str:
    said = "keeps up" if keeps_up else "does not keep up (batches run longer than they gather)"
    return said if fits else said + ", does not fit"


def _write(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" if value == int(value) else f"{value:.3f}" for value in values)


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _numbers(text: str) -> tuple[float, ...]:
    from penstock.core.errors import PenstockError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise PenstockError(f"thresholds {text!r} cannot be read", "write one a type, as 26,26") from None


def _flows(texts: list[str]) -> list[Flow]:
    from penstock.core.errors import PenstockError
    from penstock.plan.fluid import Flow

    if not texts:
        raise PenstockError("no request types", "give --type PROMPT:OUTPUT@RATE, as --type 512:200@12")
    found = []
    for text in texts:
        lengths, _, rate = text.partition("@")
        prompt, _, output = lengths.partition(":")
        try:
            found.append(Flow(float(prompt), float(output), float(rate)))
        except ValueError:
            raise PenstockError(f"type {text!r} cannot be read", "write PROMPT:OUTPUT@RATE, as 512:200@12") from None
    return found


def _cost(setup: Setup, base: str | None, per_token: str | None, capacity: float | None) -> tuple[StepCost, float]:
    """The step's cost and the KV tokens there are, as given or those of the model on its hardware."""
    from penstock.core.errors import PenstockError
    from penstock.experiment.build import build_beliefs, build_cluster, with_policy
    from penstock.experiment.parse import duration
    from penstock.plan.fluid import StepCost
    from penstock.policy.wait_traffic import step_cost

    if (base is None) != (per_token is None):
        raise PenstockError("half of a step's cost", "give both --base and --per-token, or neither")
    if capacity is not None and not capacity > 0:
        raise PenstockError(f"a capacity of {capacity:g} KV tokens", "give --capacity above 0")
    if base is not None and per_token is not None:
        cost = StepCost(duration(base, "--base"), duration(per_token, "--per-token"))
        return cost, inf if capacity is None else capacity
    cluster = build_cluster(with_policy(setup, "mixed"))
    cost = step_cost(build_beliefs(setup, cluster))
    return cost, float(cluster.instances[0].capacity_tokens) if capacity is None else capacity
