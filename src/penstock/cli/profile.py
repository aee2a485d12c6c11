"""``penstock profile``: measure a running engine and fit a step model that simulations take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.options import OUTPUT, Quiet

if TYPE_CHECKING:
    from rich.table import Table

    from penstock.live.load.measure.run import Measured
    from penstock.perf.fitted import Residuals


def profile(
    url: Annotated[str, typer.Option(help="Engine to measure; it should be idle.")] = "http://127.0.0.1:8000",
    to: Annotated[
        str | None, typer.Option(help="Engine that KV moves to: measures the transfer.", metavar="URL")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for; the first that the engine lists.")] = None,
    seconds: Annotated[str, typer.Option(help="How long to measure, about.", metavar="TIME")] = "60s",
    max_num_batched_tokens: Annotated[
        int, typer.Option("--max-num-batched-tokens", help="The engine's own setting: tokens of one step.", min=16)
    ] = 2048,
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="Streams at once, at most (the engine's max_num_seqs).", min=1)
    ] = 64,
    kv_bytes_per_token: Annotated[
        float | None, typer.Option("--kv-bytes-per-token", help="To give the transfer in bytes too.", min=1)
    ] = None,
    vocab: Annotated[str, typer.Option(help="Token ids that prompts are made of.", metavar="LOW-HIGH")] = "32-126",
    api_key: Annotated[str | None, typer.Option(help="Bearer token.", envvar="PENSTOCK_API_KEY")] = None,
    name: Annotated[str, typer.Option(help="Name of the profile; the model's by default.")] = "",
    out: Annotated[
        str, typer.Option(help="Profile to write, for --profile.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = "profile.json",
    save: Annotated[
        str | None,
        typer.Option(help="Write every measured step as a JSON line.", metavar="FILE", rich_help_panel=OUTPUT),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure a running engine over HTTP and fit the step model that simulations take.

    penstock profile --url http://127.0.0.1:8100 --out tiny.json

    penstock profile --url http://127.0.0.1:8100 --to http://127.0.0.1:8200 --seconds 2min
    """
    import uvloop

    from penstock.cli.progress import running
    from penstock.cli.show import Show, check_writable, writing
    from penstock.experiment.parse import target
    from penstock.live.load.endpoint import endpoint
    from penstock.live.load.measure.run import Wanted, measure
    from penstock.live.load.prompts import parse_vocab
    from penstock.perf.profile_io import save_profile

    show = Show(quiet)
    check_writable(out, save)
    budget = target(seconds, "--seconds")
    wanted = Wanted(
        at=endpoint(url, api_key),
        to=None if to is None else endpoint(to, api_key),
        model=model,
        vocab=parse_vocab(vocab),
        seconds=_finite(budget),
        batched_tokens=max_num_batched_tokens,
        batch=max_batch,
        name=name,
    )
    with running(show, "measuring, seconds") as progress:
        tell = None if progress is None else lambda spent, _: progress(min(round(spent), round(budget)), round(budget))
        found = uvloop.run(measure(wanted, tell))
    for note in found.notes:
        show.note(note)
    show.print(_fit_table(found), *_words(found, kv_bytes_per_token))
    if save is not None:
        import msgspec

        with writing(save), open(save, "wb") as file:
            file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in found.campaign.rows))
        show.wrote(save)
    with writing(out):
        save_profile(found.profile, out)
    show.wrote(out)
    show.print(f"Try: penstock simulate --profile {out} {_flags(found, max_num_batched_tokens, kv_bytes_per_token)}")


def _finite(seconds: float) -> float:
    from penstock.core.errors import PenstockError

    if seconds == float("inf"):
        raise PenstockError("a measurement without end", "give --seconds, as 60s or 2min")
    return seconds


def _fit_table(found: Measured) -> Table:
    from rich import box
    from rich.table import Table

    from penstock.report.columns import percent

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(("Steps", "measured", "error median", "error P90", "mean error")):
        table.add_column(title, justify="left" if i == 0 else "right")
    kinds: dict[str, Residuals] = {"decode": found.fit.decode, "with prefill": found.fit.prefill}
    for kind, r in kinds.items():
        table.add_row(kind, str(r.steps), percent(r.p50), percent(r.p90), f"{r.signed_mean:+.1%}")
    return table


def _words(found: Measured, kv_bytes_per_token: float | None) -> list[str]:
    """What else was found, a line each."""
    from penstock.report.columns import amount, seconds

    model, f = found.fit.model, found.facts
    lines = [
        f"One decode alone takes {seconds(model.step_s(1, 512, [], []))} a token, 16 together "
        f"{seconds(model.step_s(16, 16 * 512, [], []))} (512 tokens of context each); a prompt of 512 tokens "
        f"{seconds(model.step_s(0, 0, [512], [0]))}. HTTP and front end add {seconds(found.front_end_s)} to a first "
        "token; that is not in the model."
    ]
    if f.capacity_tokens is not None:
        lines.append(f"KV cache: {f.blocks:,} blocks of {f.block_size} tokens, {f.capacity_tokens:,} tokens.")
    t = found.transfer
    if t is not None:
        size = ""
        if kv_bytes_per_token is not None:
            size = f", {amount(t.tokens_per_s * kv_bytes_per_token)}B/s"
        lines.append(
            f"KV transfer: {seconds(t.latency_s)} + {amount(t.tokens_per_s)} tokens/s{size}; first contact "
            f"{seconds(t.handshake_s)} more; error median {seconds(t.error_p50_s)}, P90 {seconds(t.error_p90_s)}."
        )
    return lines


def _flags(found: Measured, batched_tokens: int, kv_bytes_per_token: float | None) -> str:
    """The options with which a simulation is like this engine."""
    f, t = found.facts, found.transfer
    flags = [f"--max-num-batched-tokens {batched_tokens}"]
    if f.capacity_tokens is not None:
        flags += [f"--kv-blocks {f.blocks}", f"--block-size {f.block_size}"]
    if t is not None:
        flags.append(f"--handshake {t.handshake_s * 1e3:.0f}ms --link-latency {t.latency_s * 1e3:.1f}ms")
        if kv_bytes_per_token is not None:
            flags.append(f"--link-bandwidth {t.tokens_per_s * kv_bytes_per_token / 1e9:.3g}")
    return " ".join(flags)
