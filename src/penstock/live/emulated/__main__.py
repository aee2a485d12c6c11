"""``python -m penstock.live.emulated``: a fleet in a process of its own, one JSON line per URL on standard output."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from typing import Annotated

import typer
import uvloop

from penstock.core.errors import PenstockError
from penstock.experiment.setup import ClusterSetup
from penstock.live.emulated.fleet import EmulatedFleet
from penstock.live.emulated.settings import EmulatedSettings

_PARENT_POLL_S = 1.0


def run(
    instances: Annotated[int, typer.Option(min=1, help="Engines to emulate.")] = 4,
    port: Annotated[int, typer.Option(min=0, max=65535, help="First port; 0 for free ones.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[str, typer.Option(help="Catalogue model whose costs they have.")] = "llama-3.1-8b",
    hardware: Annotated[str, typer.Option(help="Catalogue hardware.")] = "a100-80g",
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallelism.")] = 1,
    served_name: Annotated[str | None, typer.Option(help="Model name in the API; must say 'emulated'.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and output.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="As vLLM's.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="As vLLM's.")] = 8192,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV block.")] = 16,
    kv_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks, instead of what fits in memory.")] = None,
    profile: Annotated[str | None, typer.Option(help="Fitted step model instead of the roofline.")] = None,
    speed: Annotated[float, typer.Option(help="Engine seconds per second.")] = 1.0,
    lease_s: Annotated[float, typer.Option(help="Seconds for which finished KV stays pinned.")] = 30.0,
    mean_output: Annotated[int, typer.Option(min=0, help="Mean length of outputs; 0 for max_tokens.")] = 0,
    kv_load_failure_policy: Annotated[str, typer.Option(help="recompute or fail.")] = "recompute",
    handshake_s: Annotated[float, typer.Option(help="Engine seconds of a pair's first transfer.")] = 0.2,
) -> None:
    """Emulate vLLM engines until SIGTERM or SIGINT, or until the parent process has gone."""
    cluster = ClusterSetup(
        model=model,
        hardware=hardware,
        tp=tp,
        prefill=0,
        decode=0,
        mixed=1,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_blocks=kv_blocks,
        profile=profile,
    )
    settings = EmulatedSettings(
        cluster=cluster,
        model=served_name,
        max_model_len=max_model_len,
        speed=speed,
        lease_s=lease_s,
        mean_output=mean_output,
        kv_load_failure_policy=kv_load_failure_policy,
        handshake_s=handshake_s,
    )
    try:
        uvloop.run(_serve(settings, instances, host, port))
    except PenstockError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


async def _serve(settings: EmulatedSettings, count: int, host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    parent = os.getppid()
    fleet = EmulatedFleet()
    urls = await fleet.start(settings, count, host, port)
    gc.collect()
    gc.freeze()
    for url, plugin in zip(urls, fleet.plugins, strict=True):
        print(json.dumps({"url": url, "model": fleet.engines[0].plan.model, "plugin": plugin}), flush=True)
    while not over.is_set() and os.getppid() == parent:
        try:
            await asyncio.wait_for(over.wait(), _PARENT_POLL_S)
        except TimeoutError:
            continue
    await fleet.stop()


if __name__ == "__main__":
    typer.run(run)
