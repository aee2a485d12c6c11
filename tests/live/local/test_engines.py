"""Real engines: same answers everywhere, KV moved without a trace, no thread spinning or pinned to a shared core."""

from __future__ import annotations

import asyncio
import os
from itertools import permutations
from pathlib import Path

import psutil
import pytest

from penstock.core.errors import PenstockError
from penstock.live.http.client import HttpClient
from penstock.live.local.install import find_python, inspect
from penstock.live.local.launch import LocalFleet
from tests.live.engines import BLOCK, MODEL, Engines, alive, call, gauges

GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


def prompt(seed: int, tokens: int) -> list[int]:
    """Varied bytes, unlike those of other seeds from the first block on."""
    return [seed, *((seed * 7 + i * 37 + i // 5) % 250 for i in range(tokens - 1))]


async def generate(client: HttpClient, url: str, tokens: list[int], count: int, **more: object) -> list[int]:
    answer = await call(client, url, "/v1/completions", prompt=tokens, max_tokens=count, **GREEDY, **more)
    ids: list[int] = answer["choices"][0]["token_ids"]
    assert len(ids) == count
    return ids


def processes(engines: Engines, index: int) -> list[psutil.Process]:
    first = psutil.Process(engines.fleet.engines[index].pid)
    return [first, *first.children(recursive=True)]


def test_they_serve_their_model(engines: Engines) -> None:
    async def work() -> None:
        client = HttpClient()
        for url in engines.urls:
            assert await alive(client, url)
            models = await client.fetch(url, "GET", "/v1/models")
            assert f'"id":"{MODEL}"'.encode() in models.body
            chat = await call(
                client,
                url,
                "/v1/chat/completions",
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=4,
                **GREEDY,
            )
            assert bytes(chat["prompt_token_ids"][1:8]) == b"user\nHi"  # a token is a byte
        await client.close()

    asyncio.run(work())


def test_greedy_output_is_equal_and_varied(engines: Engines) -> None:
    async def work() -> None:
        client = HttpClient()
        for seed in range(3):
            tokens = prompt(seed, 100)
            outputs = [await generate(client, url, tokens, 80) for url in engines.urls]
            assert outputs[0] == outputs[1] == outputs[2]
            assert len(set(outputs[0])) > 20
            # One early byte changes all that follows, so one wrong KV block would show.
            other = await generate(client, engines.urls[0], [tokens[0], tokens[1] ^ 1, *tokens[2:]], 80)
            assert other != outputs[0]
        await client.close()

    asyncio.run(work())


@pytest.mark.parametrize("length", [2 * BLOCK, 5 * BLOCK + 1, 300, 1000])
def test_prefill_here_decode_there_is_identical_and_frees_the_source(engines: Engines, length: int) -> None:
    async def work() -> None:
        client = HttpClient()
        for pair, (source, target) in enumerate(permutations(engines.urls, 2)):
            tokens = prompt(100 + pair, length)
            prefill = await call(
                client,
                source,
                "/v1/completions",
                prompt=tokens,
                max_tokens=1,
                kv_transfer_params={"do_remote_decode": True},
                **GREEDY,
            )
            params = prefill["kv_transfer_params"]
            assert len(params["remote_block_ids"][0]) == -(-length // BLOCK)
            assert (await gauges(client, source))["kv_cache_usage_perc"] > 0  # pinned until it is fetched
            moved = await generate(client, target, tokens, 50, kv_transfer_params=params)
            third = next(url for url in engines.urls if url not in (source, target))
            assert moved == await generate(client, third, tokens, 50)
        await engines.idle(client, 5.0)  # long before a lease would end
        await client.close()

    asyncio.run(work())


def test_a_client_that_leaves_frees_its_request(engines: Engines) -> None:
    class Sink:
        def __init__(self) -> None:
            self.bytes = asyncio.Event()

        def on_head(self, head: object) -> None: ...

        def on_body(self, data: bytes) -> None:
            self.bytes.set()

        def on_end(self) -> None: ...

        def on_fault(self, fault: object) -> None: ...

    async def work() -> None:
        client, sink, url = HttpClient(), Sink(), engines.urls[0]
        body = b'{"model":"penstock-noise","prompt":"Hello","max_tokens":4000,"ignore_eos":true,"stream":true}'
        stream = client.open(url, "POST", "/v1/completions", sink, {"Content-Type": "application/json"}, body)
        await asyncio.wait_for(sink.bytes.wait(), 30)
        stream.abort()
        await engines.idle(client, 5.0)
        await client.close()

    asyncio.run(work())


def test_all_threads_may_use_all_cores_and_none_spins(engines: Engines) -> None:
    """Stock vLLM pins the worker to one core and NIXL spins at two thirds of a core: the connector's two remedies."""

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for index in range(3) for process in processes(engines, index))

    async def work() -> float:
        client = HttpClient()
        await engines.idle(client)
        await client.close()
        before = used()
        await asyncio.sleep(4)
        return (used() - before) / 4

    cores = os.sched_getaffinity(0)
    for index in range(3):
        members = processes(engines, index)
        assert len(members) >= 2  # the API server and the engine core
        for process in members:
            for thread in os.listdir(f"/proc/{process.pid}/task"):
                assert os.sched_getaffinity(int(thread)) == cores, (process.name(), thread)
    assert asyncio.run(work()) < 0.66  # of a core, for three engines together: less than one would spin away


def test_kill_suspend_and_restart(engines: Engines) -> None:
    async def work() -> None:
        client = HttpClient(connect_s=1.0)
        engine = engines.fleet.engines[2]
        engine.suspend()
        try:
            assert not await alive(client, engine.url)
        finally:
            engine.resume()
        assert await alive(client, engine.url)
        tokens = prompt(200, 90)
        before = await generate(client, engine.url, tokens, 20)

        members = processes(engines, 2)
        engine.kill9()
        await engine.gone()
        assert not any(process.is_running() for process in members)
        assert not await alive(client, engine.url)

        await engines.restart(2)
        assert await generate(client, engine.url, tokens, 20) == before
        await engines.idle(client)
        await client.close()

    asyncio.run(work())


def test_the_server_alone_killed_takes_its_workers_along(engines: Engines) -> None:
    async def work() -> None:
        engine = engines.fleet.engines[1]
        members = processes(engines, 1)
        assert len(members) >= 2  # the API server and the engine core
        members[0].kill()
        await engine.gone()
        assert not any(process.is_running() for process in members)
        await engines.restart(1)

    asyncio.run(work())


def test_a_wrong_model_is_one_clear_line(engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Nonsense"], "model_type": "nonsense"}')
    fleet = LocalFleet(inspect(find_python()), model=str(tmp_path), count=1, log_folder=tmp_path / "logs")
    with pytest.raises(PenstockError, match=r"did not start: .*nonsense"):
        asyncio.run(fleet.start())
    assert not fleet.engines[0].alive
