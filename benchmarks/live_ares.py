"""ARES live: real engines with small KV caches, emulated ones at 16 and 64, and the simulator, on the same requests.

    .venv/bin/python benchmarks/live_ares.py real --json real.json
    .venv/bin/python benchmarks/live_ares.py emulated --decode 16 --json emulated16.json

The workload is the bundled model's: puzzles whose solutions are 4 to 2,800 tokens long. Engines have KV for a few
requests of full length, so that a load that is not balanced ends in preemptions. One prefill and two decode engines
(real), or one prefill instance for every eight decode instances (emulated, slowed down so that one machine can play
them all in real time; times are in seconds of the engines). Every policy gets the same requests at the same times, in
turn, several times over. Predictions are the bundled predictor's where engines are real; elsewhere they are the truth
spoilt as much (``--sigma``, ``--halving``: of ``penstock.predict.simulated.NoisyOracle``). The simulator plays the same
requests over the same cluster beside each.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop

from penstock.core.types import MigrationLevel
from penstock.experiment.build import run
from penstock.experiment.setup import ClusterSetup, Setup, Target, TruthSetup, WorkloadSetup, replace
from penstock.experiment.traffic import build_trace, slos
from penstock.live.emulated import EmulatedFleet, EmulatedSettings
from penstock.live.http.client import HttpClient
from penstock.live.load.endpoint import endpoint
from penstock.live.load.measure.run import Wanted, measure
from penstock.live.local.command import EngineSettings
from penstock.live.local.connect import preconnect
from penstock.live.local.install import find_python, inspect
from penstock.live.local.launch import LocalFleet
from penstock.live.local.model import bundled_model
from penstock.live.serve import Deployment, EngineAddress
from penstock.perf.kv import kv_bytes_per_token
from penstock.perf.models import model_spec
from penstock.perf.profile_io import save_profile
from penstock.report.metrics import summarize

BLOCK = 32
LONGEST = 3072
BATCHED = 2048
POLICIES = ("round-robin", "least-kv", "ares")
PENSTOCK = str(Path(sys.executable).parent / "penstock")
Row = dict[str, Any]


def roles_of(cluster: ClusterSetup) -> list[Any]:
    """Prefill instances first."""
    from penstock.core.types import Role

    return [Role.PREFILL] * cluster.prefill + [Role.DECODE] * cluster.decode


async def counted(client: HttpClient, urls: list[str], name: str) -> float:
    """A counter of all engines together."""
    found = 0.0
    for url in urls:
        text = (await client.fetch(url, "GET", "/metrics")).body.decode()
        found += sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))
    return found


async def through_gateway(
    setup: Setup, addresses: list[EngineAddress], seed: int, speed: float, natural_end: bool, folder: Path
) -> Row:
    """One policy over engines, measured by ``penstock bench`` in a process of its own."""
    deployment = Deployment(setup)
    url = await deployment.start(addresses)
    client = HttpClient()
    urls = [a.url for a in addresses]
    out = folder / "bench.json"
    load, slo = setup.workload, setup.slo
    assert load.rate_rps is not None and slo.ttft_s is not None and slo.tpot_s is not None
    command = [PENSTOCK, "bench", "--url", url, "--synthetic", load.synthetic, "-n", str(load.requests)]
    command += ["--rate", repr(load.rate_rps * speed), "--seed", str(seed), "--quiet", "--json", str(out)]
    command += ["--ttft", f"{slo.ttft_s / speed * 1e3}ms", "--tpot", f"{slo.tpot_s / speed * 1e3}ms", "--warmup", "4"]
    command += ["--natural-end"] if natural_end else []
    try:
        before = await counted(client, urls, "vllm:num_preemptions_total")
        process = await asyncio.create_subprocess_exec(*command)
        await process.wait()
        preempted = await counted(client, urls, "vllm:num_preemptions_total") - before
        document = json.loads(out.read_text())
        metrics = deployment.metrics
        moved = sum(n for (_, _, outcome), n in metrics.migrations.items() if outcome == "done")
        forecasts = {str(level): share for level, share in metrics.forecasts.coverage("stop").items()}
        return {
            **figures(document, speed),
            "preemptions": preempted,
            "migrations": moved,
            "predictions": metrics.forecasts.received,
            "coverage": forecasts,
        }
    finally:
        await client.close()
        await deployment.stop()


def figures(document: Row, speed: float) -> Row:
    """What is compared, in seconds of the engines."""
    found: Row = {key: document[key] for key in ("requests", "finished", "attainment")}
    for name in ("ttft_s", "tpot_s", "itl_s"):
        for spot in ("p50", "p99"):
            found[f"{name[:-2]}_{spot}_s"] = document[name][spot] * speed
    return found


def simulated(setup: Setup, seed: int) -> Row:
    """The same in simulation."""
    trace = build_trace(setup, seed)
    result = run(setup, seed, trace=trace, sample=False)
    metrics = summarize(result, slos(setup, trace))
    document = {
        "requests": metrics.requests,
        "finished": metrics.finished,
        "attainment": metrics.attainment,
        **{
            name: {"p50": s.p50, "p99": s.p99}
            for name in ("ttft_s", "tpot_s", "itl_s")
            for s in (getattr(metrics, name),)
        },
    }
    return {**figures(document, 1.0), "preemptions": metrics.preemptions, "migrations": metrics.migrations}


async def profiled(urls: list[str], seconds: float, folder: Path, blocks: int) -> ClusterSetup:
    """Measure one of the engines; what emulator and simulator need to know."""
    wanted = Wanted(at=endpoint(urls[1]), to=endpoint(urls[2]), vocab=range(32, 127), seconds=seconds, batch=16)
    found = await measure(wanted, None)
    save_profile(found.profile, folder / "profile.json")
    per_token = float(kv_bytes_per_token(model_spec(str(bundled_model())), "fp32"))
    assert found.transfer is not None
    return ClusterSetup(
        model=str(bundled_model()),
        kv_dtype="fp32",
        prefill=1,
        decode=2,
        block_size=BLOCK,
        kv_blocks=blocks,
        max_num_batched_tokens=BATCHED,
        async_scheduling=False,  # as vLLM on CPUs
        link_bytes_per_s=found.transfer.tokens_per_s * per_token,
        link_latency_s=found.transfer.latency_s,
        migration_level=MigrationLevel.REPROMPT,
        profile=str(folder / "profile.json"),
    )


def report(world: str, rows: list[Row]) -> None:
    """A line a policy and world: means over the seeds."""
    print(f"{world}: {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print(f"{'':24}{'preempted':>10}{'moved':>8}{'TPOT P50':>10}{'P99, ms':>9}{'TTFT P99':>10}{'SLO met':>9}")
    for kind in ("live", "simulated"):
        for policy in POLICIES:
            mine = [row for row in rows if row["policy"] == policy and row["world"] == kind]
            if not mine:
                continue

            def mean(key: str, among: list[Row] = mine) -> float:
                return float(np.mean([row[key] or 0 for row in among]))

            print(
                f"{policy:14}{kind:10}{mean('preemptions'):10.1f}{mean('migrations'):8.1f}"
                f"{mean('tpot_p50_s') * 1e3:10.2f}{mean('tpot_p99_s') * 1e3:9.2f}{mean('ttft_p99_s') * 1e3:10.0f}"
                f"{mean('attainment'):9.1%}"
            )


def setup_of(
    cluster: ClusterSetup, policy: str, load: WorkloadSetup, slo: Target, sigma: float, halving: float
) -> Setup:
    """One policy's experiment."""
    truth = TruthSetup(predictor_sigma=sigma, predictor_halving=halving)
    return Setup(policy=policy, cluster=cluster, workload=load, slo=slo, truth=truth)


app = typer.Typer(no_args_is_help=True)
Rate = Annotated[float, typer.Option(help="Requests a second, of the engines' clock.")]
Requests = Annotated[int, typer.Option("-n", help="Requests a run.")]
Blocks = Annotated[int, typer.Option(help="KV blocks of 32 tokens of every engine.")]
Seeds = Annotated[int, typer.Option(help="Traces; every policy gets each.")]
Sigma = Annotated[float, typer.Option(help="Error of predictions at the first token, where the world makes them.")]
Halving = Annotated[float, typer.Option(help="Tokens after which that error has halved.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Where to write every run.")]
Profile = Annotated[Path | None, typer.Option(help="Folder to keep the measured profile in, or to take it from.")]


@app.command()
def real(
    rate: Rate = 4.0,
    requests: Requests = 300,
    blocks: Blocks = 112,
    seeds: Seeds = 2,
    ttft: float = 1.0,
    tpot: float = 0.02,
    seconds: Annotated[float, typer.Option(help="Spent on measuring an engine.")] = 40.0,
    sigma: Sigma = 0.642,
    halving: Halving = 2617.0,
    profile: Profile = None,
    json_path: JsonPath = None,
) -> None:
    """Three real vLLM servers (CPU build) with the bundled model and its predictor, and the simulator beside."""
    logging.basicConfig(level=logging.ERROR)
    load = WorkloadSetup(synthetic="problems", requests=requests, rate_rps=rate)
    slo = Target(ttft, tpot)

    async def work(folder: Path) -> list[Row]:
        settings = EngineSettings(max_model_len=LONGEST, block_size=BLOCK, kv_blocks=blocks, kv_bytes=128 * 2**20)
        rows: list[Row] = []
        async with LocalFleet(inspect(find_python()), None, 3, settings) as fleet:
            urls = [a.url for a in fleet.addresses]
            await preconnect(urls)
            cluster = await profiled(urls, seconds, folder, blocks)
            (folder / "cluster.json").write_text(json.dumps(cluster_plain(cluster)))
            for seed in range(seeds):
                for policy in POLICIES[seed % 3 :] + POLICIES[: seed % 3]:
                    setup = setup_of(cluster, policy, load, slo, sigma, halving)
                    addresses = [
                        EngineAddress(a.url, role, plugin=a.plugin)
                        for a, role in zip(fleet.addresses, roles_of(cluster), strict=True)
                    ]
                    about = {"policy": policy, "seed": seed}
                    live = await through_gateway(setup, addresses, seed, 1.0, True, folder)
                    rows.append({**about, "world": "live", **live})
                    print(json.dumps(rows[-1]), flush=True)
                    rows.append({**about, "world": "simulated", **simulated(setup, seed)})
        return rows

    finish("real", work, profile, json_path)


@app.command()
def emulated(
    decode: Annotated[int, typer.Option(help="Decode instances; one prefill instance for every eight.")] = 16,
    rate: Annotated[float, typer.Option(help="Requests a second and decode instance, of the engines' clock.")] = 2.0,
    requests: Requests = 1500,
    blocks: Blocks = 112,
    seeds: Seeds = 1,
    ttft: float = 1.0,
    tpot: float = 0.02,
    speed: Annotated[float, typer.Option(help="Seconds of the engines per second of the clock.")] = 0.1,
    sigma: Sigma = 0.642,
    halving: Halving = 2617.0,
    profile: Profile = None,
    json_path: JsonPath = None,
) -> None:
    """Emulated engines with the profile that ``real`` has measured, and the simulator beside."""
    logging.basicConfig(level=logging.ERROR)
    if profile is None:
        raise typer.BadParameter("give the folder that `real --profile FOLDER` has filled")
    prefill = max(1, decode // 8)
    load = WorkloadSetup(synthetic="problems", requests=requests, rate_rps=rate * decode)
    slo = Target(ttft, tpot)
    cluster = replace(read_cluster(profile), prefill=prefill, decode=decode, kv_blocks=blocks)

    async def work(folder: Path) -> list[Row]:
        rows: list[Row] = []
        for seed in range(seeds):
            for policy in POLICIES:
                setup = setup_of(cluster, policy, load, slo, sigma, halving)
                fleet = EmulatedFleet()
                one = EmulatedSettings(
                    cluster=replace(cluster, prefill=0, decode=0, mixed=1),
                    model="emulated-tiny",
                    speed=speed,
                    handshake_s=0.0,
                    sigma_first=sigma,
                    halving_tokens=halving,
                )
                urls = await fleet.start(one, prefill + decode)
                try:
                    addresses = [
                        EngineAddress(url, role, plugin=plugin)
                        for url, role, plugin in zip(urls, roles_of(cluster), fleet.plugins, strict=True)
                    ]
                    live = await through_gateway(setup, addresses, seed, speed, False, folder)
                finally:
                    await fleet.stop()
                about = {"policy": policy, "seed": seed}
                rows.append({**about, "world": "live", **live})
                print(json.dumps(rows[-1]), flush=True)
                rows.append({**about, "world": "simulated", **simulated(setup, seed)})
        return rows

    finish(f"{decode} emulated decode instances", work, profile, json_path)


def cluster_plain(cluster: ClusterSetup) -> Any:
    """As JSON; paths stay behind."""
    import msgspec

    return msgspec.to_builtins(replace(cluster, model="", profile=None))


def read_cluster(folder: Path) -> ClusterSetup:
    """What ``real --profile`` has kept."""
    import msgspec

    plain = msgspec.convert(json.loads((folder / "cluster.json").read_text()), ClusterSetup)
    return replace(plain, model=str(bundled_model()), profile=str(folder / "profile.json"))


def finish(world: str, work: Any, profile: Path | None, json_path: Path | None) -> None:
    """Run, print, and write."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if profile is None else profile
        folder.mkdir(parents=True, exist_ok=True)
        rows = uvloop.run(work(folder))
    report(world, rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app()
