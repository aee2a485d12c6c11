"""Random bodies and random histories: the gateway never answers 500, never hangs, never loses a request.

``PENSTOCK_EXAMPLES`` says how many bodies are tried (300); histories are a tenth of that.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from penstock.core.events import FlipOrdered, InstanceHeld, MoveOrdered
from penstock.core.types import MigrationLevel, Role
from penstock.live import health
from penstock.live.instance import Health
from penstock.live.moves import handoff
from penstock.live.openapi import document
from tests.live.answers import WATCHFUL, more, quick, until
from tests.live.emulated.support import expected
from tests.live.support import PDD, Bench, Stream, bench, ids

EXAMPLES = int(os.environ.get("PENSTOCK_EXAMPLES", "300"))
PATIENCE_S = 30.0

SCHEMAS = {
    path: item["post"]["requestBody"]["content"]["application/json"]["schema"]
    for path, item in document()["paths"].items()
    if "post" in item
}


# -- bodies from the description ------------------------------------------------------------------------------------

TEXTS = st.text(max_size=20) | st.sampled_from(["\x00", "\U0001f600" * 5, "é" * 9, "<|im_start|>", "'\"\\\n", "e"])


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the description allows."""
    if "oneOf" in schema:
        return st.one_of([values_of(s) for s in schema["oneOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema["type"]
    if isinstance(kind, list):
        return st.one_of([values_of({**schema, "type": k}) for k in kind])
    if kind == "object":
        needed = schema.get("required", [])
        made = {k: values_of(s) for k, s in schema.get("properties", {}).items()}
        optional = {k: v for k, v in made.items() if k not in needed}
        return st.fixed_dictionaries({k: made[k] for k in needed}, optional=optional)
    if kind == "array":
        most = min(schema.get("maxItems", 8), 8)
        return st.lists(values_of(schema["items"]), min_size=schema.get("minItems", 0), max_size=most)
    if kind == "string":
        return TEXTS.filter(lambda t: len(t) >= schema.get("minLength", 0))
    if kind == "boolean":
        return st.booleans()
    if kind == "null":
        return st.none()
    if kind == "integer":
        return st.integers(schema.get("minimum", -(2**31)), min(schema.get("maximum", 300), 300))
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    return st.floats(least, schema.get("maximum", 100), exclude_min="exclusiveMinimum" in schema)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, -(10**30), -1, 0, 1.5, 1e308, -0.0, 1e-320]),
    st.floats(allow_nan=True, allow_infinity=True),
    TEXTS,
    st.just("\ud800"),
    st.recursive(st.none() | st.integers() | TEXTS, lambda s: st.lists(s, max_size=3) | st.dictionaries(TEXTS, s)),
    st.integers(1, 400).map(lambda depth: f"DEEP{depth}"),
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body: valid, or with some values replaced, or mangled as bytes."""
    path = draw(st.sampled_from(sorted(SCHEMAS)))
    body = draw(values_of(SCHEMAS[path]))
    body.pop("model", None)
    body.setdefault("max_tokens", draw(st.integers(1, 40)))
    for _ in range(draw(st.integers(0, 3))):
        known = sorted({*SCHEMAS[path]["properties"], "logprobs", "echo", "seed", "tools", "kv_transfer_params", "x"})
        body[draw(st.sampled_from(known))] = draw(ODD)
    raw = encoded(body)
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=5)) + raw[at + draw(st.integers(0, 3)) :]
    return path, raw


def encoded(body: Any) -> bytes:
    """JSON as careless clients write it: NaN, half surrogates, numbers of any size, and lists a thousand deep."""
    import json

    text = json.dumps(body)
    while '"DEEP' in text:
        start = text.index('"DEEP')
        end = text.index('"', start + 5)
        depth = 10 * int(text[start + 5 : end])
        text = text[:start] + "[" * depth + "]" * depth + text[end + 1 :]
    return text.encode("utf-8", "surrogatepass")


class Running:
    """A bench on an event loop that stands still between examples."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._open = bench(engine=quick(0.0003, max_model_len=512), roles=PDD)
        self.bench: Bench = self.do(self._open.__aenter__())

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, PATIENCE_S))

    def close(self) -> None:
        self.do(self._open.__aexit__(None, None, None))
        self.loop.close()


def test_bodies_of_any_kind() -> None:
    running = Running()
    b = running.bench
    statuses: dict[int, int] = {}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=EXAMPLES == 300,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
    @given(bodies())
    def one(case: tuple[str, bytes]) -> None:
        path, raw = case
        answer = running.do(b.post(raw, path))
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        assert answer.status in (200, 400), (answer, raw)
        if answer.status == 400:
            error = msgspec.json.decode(answer.body)["error"]
            assert error["message"] and error["code"] == 400
        elif answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.body.endswith(b"data: [DONE]\n\n")
        else:
            assert msgspec.json.decode(answer.body)["choices"]
        assert not b.world.sessions
        assert b.world.metrics.protocol_errors == 0

    try:
        one()
        running.do(b.settled())
        assert b.world.metrics.engine_errors < sum(statuses.values()) / 2
        assert statuses[200] > EXAMPLES / 20 and statuses[400] > EXAMPLES / 20, statuses
        for instance in b.world.instances.values():
            assert instance.health is Health.UP
    finally:
        running.close()


# -- histories ------------------------------------------------------------------------------------------------------


class History:
    """A random walk over what clients, operators and fate may do. Every stream that is not left must be right."""

    def __init__(self, b: Bench, rng: random.Random) -> None:
        self.b = b
        self.rng = rng
        self.open: list[tuple[Stream, list[int], int]] = []
        self.ill: set[int] = set()

    async def step(self) -> str:
        names = ["start"] * 4 + ["move"] * 5 + ["wait"] * 3 + ["leave", "flip", "hold", "release", "level", "relayed"]
        names += ["kill", "hang", "cure", "fail", "refuse", "together", "dawdle", "hurry"]
        name = self.rng.choice(names)
        await getattr(self, name)()
        return name

    async def start(self) -> None:
        if len(self.open) < 12:
            prompt, count = ids(self.rng.randrange(3, 90), self.rng.randrange(99)), self.rng.choice([1, 2, 30, 90])
            body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}
            self.open.append((self.b.stream(body), prompt, count))

    async def relayed(self) -> None:
        """Of these it is only asked that they end."""
        stream = self.b.stream({"prompt": ids(20), "max_tokens": 30, "n": self.rng.choice([1, 2]), "seed": 1})
        self.open.append((stream, [], 0))

    async def wait(self) -> None:
        if self.open:
            stream = self.rng.choice(self.open)[0]
            try:
                async with asyncio.timeout(0.05):
                    await more(stream, self.rng.randrange(1, 10))
            except TimeoutError:
                pass  # its engine is ill

    async def move(self) -> None:
        sessions = list(self.b.world.sessions)
        if sessions:
            reason = self.rng.choice(["ordered", "balance"])
            self.b.world.tell(MoveOrdered(self.rng.choice(sessions), self.rng.randrange(-1, 4), reason))

    async def together(self) -> None:
        for request in list(self.b.world.sessions):
            self.b.world.tell(MoveOrdered(request, self.rng.randrange(4)))

    async def leave(self) -> None:
        if self.open:
            stream = self.open.pop(self.rng.randrange(len(self.open)))[0]
            assert stream.call is not None
            stream.call.abort()

    async def flip(self) -> None:
        index = self.rng.randrange(4)
        self.b.world.tell(FlipOrdered(index, self.rng.choice([Role.PREFILL, Role.DECODE])))

    async def hold(self) -> None:
        index = self.rng.randrange(4)
        self.b.world.instances[index].held = True
        self.b.world.tell(InstanceHeld(index, True))

    async def release(self) -> None:
        for instance in self.b.world.instances.values():
            if instance.held:
                instance.held = False
                self.b.world.tell(InstanceHeld(instance.index, False))
        self.b.world.unpark()

    async def level(self) -> None:
        self.b.world.controller.migration_level = self.rng.choice(list(MigrationLevel))

    async def kill(self) -> None:
        if len(self.ill) < 2:
            index = self.rng.randrange(4)
            self.ill.add(index)
            await self.b.fleet.engines[index].kill()

    async def hang(self) -> None:
        if len(self.ill) < 2:
            index = self.rng.randrange(4)
            self.ill.add(index)
            self.b.fleet.engines[index].hang()

    async def fail(self) -> None:
        self.b.fleet.engines[self.rng.randrange(4)].fail_running("secret")

    async def refuse(self) -> None:
        self.b.fleet.engines[self.rng.randrange(4)].fail_next(self.rng.randrange(1, 3))

    async def dawdle(self) -> None:
        """A plugin does commands late: some when nobody waits for that any more."""
        self.b.fleet.engines[self.rng.randrange(4)].delay_plugin(self.rng.choice([0.01, 0.05, 0.1]))

    async def hurry(self) -> None:
        for engine in self.b.fleet.engines:
            engine.delay_plugin(0.0)

    async def cure(self) -> None:
        for index in self.ill:
            engine = self.b.fleet.engines[index]
            engine.resume()
            await engine.revive()
        self.ill.clear()

    async def end(self) -> None:
        """Everything is well again, and every stream ends as it should."""
        await self.cure()
        await self.hurry()
        for engine in self.b.fleet.engines:
            engine.fail_next(0)
        for index, role in enumerate((Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)):
            self.b.world.tell(FlipOrdered(index, role))
        await self.release()
        await until(lambda: all(i.health is Health.UP for i in self.b.world.instances.values()))
        self.b.world.unpark()
        async with asyncio.timeout(20):
            for stream, prompt, count in self.open:
                await stream.over.wait()
                assert stream.fault is None
                if b'"code":50' in stream.raw:  # so many faults without a token between them
                    assert stream.ids == expected(prompt, count)[: len(stream.ids)] or not prompt
                elif prompt:
                    assert stream.ids == expected(prompt, count), stream.raw[-300:]
                    assert stream.done
        await self.b.settled()


@pytest.mark.parametrize("seed", range(max(1, EXAMPLES // 50)))
def test_histories(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "RECOVERY_S", 0.05)
    monkeypatch.setattr(health, "PROBE_S", 0.2)
    monkeypatch.setattr(health, "SECOND_PROBE_S", 0.2)
    monkeypatch.setattr(handoff, "LEAST_PATIENCE_S", 0.04)
    monkeypatch.setattr(handoff, "PATIENCE_STEPS", 4.0)

    async def work() -> None:
        roles = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
        engine = quick(0.003, lease_s=0.6)
        done: list[str] = []
        async with bench(engine=engine, roles=roles, watch=WATCHFUL) as b:
            history = History(b, random.Random(seed))
            for _ in range(60):
                done.append(await history.step())
            try:
                await history.end()
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"after {done}") from error

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    uvloop.run(bounded())
