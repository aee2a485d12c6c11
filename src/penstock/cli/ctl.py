"""``penstock ctl``: an operator's hand on a running gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import JsonFile, Quiet

if TYPE_CHECKING:
    from penstock.cli.show import Show
    from penstock.live.admin.answers import HoldAnswer, MigrateAnswer
    from penstock.live.admin.client import AdminClient

SCHEMA = "penstock.ctl/1"
FAILED = 1
POLL_S = 0.2

app = typer.Typer(no_args_is_help=True, help="Look at a running gateway and order it about.")

AdminUrl = Annotated[
    str | None,
    typer.Option(
        "--admin", help="Admin API; found by itself on this machine.", metavar="URL", envvar="PENSTOCK_ADMIN_URL"
    ),
]
AdminKey = Annotated[
    str | None, typer.Option("--key", help="Its key; found likewise.", metavar="KEY", envvar="PENSTOCK_ADMIN_KEY")
]
InstanceNumber = Annotated[int, typer.Argument(help="Number of the instance (penstock ctl instances).", min=0)]
WaitFor = Annotated[bool, typer.Option("--wait", help="Return when it is over.")]
Patience = Annotated[str, typer.Option("--timeout", help="Wait no longer than this.", metavar="TIME")]
Force = Annotated[bool, typer.Option("--force", help="Even if it is the last one of its role.")]


@app.command()
def instances(admin: AdminUrl = None, key: AdminKey = None, json: JsonFile = None, quiet: Quiet = False) -> None:
    """List the instances: role, health, load."""
    from rich.text import Text

    from penstock.live.admin.answers import InstanceList
    from penstock.report.columns import percent, seconds

    show, client = _begin(admin, key, json, quiet)
    found = client.get(InstanceList, "instances")
    table = _table("Instance>", "Role", "State", "Decodes>", "Prefills>", "KV used>", "ITL>", "URL")
    for i in found.instances:
        state = i.health if not i.held else f"{i.health}, {'draining' if i.draining else 'held'}"
        if i.held and i.remaining:
            state += f" ({i.remaining:,} left)"
        if i.down_reason:
            state += f" ({i.down_reason})"
        kv = percent(i.kv_tokens / i.kv_capacity_tokens) if i.kv_capacity_tokens else ""
        style = "red" if i.health in ("down", "suspect") else "yellow" if i.held else ""
        cells = (str(i.instance), i.role, Text(state, style), f"{i.decodes:,}", f"{i.prefills:,}", kv)
        table.add_row(*cells, seconds(i.inter_token_s) if i.inter_token_s else "", Text(i.url))
    show.print(table if found.instances else "No instance is attached.")
    _json(show, found)


@app.command()
def requests(
    instance: Annotated[int | None, typer.Option(help="Only those on this instance.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Show at most this many, the oldest first.", min=1)] = 50,
    admin: AdminUrl = None,
    key: AdminKey = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """List the requests in flight, and which of them can move."""
    from rich.text import Text

    from penstock.live.admin.answers import RequestList
    from penstock.report.columns import seconds

    show, client = _begin(admin, key, json, quiet)
    found = client.get(RequestList, "requests", instance=instance, limit=limit)
    table = _table("Request", "Stage", "Instance>", "Prompt>", "Output>", "Age>", "Class", "Moves>", "Can move")
    for r in found.requests:
        where = "" if r.instance is None else str(r.instance)
        output = f"{r.generated:,}" + ("" if r.max_tokens is None else f" of {r.max_tokens:,}")
        can = Text("yes", "green") if r.movable else Text(r.why_not, "dim")
        cells = (Text(r.id), r.stage, where, f"{r.prompt_tokens:,}", output, seconds(r.age_s), Text(r.slo_class))
        table.add_row(*cells, f"{r.moves:,}", can)
    show.print(table if found.requests else "No request is in flight.")
    if found.total > len(found.requests):
        show.print(f"{found.total - len(found.requests):,} younger ones are not shown (--limit)")
    _json(show, found)


@app.command()
def custody(admin: AdminUrl = None, key: AdminKey = None, json: JsonFile = None, quiet: Quiet = False) -> None:
    """List the claims on KV that is pinned for a transfer."""
    from rich.text import Text

    from penstock.live.admin.answers import CustodyList
    from penstock.report.columns import seconds

    show, client = _begin(admin, key, json, quiet)
    found = client.get(CustodyList, "custody")
    table = _table("Request", "Pinned on>", "Tokens>", "State", "Age>", "Lease left>")
    for c in found.claims:
        state = "used" if c.used else "too old to use" if c.use_within_s <= 0 else f"good for {seconds(c.use_within_s)}"
        name = Text(c.id) if c.id else Text("(over)", "dim")
        table.add_row(name, str(c.instance), f"{c.tokens:,}", state, seconds(c.age_s), seconds(max(c.lease_left_s, 0)))
    show.print(table if found.claims else "No KV is pinned.")
    _json(show, found)


@app.command()
def status(admin: AdminUrl = None, key: AdminKey = None, json: JsonFile = None, quiet: Quiet = False) -> None:
    """Show the gateway at a glance."""
    from penstock.live.admin.answers import StatusAnswer
    from penstock.report.columns import seconds

    show, client = _begin(admin, key, json, quiet)
    s = client.get(StatusAnswer, "status")
    c = s.counters
    ticks = "no ticks" if s.tick_s is None else f"ticks every {seconds(s.tick_s)}"
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(c.requests.items())) or "none over yet"
    lines = [
        ("model", s.model or "none"),
        ("policy", f"{s.policy}, {ticks}"),
        ("up", f"{seconds(s.uptime_s)}, penstock {s.penstock}"),
        ("instances", f"{s.instances_up} of {s.instances} up"),
        ("requests", f"{s.in_flight:,} in flight (at most {s.max_inflight:,}), {s.parked:,} wait for an instance, "
                     f"{s.queued:,} at the door; {outcomes}; {c.refused_at_door:,} refused at the door"),
        ("moves", f"{c.migrations_done:,} done, {c.migrations_rolled_back:,} rolled back; {c.flips:,} flips"),
        ("faults", f"{c.fences:,} fences, {c.engine_errors:,} failed calls, {c.protocol_errors:,} protocol errors"),
        ("custody", f"{s.claims:,} claims open, {c.claims_issued:,} issued, {c.leases_expired:,} expired unused"),
    ]  # fmt: skip
    lines += [("", f"rolled back {count:,} ×: {why}") for why, count in sorted(c.rollback_reasons.items())]
    show.print(*(f"{name:<10}{text}" for name, text in lines))
    _json(show, s)


@app.command()
def migrate(
    request: Annotated[str, typer.Argument(help="Id of the request, or how it alone begins.")],
    to: Annotated[int | None, typer.Option("--to", help="Instance; the policy's choice by default.", min=0)] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the outcome.")] = True,
    timeout: Patience = "60s",
    admin: AdminUrl = None,
    key: AdminKey = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Move a running request to another instance; its client notices nothing.

    Exit code 1: it was rolled back, or is not over in time.
    """
    from penstock.live.admin.answers import MigrateAnswer, MigrateOrder

    show, client = _begin(admin, key, json, quiet)
    wait_s = _seconds(timeout)
    order = MigrateOrder(to=to, wait=wait, timeout_s=wait_s)
    done = client.post(MigrateAnswer, order, "requests", request, "migrate", wait_s=wait_s if wait else 0.0)
    show.print(_told(done))
    _json(show, done)
    if done.outcome not in ("done", "started"):
        raise typer.Exit(FAILED)


def _told(done: MigrateAnswer) -> str:
    from penstock.report.columns import seconds

    way = f"{done.id}: {done.source} → {done.target}"
    if done.outcome == "done":
        return f"{way} done in {seconds(done.seconds)}"
    if done.outcome in ("started", "moving"):
        return f"{way} {'started' if done.outcome == 'started' else 'still under way'}"
    return f"{way} {done.outcome}: {done.reason}"


@app.command()
def drain(
    instance: InstanceNumber,
    wait: WaitFor = False,
    timeout: Patience = "10min",
    force: Force = False,
    admin: AdminUrl = None,
    key: AdminKey = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Give an instance nothing new, and move everything off it. It stays attached; undrain gives it work again.

    Exit code 1: it was not empty in time (the drain goes on).
    """
    from penstock.live.admin.answers import HoldAnswer, Wait

    show, client = _begin(admin, key, json, quiet)
    patience_s = _seconds(timeout)
    answer = client.post(HoldAnswer, Wait(force=force), "instances", instance, "drain")
    if wait:
        answer = _emptied(show, client, answer, patience_s)
    _say_progress(show, answer, "drained", "is held")
    _json(show, answer)
    if wait and not answer.drained:
        raise typer.Exit(FAILED)


@app.command()
def undrain(
    instance: InstanceNumber, admin: AdminUrl = None, key: AdminKey = None, json: JsonFile = None, quiet: Quiet = False
) -> None:
    """Give a drained instance work again."""
    from penstock.live.admin.answers import HoldAnswer

    show, client = _begin(admin, key, json, quiet)
    answer = client.post(HoldAnswer, {}, "instances", instance, "undrain")
    show.print(
        f"instance {instance} gets work again" + ("" if answer.health == "up" else f" once it is up ({answer.health})")
    )
    _json(show, answer)


@app.command()
def flip(
    instance: InstanceNumber,
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed.")],
    force: Force = False,
    admin: AdminUrl = None,
    key: AdminKey = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Change the role of an instance. What runs there stays; nothing restarts."""
    from penstock.live.admin.answers import FlipAnswer, FlipOrder

    show, client = _begin(admin, key, json, quiet)
    done = client.post(FlipAnswer, FlipOrder(role, force), "instances", instance, "flip")
    if done.before == done.role:
        show.print(f"instance {instance} is {done.role} already")
    else:
        show.print(f"instance {instance}: {done.before} → {done.role}")
    for note in done.notes:
        show.note(note)
    _json(show, done)


@app.command()
def attach(
    url: Annotated[str, typer.Argument(help="A server that runs, as http://10.0.0.5:8000.")],
    role: Annotated[str, typer.Option("--role", help="prefill, decode or mixed.")],
    admin: AdminUrl = None,
    key: AdminKey = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Take in a server that runs already."""
    from penstock.live.admin.answers import AttachAnswer, AttachOrder

    show, client = _begin(admin, key, json, quiet)
    done = client.post(AttachAnswer, AttachOrder(url, role), "instances", wait_s=120.0)
    show.print(f"{done.url} is instance {done.instance} ({done.role})")
    _json(show, done)


@app.command()
def detach(
    instance: InstanceNumber,
    wait: WaitFor = False,
    timeout: Patience = "10min",
    force: Annotated[
        bool, typer.Option("--force", help="At once: what runs there starts again elsewhere, or fails if it cannot.")
    ] = False,
    admin: AdminUrl = None,
    key: AdminKey = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Drain an instance, then let it go. The server itself goes on running.

    Exit code 1: it was not empty in time (the detach goes on; undrain calls it off).
    """
    from penstock.live.admin.answers import HoldAnswer

    show, client = _begin(admin, key, json, quiet)
    patience_s = _seconds(timeout)
    answer = client.delete(HoldAnswer, "instances", instance, force="true" if force else None)
    if wait:
        answer = _emptied(show, client, answer, patience_s)
    _say_progress(show, answer, "detached", "will be detached when it is empty")
    _json(show, answer)
    if wait and answer.health != "gone":
        raise typer.Exit(FAILED)


@app.command()
def policy(
    name: Annotated[str, typer.Argument(help="See penstock policies.")],
    set: Annotated[list[str] | None, typer.Option(help="Option of the policy, as horizon=4096; repeat it.")] = None,
    admin: AdminUrl = None,
    key: AdminKey = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Go on under another policy. What runs stays where it is; what comes is placed by the new one."""
    from penstock.core.errors import PenstockError
    from penstock.live.admin.answers import PolicyAnswer, PolicyOrder

    show, client = _begin(admin, key, json, quiet)
    options: dict[str, str | float] = {}
    for text in set or []:
        option, equals, value = text.partition("=")
        if not equals or not option.strip():
            raise PenstockError(f"setting {text!r} cannot be read", "write --set option=value, as horizon=4096")
        options[option.strip().removeprefix(f"{name}.")] = value.strip()
    done = client.post(PolicyAnswer, PolicyOrder(name, options), "policy")
    given = "".join(f", {option}={value}" for option, value in done.options.items())
    show.print(f"policy: {done.before} → {done.policy}{given}")
    for note in done.notes:
        show.note(note)
    _json(show, done)


# -- what the commands share ------------------------------------------------------------------------------------------


def _begin(admin: str | None, key: str | None, json: str | None, quiet: bool) -> tuple[Show, AdminClient]:
    from penstock.cli.show import Show
    from penstock.live.admin.client import connect

    show = Show(quiet, json)
    return show, connect(admin, key)


def _json(show: Show, answer: Any) -> None:
    import msgspec

    show.json({"schema": SCHEMA, **msgspec.to_builtins(answer)})


def _table(*titles: str) -> Any:
    """An empty table; a title that ends in ``>`` is that of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in titles:
        last = title == titles[-1]  # where a terminal is narrow, that one is folded
        justify: Any = "right" if title.endswith(">") else "left"
        table.add_column(title.removesuffix(">"), justify=justify, overflow="fold", no_wrap=not last)
    return table


def _seconds(text: str) -> float:
    from penstock.core.errors import PenstockError
    from penstock.experiment.parse import duration

    found = duration(text, "--timeout")
    if not 0 <= found <= 3600:
        raise PenstockError(f"--timeout {text} is out of range", "give up to 1h, as 90s or 10min")
    return found


def _emptied(show: Show, client: AdminClient, answer: HoldAnswer, patience_s: float) -> HoldAnswer:
    """Look again until nothing is left of a drain, with progress on terminals."""
    import time

    from penstock.cli.progress import running
    from penstock.live.admin.answers import HoldAnswer

    end_s = time.monotonic() + patience_s
    total = answer.remaining
    with running(show, f"draining {answer.instance}") as progress:
        while answer.draining and time.monotonic() < end_s:
            time.sleep(min(POLL_S, patience_s))
            answer = client.get(HoldAnswer, "instances", answer.instance, "drain")
            total = max(total, answer.remaining)
            if progress is not None:
                progress(total - answer.remaining, total)
    return answer


def _count(requests: int) -> str:
    return f"{requests:,} request" + ("" if requests == 1 else "s")


def _say_progress(show: Show, answer: HoldAnswer, finished: str, unfinished: str) -> None:
    if answer.health == "gone" or (answer.drained and finished == "drained"):
        show.print(f"instance {answer.instance} is {finished}; {_count(answer.moved)} moved")
        return
    if not answer.draining:
        show.print(f"instance {answer.instance}: the drain was called off; {_count(answer.remaining)} there")
        return
    show.print(f"instance {answer.instance} {unfinished}; {_count(answer.remaining)} left")
    for left in answer.waiting_for:
        show.print(f"  {left.id} ({left.stage}): {left.why}")
    if answer.remaining > len(answer.waiting_for):
        show.print(f"  and {answer.remaining - len(answer.waiting_for):,} more")
