"""Live moves on three real vLLM servers (CPU build, model "noise", float32, greedy): identity, gaps, kill -9, SIGSTOP.

    .venv/bin/python benchmarks/migration.py --requests 200 --json out.json

Every request is first decoded by one engine alone; then all go through the gateway, each with forced moves between the
two decode engines, cut at every offset modulo the block size in turn. Outputs must be equal token by token. After that
the same with the other kinds of moves, and with an engine killed and one stopped under load.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
import uvloop

from penstock.core.events import MoveOrdered
from penstock.core.types import MigrationLevel, Role
from penstock.experiment.setup import ClusterSetup, Setup, Target
from penstock.live.health import Watch
from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Call, Head, HttpFault
from penstock.live.http.sse import SseReader
from penstock.live.local.command import EngineSettings
from penstock.live.local.connect import preconnect
from penstock.live.local.install import find_python, inspect
from penstock.live.local.launch import LocalFleet
from penstock.live.local.noise import NOISE, noise_model
from penstock.live.serve import Deployment, EngineAddress

BLOCK = 32
MODEL = NOISE
LEVELS = (MigrationLevel.REPROMPT, MigrationLevel.REPLAY, MigrationLevel.HANDOFF, MigrationLevel.PRECOPY)
ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE)
JSON = {"content-type": "application/json"}


class Stream:
    """A client's view of one stream: its token ids, and when they came."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self.name = ""
        self.error = ""
        self.done = False
        self.over = asyncio.Event()
        self.grown = asyncio.Event()
        self.call: Call | None = None
        self._sse = SseReader()

    def on_head(self, head: Head) -> None:
        self.name = head.headers.get("x-request-id", "")
        if head.status != 200:
            self.error = f"status {head.status}"

    def on_body(self, data: bytes) -> None:
        for payload in self._sse.feed(data):
            if payload == b"[DONE]":
                self.done = True
                continue
            chunk = msgspec.json.decode(payload)
            if "error" in chunk:
                self.error = str(chunk["error"])
            for choice in chunk.get("choices", []):
                self.ids += choice.get("token_ids") or []
                self.times.append(time.perf_counter())
        self.grown.set()

    def on_end(self) -> None:
        self.over.set()
        self.grown.set()

    def on_fault(self, fault: HttpFault) -> None:
        self.error = fault.reason
        self.on_end()

    async def tokens(self, count: int) -> bool:
        """Wait for that many tokens; False if the stream ended first."""
        while len(self.ids) < count and not self.over.is_set():
            self.grown.clear()
            await self.grown.wait()
        return not self.over.is_set()


def noise(requests: int, seed: int) -> list[dict[str, Any]]:
    """Greedy requests for the noise model."""
    rng = random.Random(seed)
    return [
        {
            "model": MODEL,
            "prompt": [rng.randrange(32, 127) for _ in range(rng.randint(8, 160))],
            "max_tokens": rng.randint(160, 320),
            "temperature": 0,
            "return_token_ids": True,
        }
        for _ in range(requests)
    ]


class Trial:
    """Engines, gateway, requests and their unmoved outputs."""

    def __init__(self, fleet: LocalFleet, client: HttpClient, bodies: list[dict[str, Any]]) -> None:
        self.fleet = fleet
        self.client = client
        self.bodies = bodies
        self.expected: list[list[int]] = []

    async def start_gateway(self) -> None:
        """A gateway in this process over the engines."""
        cluster = ClusterSetup(prefill=1, decode=2, migration_level=MigrationLevel.REPROMPT)
        setup = Setup(policy="least-kv", cluster=cluster, slo=Target(None, None))
        self.deployment = Deployment(setup, watch=Watch(silence_s=1.0))
        engines = [EngineAddress(e.url, r, plugin=e.plugin) for e, r in zip(self.fleet.addresses, ROLES, strict=True)]
        self.url = await self.deployment.start(engines)
        self.world = self.deployment.world

    def stream(self, body: dict[str, Any], url: str = "") -> Stream:
        """Start one request."""
        sink = Stream()
        data = msgspec.json.encode({**body, "stream": True})
        sink.call = self.client.open(url or self.url, "POST", "/v1/completions", sink, JSON, data)
        return sink

    async def unmoved(self) -> None:
        """What one engine says when nobody interferes."""
        url = self.fleet.engines[0].url
        gate = asyncio.Semaphore(4)

        async def one(body: dict[str, Any]) -> list[int]:
            async with gate:
                stream = self.stream(body, url)
                await stream.over.wait()
                assert stream.done and not stream.error, stream.error
                return stream.ids

        self.expected = await asyncio.gather(*(one(b) for b in self.bodies))

    def order(self, stream: Stream) -> None:
        """Order a move of that stream to the other decode engine."""
        for session in self.world.sessions.values():
            if session.name == stream.name:
                self.world.tell(MoveOrdered(session.request, -1))
                return

    async def moved(self, level: MigrationLevel, parallel: int) -> dict[str, Any]:
        """All requests with forced moves; figures and differences."""
        metrics = self.deployment.metrics
        self.world.controller.migration_level = level
        before, failed = Counter(metrics.migrations), Counter(metrics.move_failures)
        metrics.pauses.clear()
        metrics.last_pulls.clear()
        twice, cuts = metrics.decoded_twice, Counter[int]()
        gate = asyncio.Semaphore(parallel)
        itl: list[float] = []

        async def one(index: int) -> bool:
            body = self.bodies[index]
            async with gate:
                stream = self.stream(body)
                prompt = len(body["prompt"])
                # Ask for a cut where (prompt + output) modulo the block size is the request's number.
                first = 4 + (index - prompt - 4) % BLOCK
                for at in (first, first + 64 + index % 7, first + 128 + index % 5):
                    if not await stream.tokens(at):
                        break
                    cuts[(prompt + len(stream.ids)) % BLOCK] += 1
                    self.order(stream)
                await stream.over.wait()
                itl.extend(np.diff(stream.times))
                return stream.done and not stream.error and stream.ids == self.expected[index]

        start = time.perf_counter()
        same = await asyncio.gather(*(one(i) for i in range(len(self.bodies))))
        took = time.perf_counter() - start
        found = Counter(metrics.migrations) - before
        done = sum(n for (_, _, outcome), n in found.items() if outcome == "done")
        pause = np.array([p for lv, p, _ in metrics.pauses if lv == int(level)])
        steps = np.array([p / i for lv, p, i in metrics.pauses if lv == int(level) and i > 0])
        return {
            "requests": len(same),
            "identical": sum(same),
            "moves": done,
            "rolled_back": sum(n for (_, _, outcome), n in found.items() if outcome != "done"),
            "why_rolled_back": dict(Counter(metrics.move_failures) - failed),
            "ordered_at_offsets": len(cuts),
            "decoded_twice": metrics.decoded_twice - twice,
            "last_pulls": pulls(metrics.last_pulls),
            "seconds": took,
            "itl_ms": {"p50": q(itl, 0.5) * 1e3, "p99": q(itl, 0.99) * 1e3},
            "gap_ms": {"p50": q(pause, 0.5) * 1e3, "p99": q(pause, 0.99) * 1e3},
            "gap_steps": {"p50": q(steps, 0.5), "p90": q(steps, 0.9), "p99": q(steps, 0.99)},
            "gap_histogram_steps": histogram(steps),
        }

    async def fault(self, kind: str, streams: int = 20) -> dict[str, Any]:
        """Kill or stop decode engine 1 with ``streams`` streams in flight."""
        engine = self.fleet.engines[1]
        running = [self.stream(self.bodies[i]) for i in range(streams)]
        await asyncio.gather(*(s.tokens(20) for s in running))
        there = sum(s.where == 1 for s in self.world.sessions.values())
        start = time.perf_counter()
        if kind == "kill -9":
            engine.kill9()
        else:
            engine.suspend()
        await asyncio.gather(*(s.over.wait() for s in running))
        took = time.perf_counter() - start
        same = sum(s.done and not s.error and s.ids == e for s, e in zip(running, self.expected, strict=False))
        longest = max(max(np.diff(s.times)) for s in running)
        if kind == "kill -9":
            await self.fleet.restart(1)
            await preconnect([e.url for e in self.fleet.engines])
        else:
            engine.resume()
        async with asyncio.timeout(120):
            while self.world.instances[1].health.value != "up":
                await asyncio.sleep(0.1)
        return {
            "streams": streams,
            "on_that_engine": there,
            "complete_and_identical": same,
            "longest_gap_s": float(longest),
            "seconds": took,
            "taken_back": True,
        }

    async def residue(self) -> dict[str, Any]:
        """What is left when all is over."""
        self.world.claims.sweep(self.world.now())
        usage: dict[str, float] = {}
        for _ in range(80):  # a lease is 30 s
            usage = {}
            for i, engine in enumerate(self.fleet.engines):
                text = (await self.client.fetch(engine.url, "GET", "/metrics")).body.decode()
                for line in text.splitlines():
                    if line.startswith(("vllm:kv_cache_usage_perc{", "vllm:num_requests_running{")):
                        usage[f"{i} {line.partition('{')[0]}"] = float(line.rsplit(" ", 1)[1])
            self.world.claims.sweep(self.world.now())
            if not any(usage.values()) and not len(self.world.claims):
                break
            await asyncio.sleep(0.5)
        return {
            "engines": usage,
            "custody_claims": len(self.world.claims),
            "leases_expired_unused": self.world.claims.expired,
            "requests_in_books": len(self.world.controller.requests),
            "protocol_errors": self.deployment.metrics.protocol_errors,
            "greedy_divergences": self.deployment.metrics.divergences,
        }


def q(values: Any, at: float) -> float:
    """A quantile, NaN where there is nothing."""
    return float(np.quantile(values, at)) if len(values) else float("nan")


def pulls(found: list[tuple[int, int]]) -> dict[str, float]:
    """Of pre-copies: tokens of the last pull, and how many kept to two blocks plus what was decoded meanwhile."""
    left = [tokens for tokens, _ in found]
    kept = sum(tokens <= 2 * BLOCK + meanwhile for tokens, meanwhile in found)
    return {"moves": len(found), "p50": q(left, 0.5), "max": max(left, default=0), "within_bound": kept}


def histogram(steps: Any) -> dict[str, int]:
    """Counts by upper bound, in inter-token times."""
    edges = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 1e9]
    counts, _ = np.histogram(steps, edges)
    return {f"<= {edge:g}": int(n) for edge, n in zip(edges[1:], counts, strict=True)}


async def measure(requests: int, parallel: int, seed: int, faults: bool) -> dict[str, Any]:
    """All trials, in one run."""
    settings = EngineSettings(
        served_name=NOISE, dtype="float32", max_model_len=4096, kv_bytes=128 * 2**20, block_size=BLOCK
    )
    client = HttpClient()
    found: dict[str, Any] = {"cores": os.cpu_count(), "parallel": parallel}
    async with LocalFleet(inspect(find_python()), str(noise_model()), 3, settings) as fleet:
        await preconnect([e.url for e in fleet.engines])
        trial = Trial(fleet, client, noise(requests, seed))
        await trial.unmoved()
        await trial.start_gateway()
        try:
            for level in LEVELS:
                name = level.name.lower()
                found[name] = await trial.moved(level, parallel)
                print(name, json.dumps(found[name]), flush=True)
            if faults:
                for kind in ("kill -9", "SIGSTOP"):
                    found[kind] = await trial.fault(kind)
                    print(kind, json.dumps(found[kind]), flush=True)
            found["residue"] = await trial.residue()
            print("residue", json.dumps(found["residue"]), flush=True)
        finally:
            await trial.deployment.stop()
            await client.close()
    return found


def main(
    requests: Annotated[int, typer.Option(help="Requests, each moved up to three times.")] = 200,
    parallel: Annotated[int, typer.Option(help="Streams at a time.")] = 4,
    seed: Annotated[int, typer.Option()] = 0,
    faults: Annotated[bool, typer.Option(help="Also kill and stop engines.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Print one JSON object per trial."""
    logging.basicConfig(level=logging.ERROR)
    found = uvloop.run(measure(requests, parallel, seed, faults))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
