"""Real engines for tests: three stock vLLM servers on the CPU, once per test session (fixture ``engines``).

Their model is noise, so that one wrong KV block shows as other text. They have the plugin, and a predictor whose
weights are random, too.

``solvers`` are three others, with the bundled model and its own predictor.

Tests that use one of the two are marked ``engines`` by conftest.py, and `make tests` runs them apart from the others in
one process. Under pytest-xdist a lock makes workers take turns, each with engines of its own: slow but right.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.core.errors import PenstockError
from penstock.live.http import HttpFault
from penstock.live.http.client import HttpClient
from penstock.live.local.command import EngineSettings
from penstock.live.local.connect import preconnect
from penstock.live.local.install import find_python, inspect
from penstock.live.local.launch import LocalFleet
from penstock.live.local.model import bundled_head
from penstock.live.local.noise import NOISE, noise_model
from random_head import random_head

COUNT = 3
BLOCK = 32
MODEL = NOISE
# 128 MiB hold 32,768 tokens of the model: room for what tests run at once, and 1.8 GB of RAM an engine.
SETTINGS = EngineSettings(
    served_name=MODEL, dtype="float32", max_model_len=4096, kv_bytes=128 * 2**20, block_size=BLOCK
)

_GAUGE = re.compile(r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)$", re.M)


class Engines:
    """The running engines, and the folder of their predictor.

    A test that kills or suspends one leaves it served again (`restart`) and resumed.
    """

    def __init__(self, fleet: LocalFleet, head: Path) -> None:
        self.fleet = fleet
        self.head = head

    @property
    def urls(self) -> list[str]:
        """Origin of each engine."""
        return [engine.url for engine in self.fleet.engines]

    @property
    def plugins(self) -> list[str]:
        """Address of each engine's plugin."""
        return [str(address.plugin) for address in self.fleet.addresses]

    async def restart(self, index: int) -> None:
        """Start a killed engine again at its address, and let it meet the others."""
        await self.fleet.restart(index)
        await preconnect(self.urls)

    async def idle(self, client: HttpClient, timeout_s: float = 60.0) -> None:
        """Wait until no engine has a request or a used KV block; fails with what is left after ``timeout_s`` seconds.

        The default is above the lease of unclaimed KV (30 s).
        """
        left: dict[str, dict[str, float]] = {}
        try:
            async with asyncio.timeout(timeout_s):
                for url in self.urls:
                    while any((left := {url: await gauges(client, url)})[url].values()):
                        await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"not idle after {timeout_s:g} s: {left}")


async def gauges(client: HttpClient, url: str) -> dict[str, float]:
    """Running and waiting requests, and the used fraction of KV, as the engine reports them."""
    text = (await client.fetch(url, "GET", "/metrics")).body.decode()
    found = {name: float(value) for name, value in _GAUGE.findall(text)}
    assert len(found) == 3, text
    return found


async def call(client: HttpClient, url: str, path: str, **body: Any) -> dict[str, Any]:
    """POST to an engine; the answer must be a success."""
    raw = msgspec.json.encode({"model": MODEL} | body)
    answer = await client.fetch(url, "POST", path, raw, {"Content-Type": "application/json"}, timeout_s=120.0)
    assert answer.status == 200, answer.body
    content: dict[str, Any] = msgspec.json.decode(answer.body)
    return content


async def alive(client: HttpClient, url: str) -> bool:
    """Whether the engine answers its health check within a second."""
    try:
        return (await client.fetch(url, "GET", "/health", timeout_s=1.0)).status == 200
    except HttpFault:
        return False


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Three real engines that have met each other. Skips where no vLLM is installed (`make engine-cpu`)."""
    head = tmp_path_factory.mktemp("head")
    random_head(head, noise_model())
    yield from _running(tmp_path_factory, str(noise_model()), msgspec.structs.replace(SETTINGS, head=str(head)), head)


@pytest.fixture(scope="session")
def solvers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """The same with the bundled model and its predictor."""
    settings = EngineSettings(max_model_len=4096, kv_bytes=128 * 2**20, block_size=BLOCK)
    yield from _running(tmp_path_factory, None, settings, bundled_head())


def _running(
    folders: pytest.TempPathFactory, model: str | None, settings: EngineSettings, head: Path
) -> Iterator[Engines]:
    try:
        installation = inspect(find_python())
    except PenstockError as error:
        pytest.skip(str(error))
    with open(folders.getbasetemp().parent / f"engines-{model is None}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fleet = LocalFleet(installation, model, COUNT, settings)
        try:
            asyncio.run(_open(fleet))
            yield Engines(fleet, head)
        finally:
            asyncio.run(fleet.stop())


async def _open(fleet: LocalFleet) -> None:
    await fleet.start()
    await preconnect([engine.url for engine in fleet.engines])
