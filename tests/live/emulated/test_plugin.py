"""The emulated engine's plugin, spoken to without a gateway: what it pins, for how long, and what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq

from penstock.live.emulated.settings import EmulatedSettings, plan
from penstock.live.link import Link, LinkError
from penstock.live.plugin.penstock_engine.messages import Answer, Command, Prediction

from .support import Bench, Stream, bench, expected, run, settings, spec

PROMPT = [i * 7 % 251 for i in range(45)]


@asynccontextmanager
async def linked(b: Bench, *engines: int) -> AsyncIterator[list[Link]]:
    """Links to these engines, greeted."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    links = []
    for i in engines:
        address = b.fleet.plugins[i]
        assert address is not None
        links.append(Link(context, address))
        await links[-1].greet()
    try:
        yield links
    finally:
        for link in links:
            link.close()
        context.destroy(linger=0)


async def fresh(link: Link) -> None:
    """Wait for a message."""
    async with asyncio.timeout(10):
        while link.step is None or not link.fresh():
            await asyncio.sleep(0.005)


async def refused(link: Link, op: str, name: str) -> str:
    with pytest.raises(LinkError) as caught:
        await link.ask(Command(op, name), 5.0)
    return str(caught.value)


def name_of(stream: Stream) -> str:
    return str(stream.chunks[0]["id"])


@pytest.mark.parametrize("extra", range(16))
def test_handed_off_at_every_offset_of_a_block(extra: int) -> None:
    async def main() -> None:
        async with bench(2) as b, linked(b, 0) as (link,):
            prompt = PROMPT + [3] * extra
            source = b.stream(0, prompt, 2000)
            await source.reached(5)
            answer = await link.ask(Command("handoff", name_of(source)), 5.0)
            await source.over()
            assert source.chunks[-1]["choices"][0]["finish_reason"] == "length"
            assert source.ids == expected(prompt, len(source.ids)) and len(source.ids) < 2000
            assert answer.tokens == len(prompt) + len(source.ids)
            assert b.fleet.integrity()[0] == "instance 0: 1 requests pinned"
            params = fitted(answer, answer.tokens)
            rest = await b.stream(1, prompt + source.ids, 30, kv_transfer_params=params).over()
            assert source.ids + rest.ids == expected(prompt, len(source.ids) + 30)
            assert await b.metric(1, "vllm:external_prefix_cache_hits_total") > 0

    run(main())


def fitted(answer: Answer, tokens: int) -> dict[str, Any]:
    """The claim with as many blocks as that many tokens take."""
    assert answer.params is not None
    params: dict[str, Any] = dict(answer.params)
    (blocks,) = params["remote_block_ids"]
    wanted = -(-tokens // 16)
    return {**params, "remote_block_ids": [(blocks + blocks[-1:])[:wanted]]}


def test_a_hold_survives_its_request_and_a_copy_leaves_little_to_pull() -> None:
    async def main() -> None:
        async with bench(2) as b, linked(b, 0) as (link,):
            source = b.stream(0, PROMPT, 2000)
            await source.reached(60)
            held = await link.ask(Command("hold", name_of(source)), 5.0)
            assert held.tokens % 16 == 0 and held.tokens >= 96 and held.hold
            tokens = PROMPT + expected(PROMPT, 2000)
            await b.ids(1, tokens[: held.tokens], 1, kv_transfer_params=fitted(held, held.tokens))
            pulled = b[1].driver.counters.bytes_pulled
            assert pulled == held.tokens * 100.0
            assert len(b[0].transfers.pins) == 0  # it ended with the pull
            answer = await link.ask(Command("handoff", name_of(source)), 5.0)
            await source.over()
            got = len(source.ids)
            params = fitted(answer, answer.tokens)
            rest = await b.stream(1, PROMPT + source.ids, 20, kv_transfer_params=params).over()
            assert source.ids + rest.ids == expected(PROMPT, got + 20)
            final = (b[1].driver.counters.bytes_pulled - pulled) / 1600.0
            assert final <= 2 + (answer.tokens - held.tokens) // 16

    run(main())


def test_a_held_request_may_end_and_its_blocks_stay_until_they_are_released() -> None:
    async def main() -> None:
        async with bench(1) as b, linked(b, 0) as (link,):
            source = b.stream(0, PROMPT, 400)
            await source.reached(5)
            held = await link.ask(Command("hold", name_of(source)), 5.0)
            blocks = held.tokens // 16
            source.call.abort()
            await asyncio.sleep(0.05)
            assert b.fleet.integrity() == [
                "instance 0: 1 requests pinned",
                f"instance 0: {blocks} blocks in use",
                f"instance 0: {blocks} cached blocks still referenced",
            ]
            assert await refused(link, "release", "hold-77") == "there is no hold hold-77"
            await link.ask(Command("release", held.hold), 5.0)
            assert b.fleet.integrity() == []
            assert "no hold" in await refused(link, "release", held.hold)

    run(main())


@pytest.mark.parametrize("op", ["hold", "handoff"])
def test_what_nobody_pulls_goes_with_its_lease(op: str) -> None:
    async def main() -> None:
        async with bench(1, lease_s=0.2) as b, linked(b, 0) as (link,):
            source = b.stream(0, PROMPT, 1000)
            await source.reached(5)
            await link.ask(Command(op, name_of(source)), 5.0)
            await source.over()
            await b.fleet.idle(5)
            assert b.fleet.integrity() == []
            assert b[0].driver.counters.expired == 1

    run(main())


def test_a_released_hold_lets_a_waiting_request_in() -> None:
    """All blocks are held or in use: whoever waits for them is looked at again when they come free."""

    async def main() -> None:
        async with bench(1, instance=spec(blocks=12), max_model_len=160) as b, linked(b, 0) as (link,):
            source = b.stream(0, PROMPT, 100)
            await source.reached(40)
            held = await link.ask(Command("hold", name_of(source)), 5.0)
            source.call.abort()
            waiting = b.stream(0, [9] * 140, 4)
            await asyncio.sleep(0.1)
            assert waiting.ids == []
            await link.ask(Command("release", held.hold), 5.0)
            assert (await waiting.over()).ids == expected([9] * 140, 4)

    run(main())


def test_what_cannot_be_done_is_refused() -> None:
    async def main() -> None:
        async with bench(1) as b, linked(b, 0) as (link,):
            for op in ("handoff", "hold"):
                assert "no running request" in await refused(link, op, "nobody")
            assert "no command" in await refused(link, "dance", "")
            long, short = b.stream(0, PROMPT, 2000), b.stream(0, [1, 2, 3], 2000)
            await long.reached(3)
            await short.reached(3)
            assert "or several" in await refused(link, "handoff", "cmpl-")
            twice = [link.ask(Command("handoff", name_of(long)), 5.0) for _ in range(2)]
            done, again = await asyncio.gather(*twice, return_exceptions=True)
            assert isinstance(done, Answer) and done.tokens > len(PROMPT)
            assert isinstance(again, LinkError)
            await long.over()
            assert done.params is not None
            short.call.abort()
            b[0].transfers.drop(str(done.params["remote_request_id"]))

    run(main())


def test_a_client_that_goes_away_during_a_handoff_leaves_nothing() -> None:
    async def main() -> None:
        async with bench(1, lease_s=0.3) as b, linked(b, 0) as (link,):
            for steps in range(6):
                source = b.stream(0, PROMPT, 200)
                await source.reached(3 + steps)
                asked = asyncio.create_task(link.ask(Command("handoff", name_of(source)), 5.0))
                await asyncio.sleep(0.0003 * steps)
                source.call.abort()
                await asyncio.gather(asked, return_exceptions=True)
                assert asked.done()
            await b.fleet.idle(5)
            assert b.fleet.integrity() == []

    run(main())


def test_preempted_before_it_could_stop() -> None:
    """A request that loses its blocks after the order stops with the token that it yields when it is computed again."""

    async def main() -> None:
        async with bench(2, instance=spec(blocks=14), max_model_len=200, speed=0.2) as b, linked(b, 0) as (link,):
            first = b.stream(0, PROMPT, 110)
            await first.reached(2)
            second = b.stream(0, PROMPT[::-1], 130)
            await second.reached(20)
            answer = await link.ask(Command("handoff", name_of(second)), 10.0)
            await second.over()
            assert second.ids == expected(PROMPT[::-1], len(second.ids))
            sequence = PROMPT[::-1] + second.ids
            assert answer.tokens == len(sequence)
            rest = await b.stream(1, sequence, 5, kv_transfer_params=fitted(answer, len(sequence))).over()
            assert rest.ids == expected(sequence, 5)
            assert (await first.over()).ids == expected(PROMPT, 110)

    run(main())


def test_the_stream_tells_of_load_and_falls_silent_with_the_engine() -> None:
    async def main() -> None:
        async with bench(1, stream_s=0.01) as b, linked(b, 0) as (link,):
            assert link.hello is not None and set(link.hello.abilities) == {"handoff", "precopy", "predict"}
            streams = [b.stream(0, [7 + i, *PROMPT], 400) for i in range(3)]
            for stream in streams:
                await stream.reached(5)
            await fresh(link)
            step = link.step
            assert step is not None and len(step.running) == 3
            assert {r.id.partition("-0-")[0] for r in step.running} == {name_of(s) for s in streams}
            assert all(r.prompt_tokens == 46 and r.computed_tokens == 45 + r.output_tokens for r in step.running)
            assert step.total_blocks == 400 and step.free_blocks < 400
            assert 0.0005 < link.step_s < 0.01
            for stream in streams:
                await stream.over()
            await asyncio.sleep(0.1)
            last = link.step
            assert last is not None and last.running == [] and last.free_blocks == 400
            await asyncio.sleep(0.1)
            assert link.step is last

    run(main())


def test_no_plugin_where_it_is_not_wanted() -> None:
    async def main() -> None:
        async with bench(1, plugin=False) as b:
            assert b.fleet.plugins == [None]
        async with bench(1, predict=False) as b, linked(b, 0) as (link,):
            assert link.hello is not None and "predict" not in link.hello.abilities and link.median == -1
        async with bench(1, instance=spec(prefix_caching=False)) as b, linked(b, 0) as (link,):
            assert link.hello is not None and link.hello.abilities == ("handoff", "predict")

    run(main())


@pytest.mark.parametrize("mean_output", [0, 60])
def test_predictions_are_right_up_to_the_error_asked_for(mean_output: int) -> None:
    """With no error at all every quantile is the true remaining length, also where the sequence ends by itself."""

    async def main() -> None:
        async with bench(1, sigma_first=0.0, mean_output=mean_output, stream_s=0.005) as b, linked(b, 0) as (link,):
            found: list[Prediction] = []
            link.watch("cmpl-", found.append)
            streams = [await b.stream(0, [5 + i, *PROMPT], 150).over() for i in range(4)]
            await asyncio.sleep(0.05)
            for i in range(40):
                if len(found) >= 4:
                    break
                streams.append(await b.stream(0, [99 + i, *PROMPT], 150).over())
            await asyncio.sleep(0.05)
            assert len(found) >= 4
            lengths = {name_of(s): len(s.ids) for s in streams}
            if mean_output:
                assert min(lengths.values()) < 150
            for p in found:
                assert p.remaining == (float(lengths[p.id.partition("-0-")[0]] - p.output_tokens),) * 5

    run(main())


def test_settings_that_mean_nothing_are_refused() -> None:
    from penstock.core.errors import PenstockError

    for wrong in ({"stream_s": 0.0}, {"sigma_first": -1.0}, {"halving_tokens": 0.0}, {"seed": -1}):
        with pytest.raises(PenstockError):
            plan(settings(**wrong))
    assert plan(EmulatedSettings()).settings.plugin
