"""``penstock ctl`` as a user runs it, against a gateway over emulated engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from penstock.cli.main import app
from penstock.core.types import Role
from penstock.live.admin import Admin
from penstock.live.instance import Health
from tests.live.support import MODEL, PDD, Bench, Stream, bench, ids, run


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("PENSTOCK_ADMIN_URL", "PENSTOCK_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


class Ctl:
    """Runs commands in a thread, as the gateway lives on this loop."""

    def __init__(self, b: Bench, admin: Admin) -> None:
        self.b = b
        self.admin = admin

    async def call(self, *words: str) -> Result:
        return await asyncio.to_thread(ctl, *words)

    async def said(self, *words: str, code: int = 0) -> str:
        result = await self.call(*words)
        assert result.exit_code == code, (result.output, result.stderr, result.exception)
        return str(result.stdout)

    async def json(self, *words: str, code: int = 0) -> Any:
        found = json.loads(await self.said(*words, "--json", "-", code=code))
        assert found["schema"] == "penstock.ctl/1"
        return found


def ctl(*words: str) -> Result:
    return CliRunner().invoke(app, ["ctl", *words])


@asynccontextmanager
async def operated(roles: tuple[Role, ...] = PDD) -> AsyncIterator[Ctl]:
    async with bench(roles) as b:
        admin = Admin(b.deployment)
        await admin.start()
        try:
            yield Ctl(b, admin)
        finally:
            await admin.stop()


async def decoding(c: Ctl, count: int, tokens: int = 600, **more: Any) -> list[Stream]:
    streams = []
    for i in range(count):
        prompt = {"model": MODEL, "prompt": ids(40, i), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        streams.append(c.b.stream({**prompt, "return_token_ids": True, **more}))
    for stream in streams:
        await stream.tokens(2)
    return streams


def name_of(stream: Stream) -> str:
    assert stream.head is not None
    return stream.head.headers["x-request-id"]


def hang_up(streams: list[Stream]) -> None:
    for stream in streams:
        assert stream.call is not None
        stream.call.abort()


def test_tables_and_json_show_the_same() -> None:
    async def work() -> None:
        async with operated() as c:
            assert "No request is in flight" in await c.said("requests")
            assert "No KV is pinned" in await c.said("custody")
            streams = await decoding(c, 2)
            pinned = await decoding(c, 1, seed=1)
            table = await c.said("instances")
            assert all(i.url in table for i in c.b.world.instances.values()) and "prefill" in table
            rows = (await c.json("instances"))["instances"]
            assert [r["role"] for r in rows] == ["prefill", "decode", "decode"]
            table = await c.said("requests")
            assert all(name_of(s) in table for s in [*streams, *pinned]) and "seed" in table
            assert (await c.json("requests", "--limit", "1"))["total"] == 3
            assert "2 younger ones" in await c.said("requests", "-n", "1")
            assert (await c.json("custody"))["claims"] == []
            assert "least-kv" in await c.said("status") and "3 in flight" in await c.said("status")
            assert (await c.json("status"))["in_flight"] == 3
            hang_up(streams + pinned)
            await c.b.settled()

    run(work)


def test_a_request_is_moved_by_the_beginning_of_its_id() -> None:
    async def work() -> None:
        async with operated() as c:
            (stream,) = await decoding(c, 1)
            (pinned,) = await decoding(c, 1, seed=1)
            source = c.b.session(stream).where
            words = ("migrate", name_of(stream)[:7], "--to", str(3 - source))
            assert f"{source} → {3 - source} done in" in await c.said(*words)
            assert c.b.session(stream).where == 3 - source
            told = await c.json("migrate", name_of(stream), "--to", str(source), "--no-wait")
            assert told["outcome"] == "started"
            refused = await c.call("migrate", name_of(pinned), "--to", "1")
            assert refused.exit_code == 2 and "seed" in refused.stderr and refused.stderr.count("\n") == 1
            hang_up([stream, pinned])
            await c.b.settled()

    run(work)


def test_a_move_that_is_rolled_back_exits_1() -> None:
    async def work() -> None:
        async with operated() as c:
            (stream,) = await decoding(c, 1)
            target = c.b.world.instances[3 - c.b.session(stream).where]
            url, target.url = target.url, "http://127.0.0.1:9"
            said = await c.said("migrate", name_of(stream), "--to", str(target.index), code=1)
            target.url = url
            assert "rolled back:" in said
            hang_up([stream])

    run(work)


def test_drain_flip_detach_attach() -> None:
    async def work() -> None:
        async with operated((Role.PREFILL, *[Role.DECODE] * 3)) as c:
            streams = await decoding(c, 6)
            assert "instance 1 is drained" in await c.said("drain", "1", "--wait")
            assert "held" in await c.said("instances")
            assert "gets work again" in await c.said("undrain", "1")
            assert "1: decode → prefill" in await c.said("flip", "1", "prefill")
            assert "prefill already" in await c.said("flip", "1", "prefill")
            assert "instance 1: prefill → decode" in await c.said("flip", "1", "decode")
            assert "instance 3 is detached" in await c.said("detach", "3", "--wait")
            url = c.b.world.instances[3].url
            assert (await c.json("attach", url, "--role", "decode"))["instance"] == 3
            assert c.b.world.instances[3].health is Health.UP
            assert (await c.json("detach", "3", "--force"))["health"] == "gone"
            pinned = await decoding(c, 3, seed=1)
            late = await c.said("drain", "1", "--wait", "--timeout", "2s", code=1)
            assert "left" in late and "seed" in late
            assert "called off" not in late
            hang_up(streams + pinned)
            await c.b.settled()

    run(work)


def test_policy_is_swapped() -> None:
    async def work() -> None:
        async with operated() as c:
            assert "least-kv → ares, horizon=512" in await c.said("policy", "ares", "--set", "horizon=512")
            assert (await c.json("policy", "round-robin"))["before"] == "ares"
            wrong = await c.call("policy", "ares", "--set", "horizon")
            assert wrong.exit_code == 2 and "--set option=value" in wrong.stderr
            for words, remedy in (
                (("policy", "aress"), "did you mean ares"),
                (("policy", "mixed"), "penstock ctl flip INSTANCE mixed"),
                (("flip", "1", "cook"), "prefill, decode or mixed"),
                (("drain", "0"), "force"),
                (("drain", "9"), "there are: 0, 1, 2"),
                (("attach", "nowhere", "--role", "decode"), "http://HOST:PORT"),
                (("migrate", "nobody"), "it may have ended"),
                (("drain", "1", "--wait", "--timeout", "2h"), "up to 1h"),
            ):
                result = await c.call(*words)
                assert result.exit_code == 2 and remedy in result.stderr, (words, result.stderr)
                assert result.stderr.startswith("penstock: ") and result.stderr.count("\n") == 1

    run(work)


def test_key_and_address_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with operated() as c:
            wrong = await c.call("status", "--key", "wrong")
            assert wrong.exit_code == 2 and "--key" in wrong.stderr
            assert "policy" in await c.said("status", "--admin", c.admin.url)
            gateway = await c.call("status", "--admin", c.b.url, "--key", "k")
            assert gateway.exit_code == 2 and "not the gateway's" in gateway.stderr
            other = Admin(c.b.deployment)
            await other.start(key="chosen")
            several = await c.call("status")
            assert several.exit_code == 2 and "several" in several.stderr and other.url in several.stderr
            unknown = await c.call("status", "--admin", other.url)
            assert unknown.exit_code == 2 and "PENSTOCK_ADMIN_KEY" in unknown.stderr
            monkeypatch.setenv("PENSTOCK_ADMIN_URL", other.url)
            monkeypatch.setenv("PENSTOCK_ADMIN_KEY", "chosen")
            assert "policy" in await c.said("status")
            await other.stop()

    run(work)


def test_no_gateway_is_one_line() -> None:
    alone = ctl("instances")
    assert alone.exit_code == 2 and "is penstock serve running?" in alone.stderr
    refused = ctl("instances", "--admin", "http://127.0.0.1:9", "--key", "k")
    assert (
        refused.exit_code == 2 and "cannot reach" in refused.stderr and "is penstock serve running?" in refused.stderr
    )
    assert refused.stderr.count("\n") == 1
    odd = ctl("instances", "--admin", "ftp://x", "--key", "k")
    assert odd.exit_code == 2 and "http://HOST:PORT" in odd.stderr


def test_help_needs_no_gateway() -> None:
    for command in ("instances", "requests", "custody", "status", "migrate", "drain", "undrain", "flip", "attach"):
        assert ctl(command, "--help").exit_code == 0
