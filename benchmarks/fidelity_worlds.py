"""One trace, one policy, three worlds: real vLLM (CPU build), emulated with a fitted profile, simulated.

    .venv/bin/python benchmarks/fidelity_worlds.py --out fidelity.json

Three real engines run the bundled model behind the gateway. One of them is measured first (``penstock profile``); the
emulated engines and the simulator get that profile and nothing else. Real and emulated are measured by the same client
through the same gateway (``penstock bench``), so what those two differ in is the engine; what they both differ in from
the simulation is HTTP, gateway and client.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from penstock.core.types import MigrationLevel, Role
from penstock.experiment.setup import ClusterSetup, Setup, Target, replace
from penstock.live.emulated import EmulatedFleet, EmulatedSettings
from penstock.live.load.endpoint import endpoint
from penstock.live.load.measure.run import Measured, Wanted, measure
from penstock.live.local.command import EngineSettings
from penstock.live.local.connect import preconnect
from penstock.live.local.install import find_python, inspect
from penstock.live.local.launch import LocalFleet
from penstock.live.local.model import bundled_model
from penstock.live.serve import Deployment, EngineAddress
from penstock.perf.kv import kv_bytes_per_token
from penstock.perf.models import model_spec
from penstock.perf.profile_io import save_profile

ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE)
PENSTOCK = str(Path(sys.executable).parent / "penstock")
POLICY = "least-kv"
BATCHED = 2048


def cluster_of(found: Measured, profile: Path) -> ClusterSetup:
    """What was measured, as emulator and simulator take it."""
    model = str(bundled_model())
    per_token = float(kv_bytes_per_token(model_spec(model), "fp32"))
    facts, transfer = found.facts, found.transfer
    assert transfer is not None and facts.blocks is not None and facts.block_size is not None
    return ClusterSetup(
        model=model,
        kv_dtype="fp32",
        prefill=1,
        decode=2,
        block_size=facts.block_size,
        kv_blocks=facts.blocks,
        max_num_batched_tokens=BATCHED,
        async_scheduling=False,  # as vLLM on CPUs
        link_bytes_per_s=transfer.tokens_per_s * per_token,
        link_latency_s=transfer.latency_s,
        migration_level=MigrationLevel.REPROMPT,
        profile=str(profile),
    )


async def client_run(url: str, traffic: list[str], out: Path) -> dict[str, Any]:
    """``penstock bench`` in a process of its own; its document."""
    command = [PENSTOCK, "bench", "--url", url, *traffic, "--quiet", "--json", str(out), "--warmup", "8", "--fresh"]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait() != 0:
        raise SystemExit("bench failed")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


async def through_gateway(setup: Setup, urls: list[str], traffic: list[str], out: Path) -> dict[str, Any]:
    """Open a gateway over engines, and measure through it."""
    deployment = Deployment(setup)
    url = await deployment.start([EngineAddress(u, r) for u, r in zip(urls, ROLES, strict=True)])
    try:
        return await client_run(url, traffic, out)
    finally:
        await deployment.stop()


async def worlds(traffic: list[str], seconds: float, folder: Path) -> dict[str, Any]:
    """Measure one engine, then run all three."""
    profile = folder / "profile.json"
    settings = EngineSettings(max_model_len=4096, kv_bytes=256 * 2**20, block_size=32)
    async with LocalFleet(inspect(find_python()), None, len(ROLES), settings) as fleet:
        urls = [e.url for e in fleet.engines]
        await preconnect(urls)
        wanted = Wanted(
            at=endpoint(urls[1]),
            to=endpoint(urls[2]),
            vocab=range(32, 127),
            seconds=seconds,
            batched_tokens=BATCHED,
            batch=16,
        )
        found = await measure(wanted, None)
        save_profile(found.profile, profile)
        cluster = cluster_of(found, profile)
        setup = Setup(policy=POLICY, cluster=cluster, slo=Target(1.0, 0.05))
        real = await through_gateway(setup, urls, traffic, folder / "real.json")
    emulated = EmulatedFleet()
    latency_s = cluster.link_latency_s or 0.0
    one = EmulatedSettings(
        cluster=replace(cluster, prefill=0, decode=0, mixed=1), model="emulated-tiny", handshake_s=0.0
    )
    urls = await emulated.start(one, len(ROLES))
    try:
        mimic = await through_gateway(setup, urls, traffic, folder / "emulated.json")
    finally:
        await emulated.stop()
    command = [PENSTOCK, "simulate", *traffic, "--policy", POLICY, "--profile", str(profile), "--model", cluster.model]
    command += ["--prefill", "1", "--decode", "2", "--block-size", str(cluster.block_size), "--kv-dtype", "fp32"]
    command += [
        "--kv-blocks",
        str(cluster.kv_blocks),
        "--max-num-batched-tokens",
        str(BATCHED),
        "--no-async-scheduling",
    ]
    command += [
        "--link-bandwidth",
        repr((cluster.link_bytes_per_s or 0.0) / 1e9),
        "--link-latency",
        f"{latency_s * 1e3}ms",
    ]
    command += ["--quiet", "--json", str(folder / "sim.json")]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait() != 0:
        raise SystemExit("simulate failed")
    simulated = json.loads((folder / "sim.json").read_text())
    t = found.transfer
    return {
        "profile": {
            "fit_decode_p50": found.fit.decode.p50,
            "fit_prefill_p50": found.fit.prefill.p50,
            "front_end_ms": found.front_end_s * 1e3,
            "transfer_latency_ms": t.latency_s * 1e3 if t else None,
            "transfer_tokens_per_s": t.tokens_per_s if t else None,
            "notes": found.notes,
        },
        "worlds": {"simulated": simulated, "emulated": mimic, "real": real},
    }


def row(document: dict[str, Any]) -> dict[str, float]:
    """The figures that are compared, in ms."""
    found = {}
    for name in ("ttft", "tpot", "itl", "e2e"):
        for q in ("p50", "p99"):
            found[f"{name}_{q}"] = document[f"{name}_s"][q] * 1e3
    return found


def main(
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 1.5,
    requests: Annotated[int, typer.Option("-n")] = 200,
    lengths: Annotated[str, typer.Option(help="Prompt and output lengths.")] = "64-640/16-160",
    seconds: Annotated[float, typer.Option(help="Spent on measuring the engine.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Write all documents.")] = None,
) -> None:
    """Print a table, errors relative to the real engines."""
    traffic = ["--synthetic", lengths, "--rate", str(rate), "-n", str(requests), "--seed", "3"]
    with tempfile.TemporaryDirectory() as folder:
        found = uvloop.run(worlds(traffic, seconds, Path(folder)))
    rows = {name: row(document) for name, document in found["worlds"].items()}
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; profile {json.dumps(found['profile'])}")
    print(f"{'ms':10}{'real':>10}{'emulated':>10}{'error':>8}{'simulated':>11}{'error':>8}")
    for key, real in rows["real"].items():
        e, s = rows["emulated"][key], rows["simulated"][key]
        print(f"{key:10}{real:10.2f}{e:10.2f}{e / real - 1:8.1%}{s:11.2f}{s / real - 1:8.1%}")
    if out is not None:
        out.write_text(json.dumps({"profile": found["profile"], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
