"""``penstock``: the commands, and how they fail.

A problem that the user can mend is one line on stderr and exit code 2. Ctrl-C is exit code 130. Anything else is a bug
and shows its traceback. Commands import what they need when they run, so that ``--help`` needs typer and nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from penstock.cli import (
    bench,
    catalogue,
    compare,
    ctl,
    fluid,
    goodput,
    league,
    plan,
    predictor,
    profile,
    provision,
    rank,
    replay,
    serve,
    simulate,
    trace,
)
from penstock.core.errors import PenstockError

INTERRUPTED = 130
BAD_INPUT = 2


class Commands(TyperGroup):
    """A group that turns our errors into one line and an exit code, and whose own help is plain text."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands without rich, which takes half of the time of ``penstock --help``."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except PenstockError as error:
            typer.echo("penstock: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            typer.echo("penstock: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import penstock

        typer.echo(f"penstock {penstock.__version__} ({penstock.FORM})")
        raise typer.Exit


@app.callback()
def penstock_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show version and form, and exit.")
    ] = False,
) -> None:
    """Simulate, serve, measure and replay prefill/decode-disaggregated LLM serving.

    Try: penstock simulate --synthetic azure-conv --rate 12 --policy least-kv

    or: penstock serve --engine emulated --model llama-3.1-8b --hardware h100
    """


app.command("simulate", short_help="One policy on a trace or synthetic traffic.")(simulate.simulate)
app.command("compare", short_help="Several policies on the same requests, all cores.")(compare.compare)
app.command("goodput", short_help="Highest request rate that still meets the SLO.")(goodput.goodput)
app.command("plan", short_help="How many prefill and decode instances a demand needs.")(plan.plan)
app.command("fluid", short_help="Rates and memory of one engine, WAIT's thresholds.")(fluid.fluid)
app.command("provision", short_help="Cheapest mix of machine types for a rate and SLO.")(provision.provision)
app.command("rank", short_help="Every arrangement of a GPU budget, by goodput.")(rank.rank)
app.command("league", short_help="Every policy on every workload, beside a bound.")(league.league)
app.add_typer(trace.app, name="trace", short_help="Describe, make and convert traces.")
app.command("replay", short_help="Replay a recorded event log, or try another policy on it.")(replay.replay)
app.command("bench", short_help="Replay a trace against a running server.")(bench.bench)
app.command("profile", short_help="Measure a running engine and fit its step model.")(profile.profile)
app.add_typer(predictor.app, name="predictor", short_help="Train and judge a remaining-length predictor.")
app.command("serve", short_help="Gateway over vLLM servers: place and move live requests.")(serve.serve)
app.add_typer(ctl.app, name="ctl", short_help="Look at a running gateway and order it about.")
app.command("models", short_help="List the built-in models.")(catalogue.models)
app.command("hardware", short_help="List the built-in accelerators.")(catalogue.hardware)
app.command("policies", short_help="List the policies and their options.")(catalogue.policies)


def main() -> None:
    """Entry point of the ``penstock`` script."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
