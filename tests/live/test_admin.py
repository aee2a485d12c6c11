"""The operator's hand: every order, under load, over emulated engines; and that the event log replays all of them."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.core.events import MoveOrdered
from penstock.core.types import Role
from penstock.experiment.replay import replay
from penstock.live.admin import Admin, state
from penstock.live.admin.watch import EventWatch
from penstock.live.emulated.settings import EmulatedSettings
from penstock.live.http.messages import Response
from penstock.live.instance import Health
from tests.live.support import MODEL, PDD, Bench, Stream, bench, ids, run

LONG = 300
KEY = "operator-key-1"


class Hand:
    """Calls the admin API as an operator would."""

    def __init__(self, b: Bench, admin: Admin) -> None:
        self.b = b
        self.admin = admin

    async def raw(self, method: str, path: str, order: Any = None, key: str | None = None) -> Response:
        headers = {"authorization": f"Bearer {self.admin.key if key is None else key}"}
        body = b"" if order is None else order if isinstance(order, bytes) else msgspec.json.encode(order)
        return await self.b.client.fetch(self.admin.url, method, path, body, headers, timeout_s=60)

    async def get(self, path: str) -> Any:
        answer = await self.raw("GET", path)
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    async def order(self, path: str, order: Any = None, method: str = "POST") -> Any:
        answer = await self.raw(method, path, order if order is not None or method == "DELETE" else {})
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    async def refused(self, status: int, path: str, order: Any = None, method: str = "POST") -> str:
        """The problem and remedy of an order that must be refused with ``status``."""
        answer = await self.raw(method, path, order)
        body = json.loads(answer.body)
        assert answer.status == status, body
        assert set(body) == {"error", "remedy"} and body["error"] and body["remedy"]
        return f"{body['error']} | {body['remedy']}"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State files of tests stay out of the user's home."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@asynccontextmanager
async def operated(roles: tuple[Role, ...] = PDD, policy: str = "least-kv", **more: Any) -> AsyncIterator[Hand]:
    async with bench(roles, policy, **more) as b:
        admin = Admin(b.deployment)
        await admin.start(key=KEY)
        try:
            yield Hand(b, admin)
        finally:
            await admin.stop()


def body(tokens: int = LONG, start: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": ids(50 + start, start),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


async def decoding(hand: Hand, count: int, **more: Any) -> list[Stream]:
    """That many streams, all of which decode."""
    streams = [hand.b.stream(body(start=i, **more)) for i in range(count)]
    for stream in streams:
        await stream.tokens(4)
    return streams


async def references(hand: Hand, count: int, tokens: int = LONG) -> list[Stream]:
    """What those streams say if nothing happens to them."""
    streams = [hand.b.stream(body(tokens, start=i)) for i in range(count)]
    await ended(streams)
    return streams


async def ended(streams: list[Stream]) -> None:
    for stream in streams:
        await stream.over.wait()
        assert stream.done and stream.fault is None, (stream.fault, stream.raw[-300:])


def name_of(stream: Stream) -> str:
    assert stream.head is not None
    return stream.head.headers["x-request-id"]


# -- looking ----------------------------------------------------------------------------------------------------------


def test_lists_show_what_is_there() -> None:
    async def work() -> None:
        async with operated() as hand:
            free = await hand.get("/instances")
            assert [(i["instance"], i["role"], i["health"]) for i in free["instances"]] == [
                (0, "prefill", "up"),
                (1, "decode", "up"),
                (2, "decode", "up"),
            ]
            assert all(i["remaining"] == 0 and i["kv_capacity_tokens"] > 0 for i in free["instances"])
            streams = await decoding(hand, 2)
            pinned = await decoding(hand, 1, seed=7)
            rows = (await hand.get("/requests"))["requests"]
            assert {r["id"] for r in rows} == {name_of(s) for s in [*streams, *pinned]}
            by_id = {r["id"]: r for r in rows}
            assert by_id[name_of(streams[0])]["movable"]
            assert (by_id[name_of(pinned[0])]["movable"], by_id[name_of(pinned[0])]["why_not"]) == (False, "seed")
            assert all(r["stage"] == "decoding" and r["instance"] in (1, 2) and r["age_s"] > 0 for r in rows)
            assert (await hand.get("/requests?limit=1"))["total"] == 3
            here = (await hand.get("/requests?instance=1"))["requests"]
            assert {r["instance"] for r in here} == {1}
            assert (await hand.get(f"/requests/{name_of(streams[0])[:8]}"))["id"] == name_of(streams[0])
            busy = (await hand.get("/instances"))["instances"]
            assert sum(i["decodes"] for i in busy) == 3
            at_a_glance = await hand.get("/status")
            assert (at_a_glance["policy"], at_a_glance["in_flight"], at_a_glance["model"]) == ("least-kv", 3, MODEL)
            await ended(streams + pinned)
            after = await hand.get("/status")
            assert after["counters"]["requests"] == {"finished": 3} and after["in_flight"] == 0
            await hand.b.settled()

    run(work)


def test_custody_names_the_request_whose_kv_is_pinned() -> None:
    async def work() -> None:
        async with operated(engine=EmulatedSettings(speed=0.2, lease_s=5.0)) as hand:
            stream = hand.b.stream(body(20))
            claims: list[Any] = []
            async with asyncio.timeout(20):
                while not claims and not stream.over.is_set():
                    claims = (await hand.get("/custody"))["claims"]
            assert claims[0]["instance"] == 0 and claims[0]["tokens"] == 51
            assert 0 < claims[0]["lease_left_s"] <= 30 and claims[0]["use_within_s"] < claims[0]["lease_left_s"]
            assert len(claims[0]["id"]) == 16
            await ended([stream])
            assert (await hand.get("/custody"))["claims"] == []

    run(work)


def test_requests_that_wait_are_listed() -> None:
    from penstock.live.gateway import GatewaySettings

    async def work() -> None:
        async with operated(gateway=GatewaySettings(max_inflight=1)) as hand:
            streams = await decoding(hand, 1)
            streams.append(hand.b.stream(body(start=2)))
            async with asyncio.timeout(20):
                while (await hand.get("/requests"))["total"] < 2:
                    await asyncio.sleep(0)
            waiting = (await hand.get("/requests"))["requests"][1]
            assert (waiting["stage"], waiting["number"], waiting["instance"]) == ("queued", -1, None)
            assert (await hand.get("/status"))["queued"] == 1
            await hand.refused(409, f"/requests/{waiting['id']}/migrate", {"to": 1})
            await ended(streams)

    run(work)


# -- moving -----------------------------------------------------------------------------------------------------------


def test_a_moved_stream_says_the_same() -> None:
    async def work() -> None:
        async with operated() as hand:
            (alone,) = await references(hand, 1)
            (stream,) = await decoding(hand, 1)
            source = (await hand.get("/requests"))["requests"][0]["instance"]
            target = 3 - source
            done = await hand.order(f"/requests/{name_of(stream)[:6]}/migrate", {"to": target, "wait": True})
            assert (done["source"], done["target"], done["outcome"]) == (source, target, "done")
            assert (await hand.get("/requests"))["requests"][0]["instance"] == target
            anywhere = await hand.raw("POST", f"/requests/{name_of(stream)}/migrate")
            assert anywhere.status == 200 and json.loads(anywhere.body)["target"] == source
            await ended([stream])
            assert stream.ids == alone.ids and stream.text == alone.text and stream.finish == "length"
            counters = (await hand.get("/status"))["counters"]
            assert counters["migrations_done"] >= 1
            await hand.b.settled()

    run(work)


def test_what_cannot_move_is_refused_with_the_reason() -> None:
    async def work() -> None:
        async with operated() as hand:
            (free,) = await decoding(hand, 1)
            (pinned,) = await decoding(hand, 1, seed=3)
            where = {r["id"]: r["instance"] for r in (await hand.get("/requests"))["requests"]}
            path = f"/requests/{name_of(free)}/migrate"
            assert "seed" in await hand.refused(409, f"/requests/{name_of(pinned)}/migrate", {"to": 1})
            assert "already" in await hand.refused(409, path, {"to": where[name_of(free)]})
            assert "no instance 9" in await hand.refused(404, path, {"to": 9})
            assert "no request" in await hand.refused(404, "/requests/nobody/migrate", {"to": 1})
            other = 3 - where[name_of(free)]
            await hand.order(f"/instances/{other}/drain", {"wait": True, "timeout_s": 0})
            assert "undrain" in await hand.refused(409, path, {"to": other})
            assert "no other instance" in await hand.refused(409, path, {})
            await hand.refused(400, path, {"to": "one"})
            await hand.refused(400, path, {"wait": True, "timeout_s": 1e9})
            await hand.refused(400, path, {"where": 1})
            await hand.refused(400, path, b"{")
            await hand.order(f"/instances/{other}/undrain")
            await ended([free, pinned])
            await hand.b.settled()

    run(work)


def test_a_move_to_an_engine_that_fails_is_rolled_back() -> None:
    async def work() -> None:
        async with operated() as hand:
            (alone,) = await references(hand, 1)
            (stream,) = await decoding(hand, 1)
            source = (await hand.get("/requests"))["requests"][0]["instance"]
            target = hand.b.world.instances[3 - source]
            url, target.url = target.url, "http://127.0.0.1:9"  # nobody listens there
            told = await hand.order(f"/requests/{name_of(stream)}/migrate", {"to": target.index, "wait": True})
            target.url = url
            assert told["outcome"] == "rolled back" and told["reason"]
            await ended([stream])
            assert stream.ids == alone.ids

    run(work)


def test_outcomes_of_requests_that_end_are_told() -> None:
    from penstock.core.events import Aborted, Finished, InstanceDown, Interrupted, Load, MigrationFailed

    async def work() -> None:
        load = Load(0, 0, 0, 0, 0.0)
        watch = EventWatch()
        for event, outcome in (
            (Finished(1, 0, 5, load), "over"),
            (Aborted(1), "over"),
            (Interrupted(1, 0, 3, "error 500"), "over"),
            (InstanceDown(0, (2, 1), (3, 4)), "over"),
            (MigrationFailed(1, 0, 1, "why"), "rolled back"),
        ):
            future, other = watch.outcome_of(1), watch.outcome_of(3)
            watch.write(0.0, MoveOrdered(1, 2), ())
            assert not future.done()
            watch.write(0.0, event, ())
            assert future.result()[0] == outcome and future.result()[1] and not other.done()
            watch.forget(3, other)
        watch.write(0.0, Aborted(3), ())
        assert not other.done()
        watch.close()

    run(work)


# -- draining ---------------------------------------------------------------------------------------------------------


def test_a_drained_instance_is_empty_and_stays_so() -> None:
    async def work() -> None:
        async with operated() as hand:
            alone = await references(hand, 6)
            streams = await decoding(hand, 6)
            before = {r["id"]: r["instance"] for r in (await hand.get("/requests"))["requests"]}
            assert 1 in before.values()
            held = await hand.order("/instances/1/drain", {"wait": True, "timeout_s": 30})
            assert held["drained"] and held["held"] and not held["draining"] and held["remaining"] == 0
            assert held["moved"] >= 1 and held["waiting_for"] == []
            assert hand.b.world.instances[1].held
            more = await decoding(hand, 3)
            where = {r["instance"] for r in (await hand.get("/requests"))["requests"]}
            assert 1 not in where
            again = await hand.order("/instances/1/drain", {"wait": True})
            assert again["drained"]
            await hand.order("/instances/1/undrain")
            assert not (await hand.get("/instances/1"))["held"]
            last = await decoding(hand, 2)
            assert 1 in {r["instance"] for r in (await hand.get("/requests"))["requests"]}
            await ended(streams + more + last)
            assert [s.ids for s in streams] == [s.ids for s in alone]
            await hand.b.settled()

    run(work)


def test_a_drain_overrules_what_a_policy_planned_on_arrival() -> None:
    """The xLLM policy chooses the decode instance with the prefill instance; a held one is not to be used after all."""

    async def work() -> None:
        async with operated(policy="xllm") as hand:
            streams = await decoding(hand, 4)
            busy = {r["instance"] for r in (await hand.get("/requests"))["requests"]}.pop()
            await hand.order(f"/instances/{busy}/drain", {"wait": True, "timeout_s": 30, "force": True})
            assert busy not in {r["instance"] for r in (await hand.get("/requests"))["requests"]}
            assert not any(s.over.is_set() for s in streams)
            await ended(streams)
            await hand.b.settled()

    run(work)


def test_a_drain_waits_for_what_cannot_move_and_says_so() -> None:
    async def work() -> None:
        async with operated() as hand:
            streams = await decoding(hand, 4, seed=1)
            progress = await hand.order("/instances/2/drain", {"wait": True, "timeout_s": 0})
            assert progress["draining"] and progress["remaining"] >= 1 and not progress["drained"]
            assert all(blocker["why"] == "seed" for blocker in progress["waiting_for"])
            row = await hand.get("/instances/2")
            assert row["draining"] and row["held"] and row["remaining"] == progress["remaining"]
            await ended(streams)
            over = await hand.order("/instances/2/drain", {"wait": True})
            assert over["drained"] and over["moved"] == 0
            await hand.b.settled()

    run(work)


def test_a_drain_can_be_called_off() -> None:
    async def work() -> None:
        async with operated() as hand:
            streams = await decoding(hand, 4, seed=1)
            assert (await hand.order("/instances/2/drain"))["draining"]
            assert (await hand.order("/instances/2/undrain"))["draining"] is False
            assert not (await hand.get("/instances/2"))["held"]
            await ended(streams)
            assert hand.b.world.instances[2].health is Health.UP
            await hand.b.settled()

    run(work)


def test_the_last_of_a_role_is_kept() -> None:
    async def work() -> None:
        async with operated() as hand:
            assert "last prefill" in await hand.refused(409, "/instances/0/drain", {})
            assert "last prefill" in await hand.refused(409, "/instances/0/flip", {"role": "decode"})
            assert "last prefill" in await hand.refused(409, "/instances/0", method="DELETE")
            await hand.order("/instances/1/drain")
            assert "last decode" in await hand.refused(409, "/instances/2/drain", {})
            await hand.order("/instances/2/drain", {"force": True})
            # Nobody decodes now: a request waits until somebody does again.
            stream = hand.b.stream(body(20))
            async with asyncio.timeout(20):
                while not (await hand.get("/status"))["parked"]:
                    await asyncio.sleep(0)
            assert (await hand.get("/requests"))["requests"][0]["stage"] == "waiting for an instance"
            await hand.order("/instances/2/undrain")
            await ended([stream])
            assert len(stream.ids) == 20
            await hand.b.settled()

    run(work)


# -- roles, coming and going ------------------------------------------------------------------------------------------


def test_a_flip_changes_where_work_goes() -> None:
    async def work() -> None:
        async with operated() as hand:
            streams = await decoding(hand, 4)
            told = await hand.order("/instances/2/flip", {"role": "prefill"})
            assert (told["before"], told["role"], told["notes"]) == ("decode", "prefill", [])
            assert hand.b.world.instances[2].role is Role.PREFILL
            more = await decoding(hand, 3)
            late = {name_of(s) for s in more}
            rows = (await hand.get("/requests"))["requests"]
            assert {r["instance"] for r in rows if r["id"] in late} == {1}
            assert 2 in {r["instance"] for r in rows}  # what ran there stays
            idle = await hand.order("/instances/2/flip", {"role": "mixed"})
            assert "gives nothing to mixed" in idle["notes"][0]
            assert "no role" in await hand.refused(400, "/instances/2/flip", {"role": "cook"})
            await ended(streams + more)
            await hand.b.settled()

    run(work)


def test_attach_and_detach() -> None:
    async def work() -> None:
        async with operated(roles=(Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE)) as hand:
            alone = await references(hand, 6)
            streams = await decoding(hand, 6)
            url = hand.b.world.instances[3].url
            assert "already" in await hand.refused(409, "/instances", {"url": url, "role": "decode"})
            gone = await hand.order("/instances/3?wait=true&timeout_s=30", method="DELETE")
            assert gone["health"] == "gone" and gone["remaining"] == 0
            assert [i["instance"] for i in (await hand.get("/instances"))["instances"]] == [0, 1, 2]
            await hand.refused(404, "/instances/3/drain", {})
            # It comes back under its number, with another role, and gets work.
            back = await hand.order("/instances", {"url": url + "/", "role": "prefill"})
            assert back == {"instance": 3, "url": url, "role": "prefill"}
            assert hand.b.world.controller.view.role[3] == Role.PREFILL and not hand.b.world.instances[3].held
            assert 3 in hand.b.world.controller.view.prefills
            more = await decoding(hand, 4)
            await ended(streams + more)
            assert [s.ids for s in streams] == [s.ids for s in alone]
            assert "does not answer" in await hand.refused(
                400, "/instances", {"url": "http://127.0.0.1:9", "role": "decode"}
            )
            assert "no server" in await hand.refused(400, "/instances", {"url": "file:///etc/passwd", "role": "decode"})
            await hand.b.settled()

    run(work)


def test_detach_by_force_starts_streams_again_elsewhere() -> None:
    async def work() -> None:
        async with operated() as hand:
            alone = await references(hand, 4)
            streams = await decoding(hand, 4)
            assert 2 in {r["instance"] for r in (await hand.get("/requests"))["requests"]}
            gone = await hand.order("/instances/2?force=true", method="DELETE")
            assert gone["health"] == "gone" and gone["remaining"] == 0
            await ended(streams)
            assert [s.ids for s in streams] == [s.ids for s in alone]
            assert {i["instance"] for i in (await hand.get("/instances"))["instances"]} == {0, 1}
            await hand.refused(400, "/instances/1?sure=yes", method="DELETE")

    run(work)


def test_undrain_calls_off_a_detach() -> None:
    async def work() -> None:
        async with operated() as hand:
            streams = await decoding(hand, 4, seed=1)
            waiting = await hand.order("/instances/2", method="DELETE")
            assert waiting["draining"] and waiting["health"] == "up"
            await hand.order("/instances/2/undrain")
            await ended(streams)
            await hand.b.settled()
            assert (await hand.get("/instances/2"))["health"] == "up"

    run(work)


# -- policy -----------------------------------------------------------------------------------------------------------


def test_policies_swap_under_load() -> None:
    async def work() -> None:
        async with operated(roles=(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)) as hand:
            alone = await references(hand, 3, 120)
            streams: list[Stream] = []
            for name in ("ares", "round-robin", "arrow", "llumnix", "xllm", "static", "ares-none", "least-kv"):
                streams += [hand.b.stream(body(120, start=i)) for i in range(3)]
                await streams[-1].tokens(2)
                told = await hand.order("/policy", {"name": name})
                assert told["policy"] == name == (await hand.get("/status"))["policy"]
            await ended(streams)
            assert all(s.ids == alone[i % 3].ids for i, s in enumerate(streams))
            await hand.b.settled()

    run(work)


def test_a_policy_without_disaggregation_takes_over_prefills_in_flight() -> None:
    async def work() -> None:
        async with operated(roles=(Role.PREFILL, Role.DECODE, Role.DECODE)) as hand:
            assert "mixed" in await hand.refused(409, "/policy", {"name": "mixed"})
            await hand.order("/instances/2/flip", {"role": "mixed"})
            alone = await hand.b.whole(body(60))
            streams = [hand.b.stream(body(60)) for _ in range(3)]
            async with asyncio.timeout(20):
                while not any(i.prefills for i in hand.b.world.instances.values()):
                    await asyncio.sleep(0)
            await hand.order("/policy", {"name": "mixed", "options": {"placement": "round-robin"}})
            streams.append(hand.b.stream(body(60)))
            await streams[-1].tokens(2)
            await hand.order("/policy", {"name": "least-kv"})
            await ended(streams)
            assert all(s.ids == alone.ids for s in streams)
            await hand.b.settled()

    run(work)


def test_policies_are_checked_before_they_are_chosen() -> None:
    async def work() -> None:
        async with operated() as hand:
            assert "did you mean ares" in await hand.refused(400, "/policy", {"name": "aras"})
            assert "horizon" in await hand.refused(400, "/policy", {"name": "ares", "options": {"horizen": 3}})
            await hand.refused(400, "/policy", {"name": "ares", "options": {"horizon": "soon"}})
            await hand.refused(400, "/policy", {"name": "ares", "options": {"beliefs": 1}})
            await hand.refused(400, "/policy", {})
            assert (await hand.get("/status"))["policy"] == "least-kv"
            told = await hand.order("/policy", {"name": "ares", "options": {"horizon": 512}})
            assert told["before"] == "least-kv" and told["tick_s"] > 0 and float(told["options"]["horizon"]) == 512

    run(work)


# -- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["least-kv", "ares", "xllm", "arrow"])
def test_the_event_log_replays_every_order(tmp_path: Path, policy: str) -> None:
    log = tmp_path / "orders.jsonl.gz"

    async def work() -> None:
        async with operated((Role.PREFILL, *[Role.DECODE] * 3), policy, record=log) as hand:
            streams = await decoding(hand, 8)
            rows = (await hand.get("/requests"))["requests"]
            for row in rows[:4]:
                to = 1 + row["instance"] % 3
                await hand.raw("POST", f"/requests/{row['id']}/migrate", {"to": to, "wait": True})
            await hand.order("/instances/1/drain", {"wait": True, "force": True})
            await hand.order("/instances/1/flip", {"role": "prefill"})
            await hand.order("/instances/1/undrain")
            await hand.order("/policy", {"name": "ares", "options": {"horizon": 1024}})
            streams += await decoding(hand, 3)
            url = hand.b.world.instances[3].url
            await hand.order("/instances/3?wait=true&force=true", method="DELETE")
            await hand.order("/policy", {"name": "round-robin"})
            await hand.order("/instances", {"url": url, "role": "decode"})
            streams += await decoding(hand, 3)
            await ended(streams)
            await hand.b.settled()

    run(work)
    found = replay(log)
    assert found.identical, found.difference
    assert found.events > 60 and found.actions > 25 and not found.cut


# -- the door ---------------------------------------------------------------------------------------------------------


def test_the_key_is_asked_for() -> None:
    async def work() -> None:
        async with operated() as hand:
            for key in ("", "wrong", KEY + "x", KEY[:-1], "é"):
                answer = await hand.raw("GET", "/status", key=key)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert json.loads(answer.body)["remedy"]
            answer = await hand.b.client.fetch(hand.admin.url, "GET", "/status", headers={"authorization": KEY})
            assert answer.status == 401
            answer = await hand.b.client.fetch(hand.admin.url, "DELETE", "/instances/1?force=true")
            assert answer.status == 401 and hand.b.world.instances[1].health is Health.UP
            # The gateway's own port knows nothing of it.
            assert (await hand.b.get("/status")).status == 404

    run(work)


def test_what_is_not_there_is_404() -> None:
    async def work() -> None:
        async with operated() as hand:
            for method, path in (
                ("GET", "/"),
                ("GET", "/nothing"),
                ("GET", "/instances/7"),
                ("GET", "/instances/-1"),
                ("GET", "/instances/one"),
                ("GET", "/requests/abc"),
                ("GET", "/requests/%2e%2e%2fx"),
                ("POST", "/status"),
                ("PUT", "/policy"),
                ("POST", "/instances/7/drain"),
                ("POST", "/instances/0/explode"),
                ("DELETE", "/instances/7"),
                ("DELETE", "/requests/abc"),
            ):
                await hand.refused(404, path, None, method)

    run(work)


def test_the_state_file_holds_the_made_key_and_goes(tmp_path: Path) -> None:
    async def work() -> None:
        async with bench() as b:
            admin = Admin(b.deployment)
            url = await admin.start()
            path = admin.state_file
            assert path is not None and path.parent == tmp_path / "penstock"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            found = state.the_one()
            assert (found.url, found.key, found.pid) == (url, admin.key, os.getpid())
            assert len(admin.key) >= 32
            assert state.key_of(url) == admin.key and state.key_of("http://127.0.0.1:1") is None
            await admin.stop()
            assert not path.exists() and state.running() == []
            # A key that somebody chose is not written anywhere.
            other = Admin(b.deployment)
            await other.start(key="chosen-by-hand")
            assert other.state_file is not None and "chosen-by-hand" not in other.state_file.read_text()
            await other.stop()

    run(work)


def test_the_file_of_a_dead_process_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "penstock"
    folder.mkdir()
    dead = state.Found("http://127.0.0.1:1", "k", os.getpid(), started_s=1.0)  # the number lives on in another process
    (folder / "1.json").write_bytes(msgspec.json.encode(dead))
    (folder / "2.json").write_bytes(b"{")
    assert state.running() == []
    state.withdraw(folder / "2.json")
    assert (folder / "2.json").exists()
