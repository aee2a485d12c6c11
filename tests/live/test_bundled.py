"""The bundled model behind the gateway: puzzles are solved whatever moves, and the policy hears how much is left."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import uvloop

from migration import LEVELS, Trial
from penstock.core.events import NO_PREDICTION
from penstock.live.http.client import HttpClient
from penstock.live.local.model import NAME, bundled_model
from penstock.workload.problems import Problem, draw
from tests.live.engines import Engines

COUNT = 24
LARGEST_BYTES = 12_000_000


def problems() -> list[Problem]:
    """Of all families, some of them long."""
    source = random.Random(21)
    return [draw(source, family) for family in ("collatz", "sort", "multiples", "fibonacci") for _ in range(COUNT // 4)]


def body_of(problem: Problem) -> dict[str, Any]:
    most = {"max_tokens": problem.output_tokens + 200, "temperature": 0, "return_token_ids": True}
    return {"model": NAME, "prompt": list(problem.prompt.encode()), **most}


def test_it_is_small() -> None:
    assert (bundled_model() / "model.safetensors").stat().st_size <= LARGEST_BYTES


def test_puzzles_are_solved_through_moves_of_all_kinds(solvers: Engines) -> None:
    asked = problems()

    async def work() -> None:
        client = HttpClient()
        trial = Trial(solvers.fleet, client, [body_of(p) for p in asked])
        await trial.unmoved()
        right = [
            bytes(i for i in ids if i < 256).decode() == p.solution
            for ids, p in zip(trial.expected, asked, strict=True)
        ]
        assert sum(right) >= 0.8 * COUNT
        await trial.start_gateway()
        world = trial.world
        heard: list[float] = []
        try:
            async with asyncio.timeout(300):
                watching = asyncio.create_task(watch(trial, heard))
                for level in LEVELS:
                    found = await trial.moved(level, parallel=4)
                    assert found["identical"] == COUNT, found
                    assert found["moves"] > 0, found
                watching.cancel()
            left = await trial.residue()
            assert not any(left["engines"].values()), left
            assert left["custody_claims"] == left["requests_in_books"] == left["protocol_errors"] == 0, left
        finally:
            await trial.deployment.stop()
            await client.close()
        forecasts = world.metrics.forecasts
        assert forecasts.received > 10 * COUNT
        coverage = forecasts.coverage("stop")
        assert list(coverage) == sorted(coverage) and [*coverage.values()] == sorted(coverage.values())
        assert coverage[0.9] > 0.5 > coverage[0.1]  # 24 problems cannot tell more
        assert max(heard) > 100

    uvloop.run(work())


async def watch(trial: Trial, heard: list[float]) -> None:
    """What the policy would be told at a tick."""
    while True:
        heard += [left for left in trial.world.tick().predicted_remaining if left != NO_PREDICTION]
        await asyncio.sleep(0.05)
