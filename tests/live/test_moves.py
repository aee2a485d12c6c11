"""Moves of running decodes: the output is the unmoved one, whatever happens on the way."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from penstock.core.events import FlipOrdered, InstanceHeld, MoveOrdered
from penstock.core.types import MigrationLevel, Role
from penstock.live import health
from penstock.live.carried import CarriedSession
from penstock.live.emulated.instance import EmulatedEngine
from penstock.live.moves import LAST_TOKENS
from tests.live.answers import CHAT, WATCHFUL, current, more, order, other, quick, text_of, until
from tests.live.emulated.support import expected
from tests.live.support import PDD, Bench, Stream, bench, ids, run

BLOCK = 16
LEVELS = list(MigrationLevel)
NAMES = [level.name.lower() for level in LEVELS]


async def checked(b: Bench, stream: Stream, prompt: list[int], count: int) -> None:
    """The stream is complete and right."""
    async with asyncio.timeout(20):
        await stream.over.wait()
    assert stream.fault is None and stream.done, stream.raw[-300:]
    assert stream.ids == expected(prompt, count)
    assert stream.text == text_of(prompt, count)
    assert stream.finish == "length"


def body_of(prompt: list[int], count: int) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances that are well again are taken back at once, and those that do not answer are given up sooner."""
    monkeypatch.setattr(health, "RECOVERY_S", 0.05)
    monkeypatch.setattr(health, "PROBE_S", 0.2)
    monkeypatch.setattr(health, "SECOND_PROBE_S", 0.2)


@pytest.mark.parametrize("level", LEVELS, ids=NAMES)
def test_cuts_at_every_offset_of_a_block_in_both_directions(level: MigrationLevel) -> None:
    """Streams whose prompts differ in length by one token, until every offset has been met: the clock decides where
    a cut falls.
    """

    async def work() -> None:
        async with bench(engine=quick(0.004), roles=PDD) as b:
            b.world.controller.migration_level = level
            cuts: list[int] = []
            ways: set[tuple[int, int]] = set()

            async def one(length: int) -> None:
                prompt = ids(length, length)
                stream = b.stream(body_of(prompt, 120))
                await stream.tokens(2 + length % 5)
                for _ in range(3):
                    session = current(b, stream)
                    if session is None:
                        break
                    source, target = session.where, other(session)
                    if await order(b, stream, target):
                        segment = session.segment
                        if segment is not None:
                            cuts.append((len(prompt) + segment.began_at) % BLOCK)
                        ways.add((source, target))
                await checked(b, stream, prompt, 120)

            for _ in range(10):
                await asyncio.gather(*(one(40 + i) for i in range(2 * BLOCK)))
                if set(cuts) == set(range(BLOCK)):
                    break
            assert set(cuts) == set(range(BLOCK)), sorted(cuts)
            assert ways == {(1, 2), (2, 1)}
            done = sum(n for (_, _, outcome), n in b.world.metrics.migrations.items() if outcome == "done")
            assert done >= BLOCK
            await b.settled()
            await until(lambda: len(b.world.claims) == 0)

    run(work)


@pytest.mark.parametrize("level", LEVELS, ids=NAMES)
def test_one_request_moves_to_and_fro(level: MigrationLevel) -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            prompt = ids(33)
            stream = b.stream(body_of(prompt, 400))
            await stream.tokens(1)
            moves = 0
            while not stream.over.is_set() and len(stream.ids) < 380:
                moves += await order(b, stream, level=level)
                await more(stream)
            assert moves >= 2
            await checked(b, stream, prompt, 400)
            await b.settled()

    run(work)


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_answers_that_are_not_streamed_move_too(path: str) -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            kind = {"prompt": "Some text"} if path != CHAT else {"messages": [{"role": "user", "content": "Some text"}]}
            body = {**kind, "max_tokens": 400, "temperature": 0, "return_token_ids": True}
            unmoved = await b.post(body, path)
            moving = asyncio.create_task(b.post(body, path))
            await until(lambda: any(s.stage == "decoding" for s in b.world.sessions.values()))
            (session,) = b.world.sessions.values()
            assert isinstance(session, CarriedSession)
            b.world.tell(MoveOrdered(session.request, other(session)))
            moved = await moving
            assert session.moves == 1
            assert moved.body[200:] == unmoved.body[200:] or _same(moved.body, unmoved.body)
            await b.settled()

    run(work)


def _same(one: bytes, two: bytes) -> bool:
    import msgspec

    found = [msgspec.json.decode(body) for body in (one, two)]
    for answer in found:
        del answer["id"], answer["created"]
    return bool(found[0] == found[1])


def test_a_move_to_an_instance_that_is_not_there_changes_nothing() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            prompt = ids(20)
            stream = b.stream(body_of(prompt, 60))
            await stream.tokens(5)
            session = b.session(stream)
            for target in (session.where, 17, -5, session.where):
                b.world.tell(MoveOrdered(session.request, target))
            b.world.tell(MoveOrdered(10**6, 1))
            await checked(b, stream, prompt, 60)
            await b.settled()

    run(work)


def test_moves_while_the_request_ends() -> None:
    """Ordered at every one of the last tokens: late ones are refused or overtaken by the end, and none does harm."""

    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            for level in LEVELS:
                b.world.controller.migration_level = level

                async def one(left: int) -> None:
                    prompt = ids(30, left)
                    stream = b.stream(body_of(prompt, 40))
                    await stream.tokens(40 - left)
                    session = current(b, stream)
                    if session is not None:
                        b.world.tell(MoveOrdered(session.request, other(session)))
                    await checked(b, stream, prompt, 40)

                await asyncio.gather(*(one(left) for left in range(1, 12 + LAST_TOKENS)))
            await b.settled()

    run(work)


def test_a_move_while_the_client_goes_away() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            for level in LEVELS:
                for steps in range(8):
                    stream = b.stream(body_of(ids(30, steps), 500))
                    await stream.tokens(4)
                    session = b.session(stream)
                    b.world.controller.migration_level = level
                    b.world.tell(MoveOrdered(session.request, other(session)))
                    await more(stream, steps)
                    assert stream.call is not None
                    stream.call.abort()
            await b.settled()
            await until(lambda: all(row.used for row in b.world.claims.rows()))

    run(work)


async def kill(engine: EmulatedEngine) -> None:
    await engine.kill()


async def hang(engine: EmulatedEngine) -> None:
    engine.hang()


async def refuse(engine: EmulatedEngine) -> None:
    engine.fail_next(50)


async def fail(engine: EmulatedEngine) -> None:
    engine.fail_running("secret")


FAULTS = [kill, hang, refuse, fail]


@pytest.mark.parametrize("level", LEVELS, ids=NAMES)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_fault_in_each_stage_of_a_move(fault: object, side: str, level: MigrationLevel) -> None:
    """The fault comes after 0, 1, … calls that the move makes: during the pin, the pull, the take-over, and after."""

    async def work() -> None:
        watch = WATCHFUL
        async with bench(engine=quick(0.003, lease_s=4.0), roles=PDD, watch=watch) as b:
            b.world.controller.migration_level = level
            for calls in range(4):
                prompt = ids(45, calls)
                stream = b.stream(body_of(prompt, 120))
                await stream.tokens(5)
                session = b.session(stream)
                target = other(session)
                victim = b.fleet.engines[session.where if side == "source" else target]
                reached = _after_calls(b, calls)
                b.world.tell(MoveOrdered(session.request, target))
                while not reached() and session.move is not None and not stream.over.is_set():
                    await more(stream)
                await fault(victim)  # type: ignore[operator]
                await checked(b, stream, prompt, 120)
                victim.resume()
                victim.fail_next(0)
                await victim.revive()
                await until(lambda: all(i.health.value == "up" for i in b.world.instances.values()))
            await b.settled()

    run(work)


def _after_calls(b: Bench, count: int):  # type: ignore[no-untyped-def]
    """Has the gateway begun ``count`` calls since?"""
    client = b.world.client
    begun = 0
    opened = type(client).open

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal begun
        if args[1] == "POST":
            begun += 1
        return opened(client, *args, **kwargs)  # type: ignore[arg-type]

    client.open = counting  # type: ignore
    return lambda: begun >= count


@pytest.mark.parametrize("policy", ["ares", "llumnix"])
def test_moves_by_policy_under_load(policy: str) -> None:
    async def work() -> None:
        options: dict[str, Any] = {"interval": 0.05}
        if policy == "ares":
            options |= {"margin": 0.0, "least_gain": 0.0, "amortise": 0.0, "horizon": 0}
        else:
            options |= {"threshold": 150}
        async with bench(engine=quick(0.004, blocks=400), roles=PDD, policy=policy, **options) as b:
            rng = random.Random(3)
            todo = [(ids(rng.randrange(20, 80), i), rng.choice([100, 200, 300])) for i in range(24)]
            b.world.tell(InstanceHeld(2, True))  # everything is on one instance until it is given back
            streams = [b.stream(body_of(prompt, count)) for prompt, count in todo]
            await asyncio.gather(*(s.tokens(3) for s in streams))
            b.world.tell(InstanceHeld(2, False))
            await asyncio.gather(*(checked(b, s, p, c) for s, (p, c) in zip(streams, todo, strict=True)))
            done = sum(n for (_, _, outcome), n in b.world.metrics.migrations.items() if outcome == "done")
            assert done > 0, b.world.metrics.migrations
            await b.settled()

    run(work)


def test_moves_between_mixed_instances() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003), roles=(Role.MIXED,) * 3, policy="mixed") as b:
            prompts = [ids(30 + i, i) for i in range(6)]
            streams = [b.stream(body_of(p, 150)) for p in prompts]
            await asyncio.gather(*(s.tokens(5) for s in streams))
            moved = await asyncio.gather(
                *(order(b, s, (b.session(s).where + 1) % 3) for s in streams),
            )
            assert sum(moved) >= 4
            for stream, prompt in zip(streams, prompts, strict=True):
                await checked(b, stream, prompt, 150)
            await b.settled()

    run(work)


def test_roles_change_under_load() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            prompts = [ids(30 + i, i) for i in range(24)]
            streams: list[Stream] = []
            for i, prompt in enumerate(prompts):
                streams.append(b.stream(body_of(prompt, 80)))
                await streams[-1].tokens(2)
                if i % 6 == 2:
                    b.world.tell(FlipOrdered(1, Role.PREFILL))
                elif i % 6 == 5:
                    b.world.tell(FlipOrdered(1, Role.DECODE))
            for stream, prompt in zip(streams, prompts, strict=True):
                await checked(b, stream, prompt, 80)
            assert b.world.metrics.flips == 8
            await b.settled()

    run(work)


def test_arrow_flips_roles_by_itself() -> None:
    async def work() -> None:
        options: dict[str, Any] = {"interval": 0.05, "cooldown": 0.0, "sustained": 1.0, "early": 0.0}
        roles = (Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE)
        async with bench(engine=quick(0.003), roles=roles, policy="arrow", **options) as b:
            prompts = [ids(400 + i, i) for i in range(40)]
            streams = [b.stream(body_of(p, 40)) for p in prompts]
            for stream, prompt in zip(streams, prompts, strict=True):
                await checked(b, stream, prompt, 40)
            assert b.world.metrics.flips > 0
            await b.settled()

    run(work)
