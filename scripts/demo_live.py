"""The live half of ``make demo``: real vLLM servers on this machine, a gateway, and things going wrong on purpose.

Three engines with the bundled model, which solves puzzles, a short trace through the gateway, and meanwhile: forced
migrations of running requests, a role flip, and one engine killed with SIGKILL. "Witness" requests are decoded by one
engine alone first, and then through all of that: their outputs must be equal token by token. Where no vLLM can be
installed the engines are emulated, and the output says so.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
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
from penstock.workload.problems import Problem, draw

ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE)
WITNESSES = 12
JSON = {"content-type": "application/json"}


class Stage:
    """Engines that can be killed, whatever they are."""

    def __init__(self, urls: list[str], plugins: list[str | None], fleet: LocalFleet | EmulatedFleet) -> None:
        self.urls = urls
        self.plugins = plugins
        self.fleet = fleet

    @property
    def real(self) -> bool:
        """Do they know the answers?"""
        return isinstance(self.fleet, LocalFleet)

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
        return Stage(urls, [*fleet.plugins], fleet)
    settings = EngineSettings(max_model_len=4096, kv_bytes=128 * 2**20)
    local = LocalFleet(installation, None, len(ROLES), settings)
    stack.push_async_callback(local.stop)
    show.print(f"Starting three stock vLLM {installation.version} servers on {'GPU' if installation.gpus else 'CPU'}.")
    urls = await start_local(local, show)
    return Stage(urls, [address.plugin for address in local.addresses], local)


def witnesses() -> list[Problem]:
    """Problems whose solutions are long enough that things can happen to them."""
    source = random.Random(4)
    drawn = (draw(source) for _ in iter(int, 1))
    return list(itertools.islice((p for p in drawn if 250 <= p.output_tokens <= 500), WITNESSES))


def question(problem: Problem, model: str) -> dict[str, Any]:
    """A greedy request for its solution."""
    most = {"max_tokens": 2 * problem.output_tokens, "temperature": 0, "return_token_ids": True}
    return {"model": model, "prompt": problem.prompt, **most}


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
        engines = [EngineAddress(u, r, plugin=p) for u, r, p in zip(stage.urls, ROLES, stage.plugins, strict=True)]
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
    problems = witnesses()
    bodies = [question(problem, model) for problem in problems]
    alone = [await answer(client, stage.urls[1], body) for body in bodies]
    show.print(f"Gateway at {url}. A trace of 60 requests, {WITNESSES} witnesses; migrations, a flip and a kill:")
    start = world.now()

    def say(text: str) -> None:
        show.print(f"  {world.now() - start:5.1f} s  {text}")

    bench = [
        str(Path(sys.executable).parent / "penstock"),
        "bench",
        "--url",
        url,
        "--synthetic",
        "problems",
        "-n",
        "60",
    ]
    bench += ["--rate", "3", "--ttft", "2s", "--tpot", "200ms", "--quiet", "--name", "live"]
    bench += ["--natural-end"] if stage.real else []
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
    answers = await asyncio.gather(*through)
    same = sum(ids == alone[i] for i, ids in enumerate(answers))
    say(f"all witnesses are complete: {same} of {WITNESSES} equal to their unmoved output")
    if stage.real:
        right = sum(
            bytes(i for i in ids if i < 256).decode() == p.solution for ids, p in zip(answers, problems, strict=True)
        )
        say(f"{right} of {WITNESSES} solve their puzzle")
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
