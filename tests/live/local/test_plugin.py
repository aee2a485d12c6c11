"""The plugin in real engines: the stream, hand-off, pre-copy, holds, predictions, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import uuid
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from penstock.live.http.client import HttpClient
from penstock.live.local.install import find_python
from penstock.live.local.noise import noise_model
from penstock.live.plugin.penstock_engine.messages import PROTOCOL, Answer
from random_head import random_head
from tests.live.engines import BLOCK, Engines, call, gauges
from tests.live.plugin.peer import Peer

GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
_PULLED = re.compile(r"^vllm:external_prefix_cache_hits_total\{[^}]*\} (\S+)$", re.M)
_LATE = re.compile(
    r"^vllm:nixl_num_(?:kv_expired_reqs|notifications_after_expiry|failed_transfers)_total\{[^}]*\} (\S+)$", re.M
)


class Scene:
    """Two engines with a client and a peer each."""

    def __init__(self, engines: Engines, client: HttpClient, here: Peer, there: Peer) -> None:
        self.engines, self.client, self.here, self.there = engines, client, here, there
        self.source, self.target = engines.urls[:2]

    async def generate(self, url: str, tokens: list[int], count: int, name: str = "", **more: Any) -> list[int]:
        body = {"prompt": tokens, "max_tokens": count, "request_id": name or uuid.uuid4().hex} | GREEDY | more
        ids: list[int] = (await call(self.client, url, "/v1/completions", **body))["choices"][0]["token_ids"]
        return ids

    async def start(self, tokens: list[int], count: int, known: int) -> tuple[str, asyncio.Task[list[int]]]:
        """A request on the source that has ``known`` output tokens by now."""
        name = uuid.uuid4().hex
        task = asyncio.create_task(self.generate(self.source, tokens, count, name))
        await self.here.until(name, known)
        return name, task

    async def pulled(self) -> float:
        """Tokens whose KV the target has pulled since its start."""
        return float(_PULLED.findall(await self.metrics(self.target))[0])

    async def metrics(self, url: str) -> str:
        return (await self.client.fetch(url, "GET", "/metrics")).body.decode()

    async def late(self) -> list[str]:
        """Counters of NIXL that say that KV was read or freed at the wrong time."""
        found = [count for url in self.engines.urls for count in _LATE.findall(await self.metrics(url))]
        assert len(found) >= 2 * len(self.engines.urls)
        return found


def on(engines: Engines, work: Callable[[Scene], Awaitable[None]]) -> None:
    """Run a test; afterwards no engine has anything left, and NIXL counts nothing that was late."""

    async def whole() -> None:
        client = HttpClient()
        async with Peer(engines.plugins[0]) as here, Peer(engines.plugins[1]) as there:
            scene = Scene(engines, client, here, there)
            before = await scene.late()
            await work(scene)
            await engines.idle(client, 15.0)  # below the lease: nothing may have to wait for it
            assert await scene.late() == before
        await client.close()

    asyncio.run(whole())


def prompt(tokens: int) -> list[int]:
    """Tokens unlike those of other tests from the first on."""
    return [10 + byte % 200 for byte in np.random.default_rng().bytes(tokens)]


def test_an_idle_engine_answers(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        hello = await scene.here.ask("hello")
        assert hello.protocol == PROTOCOL
        assert hello.vllm.startswith("0.32")
        assert hello.abilities == ("handoff", "precopy", "predict")
        assert hello.predictor == "random"
        assert hello.quantiles == (0.1, 0.5, 0.9)
        assert (await scene.here.ask("handoff", "absent")).error == "no such request: the engine is idle"
        assert "not a command" in (await scene.here.raw(b"\xc1")).error

    on(engines, work)


def test_steps_tell_the_lengths_and_free_blocks(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        tokens = prompt(70)
        name, task = await scene.start(tokens, 60, 0)
        assert len(await task) == 60
        await scene.engines.idle(scene.client)
        await asyncio.sleep(0.1)
        steps = scene.here.steps
        seen = [(step, one) for step in steps for one in step.running if name in one.id]
        assert [one.output_tokens for _, one in seen] == list(range(60))
        for step, one in seen:
            assert one.prompt_tokens == 70
            assert one.computed_tokens == (70 + one.output_tokens - 1 if one.output_tokens else 0)
            used = -(-(70 + one.output_tokens) // BLOCK)
            assert step.total_blocks - step.free_blocks == used
            assert step.waiting == 0
        numbers = [step.number for step, _ in seen]
        assert numbers == list(range(numbers[0], numbers[0] + 60))  # none was lost
        assert all(0 < step.step_s < 5 for step, _ in seen[1:])
        assert steps[-1].running == []
        assert steps[-1].free_blocks == steps[-1].total_blocks

    on(engines, work)


async def continued(scene: Scene, tokens: list[int], answer: Answer, had: list[int], count: int) -> list[int]:
    """Let the target finish what was handed off."""
    assert not answer.error
    assert answer.tokens == len(tokens) + len(had)
    rest = count - len(had)
    return had + await scene.generate(scene.target, tokens + had, rest, kv_transfer_params=answer.params)


def test_a_handoff_changes_no_token(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        for length in (33, 64, 95):
            tokens = prompt(length)
            expected = await scene.generate(engines.urls[2], tokens, 400)
            name, task = await scene.start(tokens, 400, 20)
            before = await scene.pulled()
            answer = await scene.here.ask("handoff", name)
            had = await task
            assert len(had) < 400
            assert await continued(scene, tokens, answer, had, 400) == expected
            assert await scene.pulled() - before == answer.tokens - 1  # all but the one that is computed again

    on(engines, work)


def test_cuts_at_many_places_of_a_block(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        tokens = prompt(40)
        expected = await scene.generate(engines.urls[2], tokens, 640)

        async def one(cut: int) -> int:
            name, task = await scene.start(tokens, 600, cut)
            answer = await scene.here.ask("handoff", name)
            had = await task
            assert await continued(scene, tokens, answer, had, len(had) + 40) == expected[: len(had) + 40]
            return answer.tokens % BLOCK

        cuts = [at for first in range(0, 32, 4) for at in await asyncio.gather(*(one(first + i) for i in range(4)))]
        assert len(set(cuts)) > 10

    on(engines, work)


def test_precopy_leaves_little_for_the_handoff(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        for _ in range(3):
            tokens = prompt(700)
            expected = await scene.generate(engines.urls[2], tokens, 600)
            name, task = await scene.start(tokens, 600, 30)
            held = await scene.here.ask("hold", name)
            assert not held.error
            assert held.tokens % BLOCK == 0
            assert held.tokens >= 700
            sofar = (tokens + expected)[: held.tokens]
            assert len(await scene.generate(scene.target, sofar, 1, kv_transfer_params=held.params)) == 1
            before = await scene.pulled()
            answer = await scene.here.ask("handoff", name)
            had = await task
            assert await continued(scene, tokens, answer, had, 600) == expected
            # What the source decoded during the first pull, and at most two blocks.
            assert await scene.pulled() - before <= 2 * BLOCK + answer.tokens - held.tokens
            assert await scene.pulled() - before < 700

    on(engines, work)


def test_a_puller_with_the_plugin_may_send_more_or_less_than_was_held(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        for difference in (-100, -BLOCK, 1, BLOCK, 45):
            tokens = prompt(300)
            expected = await scene.generate(engines.urls[2], tokens, 300)
            name, task = await scene.start(tokens, 300, 5)
            held = await scene.here.ask("hold", name)
            whole = (tokens + expected)[: held.tokens + difference]
            before = await scene.pulled()
            after = await scene.generate(scene.target, whole, 20, kv_transfer_params=held.params)
            assert await scene.pulled() - before == min(held.tokens, len(whole))
            assert after == (tokens + expected)[len(whole) : len(whole) + 20] or len(whole) < 300
            assert await scene.generate(engines.urls[2], whole, 20) == after
            assert await task == expected

    on(engines, work)


def test_a_hold_outlives_its_request(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        tokens = prompt(200)
        expected = await scene.generate(engines.urls[2], tokens, 340)
        name, task = await scene.start(tokens, 300, 10)
        held = await scene.here.ask("hold", name)
        assert not held.error
        assert await task == expected[:300]
        # Whatever else the source does, nobody overwrites these blocks.
        await asyncio.gather(*(scene.generate(scene.source, prompt(3000), 2) for _ in range(11)))
        assert (await gauges(scene.client, scene.source))["kv_cache_usage_perc"] > 0
        before = await scene.pulled()
        whole = tokens + expected[:300]
        rest = await scene.generate(scene.target, whole, 40, kv_transfer_params=held.params)
        assert rest == expected[300:]
        assert await scene.pulled() - before == held.tokens

    on(engines, work)


def test_release_by_command(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        name, task = await scene.start(prompt(200), 400, 10)
        held = await scene.here.ask("hold", name)
        again = await scene.here.ask("hold", name)
        assert held.hold != again.hold
        assert (await scene.here.ask("release", again.hold)).error == ""
        await task
        await asyncio.sleep(0.2)
        assert (await gauges(scene.client, scene.source))["kv_cache_usage_perc"] > 0
        assert (await scene.here.ask("release", held.hold)).error == ""
        await scene.engines.idle(scene.client, 5.0)
        assert "no such" in (await scene.here.ask("release", held.hold)).error
        # KV of a hand-off that nobody wants any more.
        name, task = await scene.start(prompt(100), 400, 10)
        assert not (await scene.here.ask("handoff", name)).error
        await task
        assert (await scene.here.ask("release", name)).error == ""
        await scene.engines.idle(scene.client, 5.0)

    on(engines, work)


def test_what_cannot_be_handed_off(engines: Engines) -> None:
    async def work(scene: Scene) -> None:
        name, task = await scene.start(prompt(50), 200, 1)
        assert (await scene.here.ask("handoff", "absent")).error == "no such request"
        assert "unknown command" in (await scene.here.ask("stop", name)).error
        first, second = await asyncio.gather(scene.here.ask("handoff", name), _soon(scene, name))
        assert not first.error
        assert second.error
        await task
        assert not (await scene.here.ask("release", name)).error
        # One that ends by itself with its next token keeps nothing.
        guided = {"structured_outputs": {"regex": "a{150}"}}
        name = uuid.uuid4().hex
        task = asyncio.create_task(scene.generate(scene.source, prompt(50), 150, name, **guided))
        await scene.here.until(name, 1)
        assert (await scene.here.ask("handoff", name)).error == "the request has structured output"
        await task
        body = {"prompt": prompt(50), "max_tokens": 150, "n": 2, "request_id": name} | GREEDY | {"temperature": 1}
        both = asyncio.create_task(call(scene.client, scene.source, "/v1/completions", **body))
        await scene.here.until(name, 1)
        assert (await scene.here.ask("handoff", name)).error == "several requests"
        assert (await scene.here.ask("handoff", f"0_cmpl-{name}")).error == "the request has several choices"
        await both

    on(engines, work)


async def _soon(scene: Scene, name: str) -> Answer:
    async with Peer(scene.engines.plugins[0]) as other:
        return await other.ask("handoff", name)


def test_predictions_are_those_of_the_model_and_the_head(engines: Engines, tmp_path: Path) -> None:
    model = noise_model()
    head = random_head(tmp_path, model)  # the same as the engines have
    tokens = prompt(60)
    found: dict[str, Any] = {}

    async def work(scene: Scene) -> None:
        name, task = await scene.start(tokens, 90, 0)
        found["output"] = await task
        await scene.engines.idle(scene.client)
        await asyncio.sleep(0.1)
        found["predictions"] = list(scene.here.predictions(name))
        earlier = uuid.uuid4().hex
        await scene.generate(scene.source, tokens, 5, earlier, vllm_xargs={"penstock_output_tokens": 500})
        await scene.generate(scene.source, prompt(40), 1)  # a step more, which carries what the last one found
        found["later"] = list(scene.here.predictions(earlier))

    on(engines, work)
    question = json.dumps([str(model), tokens + found["output"]])
    script = Path(__file__).with_name("states.py")
    answer = subprocess.run([find_python(), script], input=question, capture_output=True, text=True, check=True)
    states = np.array(json.loads(answer.stdout), dtype=np.float32)
    predictions = found["predictions"]
    at = [one.output_tokens for one in predictions]
    assert at[0] == 0
    assert [late - early for early, late in pairwise(at[1:])] == [20] * (len(at) - 2)
    assert len(at) >= 5
    counts = np.array(at)
    expected = head.remaining(states[len(tokens) - 1 + counts], counts)
    np.testing.assert_allclose([one.remaining for one in predictions], expected, rtol=2e-3, atol=1e-3)
    carried = head.remaining(states[[len(tokens) - 1]], np.array([500]))
    assert found["later"][0].output_tokens == 0
    np.testing.assert_allclose([found["later"][0].remaining], carried, rtol=2e-3, atol=1e-3)


def test_a_head_for_another_model_is_refused_and_the_engine_serves(engines: Engines) -> None:
    card = engines.head / "head.json"
    right = card.read_text()
    log = engines.fleet.log_folder / "engine-2.log"

    async def work() -> None:
        client = HttpClient()
        async with Peer(engines.plugins[2]) as peer:
            hello = await peer.ask("hello")
            assert hello.abilities == ("handoff", "precopy")
            assert not hello.predictor
            before = len(peer.steps)
            body = {"prompt": prompt(40), "max_tokens": 25} | GREEDY
            answer = await call(client, engines.urls[2], "/v1/completions", **body)
            assert len(answer["choices"][0]["token_ids"]) == 25
            await asyncio.sleep(0.1)
            assert sum(len(step.running) for step in peer.steps[before:]) == 25
            assert not any(step.predictions for step in peer.steps[before:])
        await client.close()

    try:
        card.write_text(json.dumps(json.loads(right) | {"model": "0123456789abcdef"}))
        asyncio.run(engines.restart(2))
        lines = re.findall("Penstock serves without predictions: predictor random is for model 0.*", log.read_text())
        assert len(lines) == 2  # of scheduler and worker, in one process here
        asyncio.run(work())
    finally:
        card.write_text(right)
        asyncio.run(engines.restart(2))
