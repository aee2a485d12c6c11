"""Moves with the help of a plugin: what can go wrong between the order to stop and the target's first token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.core.events import MoveOrdered
from penstock.core.types import MigrationLevel, Role
from penstock.live import health
from penstock.live.carried import CarriedSession
from penstock.live.emulated.vocabulary import EOS
from penstock.live.instance import Abilities, best_level
from penstock.live.moves import handoff
from penstock.live.serve import EngineAddress
from tests.live.answers import CHAT, WATCHFUL, current, more, order, other, quick, text_of, until
from tests.live.emulated.support import expected
from tests.live.support import PDD, Stream, bench, ids, run

HANDOFF, PRECOPY = MigrationLevel.HANDOFF, MigrationLevel.PRECOPY
BOTH = pytest.mark.parametrize("level", [HANDOFF, PRECOPY], ids=["handoff", "precopy"])


def body_of(prompt: list[int], count: int, **further: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True, **further}


async def checked(stream: Stream, prompt: list[int], count: int) -> None:
    """The stream is complete and right."""
    async with asyncio.timeout(20):
        await stream.over.wait()
    assert stream.fault is None and stream.done, stream.raw[-300:]
    assert stream.ids == expected(prompt, count)
    assert stream.text == text_of(prompt, count)
    assert stream.finish == "length"


def impatient(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> None:
    """Give plugins no more time than that."""
    monkeypatch.setattr(handoff, "LEAST_PATIENCE_S", seconds)
    monkeypatch.setattr(handoff, "PATIENCE_STEPS", 0.0)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances that are well again are taken back at once, and those that do not answer are given up sooner."""
    monkeypatch.setattr(health, "RECOVERY_S", 0.05)
    monkeypatch.setattr(health, "PROBE_S", 0.2)
    monkeypatch.setattr(health, "SECOND_PROBE_S", 0.2)


# -- what is gained ---------------------------------------------------------------------------------------------------


@BOTH
def test_the_kv_is_pulled_and_not_computed_again(level: MigrationLevel) -> None:
    """All but a block and the last token come from the source, and a pre-copy leaves little for the pause."""

    async def work() -> None:
        async with bench(engine=quick(0.004), roles=PDD) as b:
            prompt = ids(600)
            stream = b.stream(body_of(prompt, 150))
            await stream.tokens(20)
            target = other(b.session(stream))
            counters = b.fleet.engines[target].driver.counters
            before = counters.pulls, counters.bytes_pulled
            assert await order(b, stream, target, level)
            pulls, pulled = counters.pulls - before[0], (counters.bytes_pulled - before[1]) / 1600.0
            assert pulls == (2 if level == PRECOPY else 1)
            assert 38 <= pulled <= 48  # blocks of 16 tokens of 100 bytes, none of them twice
            if level == PRECOPY:
                assert counters.prefix_hits >= 600 // 16 * 16
            await checked(stream, prompt, 150)
            await b.settled()
            assert b.world.metrics.migrations == {(level.name.lower(), "ordered", "done"): 1}
            await until(lambda: len(b.world.claims) == 0)

    run(work)


def test_the_last_pull_is_short_however_long_tokens_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks and what was decoded during the first pull: gathering comes before it."""

    async def slowly(move: handoff.Handoff) -> None:
        for _ in range(60):
            move._token.clear()
            await move._token.wait()

    monkeypatch.setattr(handoff.Handoff, "_gathered", slowly)

    async def work() -> None:
        async with bench(engine=quick(0.004), roles=PDD) as b:
            prompt = ids(100)
            stream = b.stream(body_of(prompt, 200))
            await stream.tokens(5)
            assert await order(b, stream, level=PRECOPY)
            ((left, meanwhile),) = b.world.metrics.last_pulls
            assert 0 < left <= 2 * 16 + meanwhile
            await checked(stream, prompt, 200)
            await b.settled()

    run(work)


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
@BOTH
def test_answers_that_are_not_streamed_move_too(level: MigrationLevel, path: str) -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            b.world.controller.migration_level = level
            kind = {"prompt": "Some text"} if path != CHAT else {"messages": [{"role": "user", "content": "Some text"}]}
            body = {**kind, "max_tokens": 300, "temperature": 0}
            unmoved = await b.post(body, path)
            moving = asyncio.create_task(b.post(body, path))
            await until(lambda: any(s.stage == "decoding" for s in b.world.sessions.values()))
            (session,) = b.world.sessions.values()
            b.world.tell(MoveOrdered(session.request, other(session)))  # type: ignore[arg-type]
            moved = await moving
            assert session.moves == 1
            assert moved.body.partition(b'"choices"')[2] == unmoved.body.partition(b'"choices"')[2]
            await b.settled()

    run(work)


def test_served_in_place_and_moved_from_the_first_engine() -> None:
    """On mixed instances the first engine was asked with the client's own words, without a limit in tokens."""

    async def work() -> None:
        async with bench(engine=quick(0.003, max_model_len=400), roles=(Role.MIXED,) * 3, policy="mixed") as b:
            for level in (HANDOFF, PRECOPY):
                body = {"messages": [{"role": "user", "content": "Some text"}], "temperature": 0}
                unmoved = await b.whole(body, CHAT)
                stream = b.stream(body, CHAT)
                await stream.tokens(10)
                assert await order(b, stream, (b.session(stream).where + 1) % 3, level)
                await stream.over.wait()
                assert stream.text == unmoved.text and stream.finish == "length"
            await b.settled()

    run(work)


# -- the last token ---------------------------------------------------------------------------------------------------


@BOTH
def test_ordered_at_every_one_of_the_last_tokens(level: MigrationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop meets the limit of the request: that very token may be its last, and then nothing moves."""
    monkeypatch.setattr("penstock.live.moves.LAST_TOKENS", 0)
    monkeypatch.setattr(handoff, "LAST_TOKENS", 0)
    monkeypatch.setattr(handoff.Handoff, "_gather", lambda self: None)

    async def work() -> None:
        async with bench(engine=quick(0.004), roles=PDD) as b:
            b.world.controller.migration_level = level

            async def one(left: int, seed: int) -> None:
                prompt = ids(30, seed)
                stream = b.stream(body_of(prompt, 40))
                await stream.tokens(40 - left)
                session = current(b, stream)
                if session is not None:
                    b.world.tell(MoveOrdered(session.request, other(session)))
                await checked(stream, prompt, 40)

            await asyncio.gather(*(one(left, seed) for left in range(1, 9) for seed in range(6)))
            await b.settled()
            await until(lambda: len(b.world.claims) == 0)

    run(work)


@BOTH
def test_an_end_at_the_very_token(level: MigrationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that end by themselves, moved all the time: some end just where they were to stop."""
    monkeypatch.setattr(handoff.Handoff, "_gather", lambda self: None)

    async def work() -> None:
        async with bench(engine=quick(0.003, mean_output=60), roles=PDD) as b:
            b.world.controller.migration_level = level

            async def one(seed: int) -> None:
                body = body_of(ids(20, seed), 300)
                unmoved = await b.whole(body)
                stream = b.stream(body)
                await stream.tokens(1)
                while not stream.over.is_set():
                    session = current(b, stream)
                    if session is not None:
                        b.world.tell(MoveOrdered(session.request, other(session)))
                    await more(stream)
                assert (stream.ids, stream.text, stream.finish) == (unmoved.ids, unmoved.text, unmoved.finish)
                assert stream.finish == "length" or stream.ids[-1] == EOS

            await asyncio.gather(*(one(seed) for seed in range(48)))
            await b.settled()
            assert b.world.metrics.migrations[level.name.lower(), "ordered", "done"] > 0

    run(work)


@BOTH
def test_stop_strings_and_characters_across_a_move(level: MigrationLevel) -> None:
    """A stop string that spans the cut is found; a cut within a character loses none of it."""

    async def work() -> None:
        async with bench(engine=quick(0.006), roles=PDD) as b:
            found = 0
            for seed in range(12):
                prompt = ids(33, seed)
                text = text_of(prompt, 200)
                stop = text[60:66]
                cut = text.find(stop)
                stream = b.stream(body_of(prompt, 200, stop=[stop]))
                await stream.tokens(20 + seed % 4)
                moved = 0
                while not stream.over.is_set():
                    moved += await order(b, stream, level=level)
                assert stream.text == text[:cut] and stream.finish == "stop"
                found += moved
            assert found >= 4
            await b.settled()

    run(work)


# -- plugins that do not do as they are told --------------------------------------------------------------------------


@BOTH
def test_a_plugin_that_refuses(level: MigrationLevel) -> None:
    """Nothing has happened: the move is rolled back, and the request goes on where it is."""

    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            prompt = ids(40)
            stream = b.stream(body_of(prompt, 150))
            await stream.tokens(5)
            session = b.session(stream)
            where = session.where
            assert session.segment is not None
            session.segment.id = "nobody"
            assert not await order(b, stream, level=level)
            assert session.where == where
            (why,) = b.world.metrics.move_failures
            assert why.startswith("plugin: no running request")
            await checked(stream, prompt, 150)
            await b.settled()

    run(work)


@BOTH
@pytest.mark.parametrize("delay_s", [0.2, 0.4])
def test_a_stop_that_comes_late(level: MigrationLevel, delay_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin obeys when nobody waits any more: the request goes on where it was, and nothing stays pinned."""
    impatient(monkeypatch)

    async def work() -> None:
        async with bench(engine=quick(0.005), roles=PDD) as b:
            for seed in range(3):
                prompt = ids(40, seed)
                stream = b.stream(body_of(prompt, 300))
                await stream.tokens(5)
                session = b.session(stream)
                source = b.fleet.engines[session.where]
                source.delay_plugin(delay_s)
                assert not await order(b, stream, level=level)
                await order(b, stream, level=level)  # it may be this one that the first one's stop comes to
                source.delay_plugin(0.0)
                await checked(stream, prompt, 300)
            assert b.world.metrics.engine_errors == 0
            assert any("no answer to handoff" in why for why in b.world.metrics.move_failures)
            await b.settled()
            await until(lambda: len(b.world.claims) == 0)

    run(work)


def test_stopped_while_another_move_keeps_tokens_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late stop meets a re-prompt: that is rolled back with its tokens shown, and the request goes on."""
    impatient(monkeypatch)

    async def work() -> None:
        async with bench(engine=quick(0.006), roles=PDD) as b:
            for seed in range(10):
                prompt = ids(40, seed)
                stream = b.stream(body_of(prompt, 150))
                await stream.tokens(5)
                source = b.fleet.engines[b.session(stream).where]
                source.delay_plugin(0.04 + 0.006 * seed)
                assert not await order(b, stream, level=HANDOFF)
                session = current(b, stream)
                assert session is not None
                b.world.controller.migration_level = MigrationLevel.REPROMPT
                b.world.tell(MoveOrdered(session.request, other(session)))
                await checked(stream, prompt, 150)
                source.delay_plugin(0.0)
            await b.settled()

    run(work)


def test_a_source_that_stops_and_does_not_say_what_it_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target computes everything, as in a replay; what was pinned is released when the answer comes."""
    impatient(monkeypatch, 0.1)

    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            prompt = ids(40)
            stream = b.stream(body_of(prompt, 150))
            await stream.tokens(5)
            source = b.fleet.engines[b.session(stream).where]
            plugin = source._plugin
            assert plugin is not None
            answers: list[tuple[Any, Any]] = []
            pinned = plugin._pinned
            monkeypatch.setattr(source.transfers, "on_pinned", lambda *found: answers.append(found))
            assert await order(b, stream, level=HANDOFF)
            assert len(answers) == 1 and len(source.transfers.pins) == 1
            pinned(*answers[0])
            await checked(stream, prompt, 150)
            await until(lambda: not source.transfers.pins)
            await b.settled()

    run(work)


# -- clients and engines that go away ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("patience_s", [0.0, 0.002, 0.005, 0.01, 0.02, 0.04])
def test_the_client_goes_away_in_each_stage(level: MigrationLevel, patience_s: float) -> None:
    async def work() -> None:
        async with bench(engine=quick(0.004), roles=PDD) as b:
            b.world.controller.migration_level = level
            for seed in range(6):
                stream = b.stream(body_of(ids(60, seed), 500))
                await stream.tokens(4 + seed)
                session = b.session(stream)
                b.world.tell(MoveOrdered(session.request, other(session)))
                await asyncio.sleep(patience_s + 0.001 * seed)
                assert stream.call is not None
                stream.call.abort()
            await b.settled()
            # One whose pull had begun is kept until its lease is over.
            await until(lambda: all(row.used for row in b.world.claims.rows()))

    run(work)


@pytest.mark.parametrize("fault", ["kill", "hang", "refuse"])
def test_the_target_fails_after_the_source_has_stopped(fault: str, soon: None) -> None:
    """The source takes the request back: its prefix cache has it all."""

    async def work() -> None:
        async with bench(engine=quick(0.004, lease_s=4.0), roles=PDD, watch=WATCHFUL) as b:
            prompt = ids(300)
            stream = b.stream(body_of(prompt, 120))
            await stream.tokens(5)
            session = b.session(stream)
            source, target = session.where, other(session)
            victim, cause = b.fleet.engines[target], b.fleet.engines[source]
            hits = cause.driver.counters.prefix_hits
            moves: list[CarriedSession] = []
            stopped = CarriedSession._stopped

            def at_stop(self: CarriedSession, segment: Any) -> None:
                stopped(self, segment)
                if not moves:
                    moves.append(self)
                    if fault == "kill":
                        victim.crash("killed")
                    elif fault == "hang":
                        victim.hang()
                    else:
                        victim.fail_next(1)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(CarriedSession, "_stopped", at_stop)
                assert not await order(b, stream, target, HANDOFF)
            await checked(stream, prompt, 120)
            assert moves and session.where == source
            assert cause.driver.counters.prefix_hits >= hits + 300 // 16 * 16
            victim.resume()
            await victim.revive()
            await until(lambda: all(i.health.value == "up" for i in b.world.instances.values()))
            await b.settled()

    run(work)


# -- which level ------------------------------------------------------------------------------------------------------


def able(*plugin: str, handover: bool = True, caching: bool = True) -> Abilities:
    return Abilities("m", 100, 16, 10, caching, handover, plugin=plugin)


def test_the_source_offers_and_the_target_takes() -> None:
    everything, stock = able("handoff", "precopy"), able()
    assert stock.levels == (MigrationLevel.REPLAY, MigrationLevel.REPROMPT)
    assert everything.levels == tuple(MigrationLevel)
    assert able("handoff").levels[-1] == HANDOFF
    assert able("precopy").levels[-1] == MigrationLevel.REPROMPT  # a pre-copy ends with a hand-off
    assert able("handoff", "precopy", handover=False).levels == (MigrationLevel.REPLAY,)
    for wanted in MigrationLevel:
        assert best_level(everything, everything, wanted) == wanted
        assert best_level(everything, stock, wanted) == wanted
        assert best_level(stock, everything, wanted) == min(wanted, MigrationLevel.REPROMPT)
        assert best_level(everything, able(handover=False), wanted) == MigrationLevel.REPLAY
    uncached = able("handoff", "precopy", caching=False)
    assert best_level(everything, uncached, PRECOPY) == HANDOFF
    assert best_level(everything, uncached, MigrationLevel.REPROMPT) == MigrationLevel.REPLAY
    assert best_level(uncached, everything, PRECOPY) == PRECOPY


def test_engines_with_and_without_a_plugin_in_one_fleet() -> None:
    """Away from the one that has a plugin by hand-off, back by re-prompt."""

    async def work() -> None:
        some = [quick(0.003), quick(0.003), quick(0.003, plugin=False)]
        async with bench(engine=some, roles=PDD) as b:
            prompt = ids(40)
            stream = b.stream(body_of(prompt, 400))
            await stream.tokens(5)
            b.world.controller.migration_level = HANDOFF
            while not stream.over.is_set() and len(stream.ids) < 300:
                await order(b, stream)
            levels = {key[0] for key in b.world.metrics.migrations if key[2] == "done"}
            assert levels == {"handoff", "reprompt"}
            await checked(stream, prompt, 400)
            await b.settled()

    run(work)


def test_an_engine_that_comes_back_has_its_plugin_again(soon: None) -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD, watch=WATCHFUL) as b:
            instance = b.world.instances[1]
            first = instance.link
            assert first is not None and instance.abilities.levels[-1] == PRECOPY
            stream = b.stream(body_of(ids(20), 200))
            await stream.tokens(5)
            await order(b, stream, 1, MigrationLevel.REPLAY)
            await b.fleet.engines[1].kill()
            await until(lambda: instance.link is None)
            await b.fleet.engines[1].revive()
            await until(lambda: instance.link is not None)
            again = instance.link
            assert again is not None and again is not first and first.closed
            assert again.hello is not None and first.hello is not None
            assert again.hello.engine_id != first.hello.engine_id
            assert instance.abilities.levels[-1] == PRECOPY
            await checked(stream, ids(20), 200)
            await b.settled()

    run(work)


def test_no_plugin_at_the_address_is_no_reason_not_to_serve() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003, plugin=False), roles=PDD) as b:
            for instance in b.world.instances.values():
                assert instance.link is None and instance.abilities.levels[-1] == MigrationLevel.REPROMPT
            url = b.fleet.engines[1].url
            b.world.retire(b.world.instances[1])
            address = EngineAddress(url, Role.DECODE, plugin="tcp://127.0.0.1:9")
            assert await b.deployment.attach(address) == 1
            assert b.world.instances[1].link is None
            stream = b.stream(body_of(ids(20), 20))
            await checked(stream, ids(20), 20)
            await b.settled()

    run(work)
