"""The live half of ``make demo``: real vLLM servers on this machine, a gateway, and things going wrong on purpose.

Three engines with the bundled model, a short trace through the gateway, and meanwhile: forced migrations of running
requests, a role flip, and one engine killed with SIGKILL. "Witness" requests are decoded by one engine alone first, and
then through all of that: their outputs must be equal token by token. Where no vLLM can be installed the engines are
emulated, and the output says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop

from penstock.cli.show import Show
from penstock.core.errors import PenstockError
from penstock.core.events import FlipOrdered, MoveOrdered
from penstock.core.types import MigrationLevel, Role
from penstock.experiment.replay import replay
from penstock.experiment.setup import ClusterSetup, Setup, Target
from penstock.live.emulated import EmulatedFleet, EmulatedSettings
from penstock.live.http.client import HttpClient
from penstock.live.http.messages import HttpFault
from penstock.live.local.command import EngineSettings
from penstock.live.local.install import find_python, inspect
from penstock.live.local.launch import LocalFleet
from penstock.live.run import start_local
from penstock.live.serve import Deployment, EngineAddress

ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE)
WITNESSES = 12
JSON = {"content-type": "application/json"}


class Stage:
    """Engines that can be killed, whatever they are."""

    def __init__(self, urls: list[str], fleet: LocalFleet | EmulatedFleet) -> None:
        self.urls = urls
        self.fleet = fleet

    async def kill(self, index: int) -> str:
        """End one without warning; say how."""
        if isinstance(self.fleet, LocalFleet):
            engine = self.fleet.engines[index]
            pid = engine.pid
            engine.kill9()
            return f"kill -9 {pid}"
        await self.fleet.engines[index].kill()
        return "killed"


async def raise_curtain(show: Show, stack: AsyncExitStack) -> Stage:
    """Real engines if there are any, else emulated ones."""
    try:
        installation = inspect(find_python())
    except PenstockError as error:
        show.note(f"{error}: the engines are EMULATED, timing is the simulator's and text is made up")
        fleet = EmulatedFleet()
        urls = await fleet.start(EmulatedSettings(), len(ROLES))
        stack.push_async_callback(fleet.stop)
        return Stage(urls, fleet)
    settings = EngineSettings(max_model_len=4096, kv_bytes=128 * 2**20)
    local = LocalFleet(installation, None, len(ROLES), settings)
    stack.push_async_callback(local.stop)
    show.print(f"Starting three stock vLLM {installation.version} servers on {'GPU' if installation.gpus else 'CPU'}.")
    return Stage(await start_local(local, show), local)


def witness(index: int, model: str) -> dict[str, Any]:
    """A greedy request; long enough that things can happen to it."""
    prompt = [32 + (7 * index + 11 * i) % 90 for i in range(20 + 9 * index)]
    return {"model": model, "prompt": prompt, "max_tokens": 300, "temperature": 0, "return_token_ids": True}


async def answer(client: HttpClient, url: str, body: dict[str, Any]) -> list[int]:
    """Token ids of a whole answer."""
    got = await client.fetch(url, "POST", "/v1/completions", msgspec.json.encode(body), JSON, 300.0)
    if got.status != 200:
        return []
    found: list[int] = msgspec.json.decode(got.body)["choices"][0]["token_ids"]
    return found


async def play(show: Show, out: Path) -> bool:
    """Everything; True if all went as it should."""
    async with AsyncExitStack() as stack:
        stage = await raise_curtain(show, stack)
        client = HttpClient()
        stack.push_async_callback(client.close)
        cluster = ClusterSetup(prefill=1, decode=2, migration_level=MigrationLevel.REPROMPT)
        setup = Setup(policy="ares", cluster=cluster, slo=Target(2.0, 0.2))
        record = out / "live.jsonl.gz"
        deployment = Deployment(setup, record=record)
        engines = [EngineAddress(u, r) for u, r in zip(stage.urls, ROLES, strict=True)]
        url = await deployment.start(engines)
        try:
            good = await act(show, out, stage, client, deployment, url)
        finally:
            await deployment.stop()
    again = replay(record)
    show.print(f"Event log {record}: {again.events:,} events replay to the same {again.actions:,} actions.")
    return good and again.identical


async def act(show: Show, out: Path, stage: Stage, client: HttpClient, deployment: Deployment, url: str) -> bool:
    """The trace, the witnesses, and what happens to them."""
    world, metrics = deployment.world, deployment.metrics
    model = world.instances[0].abilities.model
    bodies = [witness(i, model) for i in range(WITNESSES)]
    alone = [await answer(client, stage.urls[1], body) for body in bodies]
    show.print(f"Gateway at {url}. A trace of 60 requests, {WITNESSES} witnesses; migrations, a flip and a kill:")
    start = world.now()

    def say(text: str) -> None:
        show.print(f"  {world.now() - start:5.1f} s  {text}")

    bench = [str(Path(sys.executable).parent / "penstock"), "bench", "--url", url, "--synthetic", "96/64", "-n", "60"]
    bench += ["--rate", "3", "--ttft", "2s", "--tpot", "200ms", "--vocab", "32-126", "--quiet", "--name", "live"]
    bench += ["--json", str(out / "live.json"), "--report", str(out / "live.html")]
    process = await asyncio.create_subprocess_exec(*bench)
    through: list[asyncio.Task[list[int]]] = []
    for i, body in enumerate(bodies):
        through.append(asyncio.create_task(answer(client, url, body)))
        if i % 3 != 2:
            continue
        await asyncio.sleep(0.5)
        if i == 5:
            world.tell(FlipOrdered(1, Role.PREFILL))
            world.tell(FlipOrdered(0, Role.DECODE))
            say("engine 1 prefills and engine 0 decodes from now on: no restart, nothing drained")
        if i < 9:
            moved = [s.request for s in list(world.sessions.values()) if s.stage == "decoding"]
            for request in moved:
                world.tell(MoveOrdered(request, -1))
            say(f"ordered {len(moved)} running requests to move")
    crowd = {k: sum(s.where == k for s in world.sessions.values()) for k in (0, 2)}
    victim = max(crowd, key=lambda k: crowd[k])
    say(f"{await stage.kill(victim)}: engine {victim}, with {crowd[victim]} requests on it")
    same = sum(ids == alone[i] for i, ids in enumerate(await asyncio.gather(*through)))
    say(f"all witnesses are complete: {same} of {WITNESSES} equal to their unmoved output")
    await process.wait()
    run = json.loads((out / "live.json").read_text())
    done = sum(n for (_, _, outcome), n in metrics.migrations.items() if outcome == "done")
    back = sum(n for (_, _, outcome), n in metrics.migrations.items() if outcome != "done")
    pauses = sorted(pause for _, pause, _ in metrics.pauses)
    gap = f", median gap {1e3 * pauses[len(pauses) // 2]:.0f} ms" if pauses else ""
    show.print(
        f"{run['finished']} of {run['requests']} requests of the trace finished, {run['attainment']:.0%} within SLO.",
        f"{done} moves done, {back} rolled back{gap}; {metrics.flips} flips; {metrics.fences} engine lost.",
        f"Report: {out / 'live.html'}",
    )
    return same == WITNESSES and run["finished"] == run["requests"] and metrics.protocol_errors == 0


def main(out: Annotated[Path, typer.Option(help="Folder for reports and the event log.")] = Path("demo-out")) -> None:
    """Run the live half of the demo; exit code 1 if anything was lost."""
    logging.basicConfig(level=logging.ERROR)
    out.mkdir(exist_ok=True)
    show = Show()
    try:
        good = uvloop.run(play(show, out))
    except (PenstockError, HttpFault, subprocess.SubprocessError) as error:
        show.print(f"penstock: {error}")
        good = False
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
