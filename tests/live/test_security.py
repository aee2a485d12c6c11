"""What clients must not be able to do, and must not get to see."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from penstock.live import health, world
from penstock.live.emulated.instance import EmulatedEngine
from penstock.live.gateway import GatewaySettings
from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Limits
from penstock.live.instance import Health
from tests.live.answers import CHAT, COMPLETIONS, ENGINE, more, quick
from tests.live.support import PDD, Bench, bench, ids, run

PROMPT = ids(40)
SECRET = "hunter2 at 10.11.12.13:8000 in /srv/engine/secret.py"
CHAT_BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
STOLEN = {
    "do_remote_prefill": True,
    "remote_engine_id": "x",
    "remote_request_id": "y",
    "remote_block_ids": [[1, 2, 3]],
    "remote_host": "127.0.0.1",
    "remote_port": 1,
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances that are well again are taken back at once, and nobody waits long for one."""
    monkeypatch.setattr(health, "RECOVERY_S", 0.05)
    monkeypatch.setattr(world, "PARK_S", 0.2)


# -- keys -----------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD, gateway=GatewaySettings(api_keys=("one", "zwö"))) as b:
            for given, status in (
                ({}, 401),
                ({"authorization": "Bearer two"}, 401),
                ({"authorization": "Bearer "}, 401),
                ({"authorization": "Bearer one "}, 200),
                ({"authorization": "bearer one"}, 200),
                ({"authorization": "Basic one"}, 401),
                ({"authorization": "one"}, 401),
                ({"authorization": "Bearer onetwo"}, 401),
                ({"x-api-key": "one"}, 401),
            ):
                for path, body in (
                    (COMPLETIONS, {"prompt": PROMPT}),
                    (CHAT, CHAT_BODY),
                    ("/tokenize", {"prompt": "x"}),
                ):
                    answer = await b.post(body, path, headers=given)
                    assert answer.status == status, (given, path)
                    if status == 401:
                        assert answer.headers["www-authenticate"] == "Bearer"
                        assert msgspec.json.decode(answer.body)["error"]["type"] == "AuthenticationError"
                models = await b.client.fetch(b.url, "GET", "/v1/models", headers=given)
                assert models.status == status
            # What orchestrators and scrapers ask needs no key.
            for path in ("/health", "/ping", "/ready", "/metrics"):
                assert (await b.get(path)).status == 200
            await b.settled()

    run(work)


def test_a_refused_client_learns_nothing_of_paths_or_models() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD, gateway=GatewaySettings(api_keys=("one",))) as b:
            for path in ("/v1/models", "/nothing", "/openapi.json", "/version", COMPLETIONS):
                answer = await b.get(path)
                assert answer.status == 401
                assert ENGINE.encode() not in answer.body
            await b.settled()

    run(work)


# -- transfer parameters --------------------------------------------------------------------------------------------

P = msgspec.json.encode(STOLEN).decode()
SMUGGLED: list[bytes] = [
    b'{"prompt":"x","kv_transfer_params":%s}' % P.encode(),
    b'{"prompt":"x","kv_transfer_params":{"do_remote_decode":true}}',
    b'{"prompt":"x","kv_transfer_params":[]}',
    b'{"prompt":"x","kv_transfer_params":0}',
    b'{"prompt":"x","kv_transfer_params":null,"kv_transfer_params":{"do_remote_decode":true}}',
    b'{"prompt":"x","kv\\u005ftransfer_params":{"do_remote_decode":true}}',
    b'{"prompt":"x","\\u006bv_transfer_param\\u0073":{"do_remote_decode":true}}',
]
FIRST_OF_TWO = b'{"prompt":"x","kv_transfer_params":{"do_remote_decode":true},"kv_transfer_params":null}'


@pytest.mark.parametrize("raw", SMUGGLED)
def test_transfer_parameters_of_a_client_are_refused(raw: bytes) -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/v1/messages", "/v1/responses"):
                answer = await b.post(raw, path)
                assert answer.status == 400, path
                assert b"kv_transfer_params" in answer.body
            await b.settled()
            assert b.world.claims.issued == 0

    run(work)


def test_transfer_parameters_that_another_parser_might_see_never_reach_an_engine() -> None:
    """Of a key given twice the last one counts, here and in the body that engines get, which is written anew."""

    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            seen = _bodies_at_engines(b)
            assert (await b.post(FIRST_OF_TWO)).status == 200
            assert (await b.post(FIRST_OF_TWO[:-1] + b',"n":2}')).status == 200
            assert (await b.post(FIRST_OF_TWO, "/tokenize")).status == 400  # would go as it is
            nested = b'{"messages":[{"role":"user","content":"x","kv_transfer_params":{"a":1}}]}'
            assert (await b.post(nested, "/tokenize")).status == 400
            assert (await b.post(SMUGGLED[0].decode().encode("utf-16"), "/tokenize")).status == 400
            assert (await b.post(SMUGGLED[0].decode().encode("utf-16"))).status == 400
            form = b"--x\r\nContent-Disposition: form-data; name=kv_transfer_params\r\n\r\n{}\r\n--x--\r\n"
            headers = {"content-type": "multipart/form-data; boundary=x"}
            assert (await b.post(form, "/v1/audio/transcriptions", headers)).status == 400
            await b.settled()
            assert seen
            for body in seen:
                params = msgspec.json.decode(body).get("kv_transfer_params") or {}
                assert params.get("remote_engine_id") != "x"
                assert body.count(b"kv_transfer_params") <= 1

    run(work)


def test_a_text_may_speak_of_transfer_parameters() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            text = 'What are "kv_transfer_params": {"a": 1}?'
            for path, body in (("/tokenize", {"prompt": text}), (COMPLETIONS, {"prompt": text})):
                assert (await b.post(body, path)).status == 200
            await b.settled()

    run(work)


def _bodies_at_engines(b: Bench) -> list[bytes]:
    """Bodies of requests that engines get from now on."""
    seen: list[bytes] = []
    for engine in b.fleet.engines:
        handle = engine._api.handle

        def noting(reply: Any, handle: Any = handle) -> None:
            if reply.request.method == "POST":
                seen.append(reply.request.body)
            handle(reply)

        engine._api.handle = noting  # type: ignore[method-assign]
    return seen


# -- what engines say stays inside ----------------------------------------------------------------------------------


def clean(b: Bench, data: bytes, headers: dict[str, str]) -> None:
    """Nothing of the secret, of engines' addresses or of their own headers is there."""
    everything = data + repr(headers).encode()
    for word in ("hunter2", "10.11.12.13", "/srv/", "Traceback", "stack trace", "EngineCore", "remote_", "Pydantic"):
        assert word.encode() not in everything, everything
    for engine in b.fleet.engines:
        assert str(engine.port).encode() not in everything
    assert "server" not in headers


BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 60}),
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 60, "n": 2}),
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 60, "seed": 1}),
    (CHAT, {**CHAT_BODY, "max_tokens": 60}),
    (CHAT, {**CHAT_BODY, "max_tokens": 60, "logprobs": True}),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_an_engines_complaint_is_not_passed_on(path: str, body: dict[str, Any], stream: bool) -> None:
    """All engines fail all that runs, again and again, until the client is told so."""

    async def work() -> None:
        async with bench(engine=quick(lease_s=1.0), roles=PDD) as b:
            sink = b.stream({**body, "stream": stream}, path)
            while not sink.over.is_set():
                for engine in b.fleet.engines:
                    engine.driver.fail_all(SECRET)
                await asyncio.sleep(0.004)
            assert sink.head is not None and sink.fault is None
            clean(b, sink.raw, sink.head.headers)
            if sink.head.status == 200:
                assert b"error" in sink.raw
                assert sink.raw.endswith(b"data: [DONE]\n\n")
            else:
                assert sink.head.status in (502, 503)
                assert "error" in msgspec.json.decode(sink.raw)
            await b.settled()

    run(work)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500, 502, 503])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/v1/embeddings"])
def test_error_answers_of_engines_are_put_in_our_own_words(path: str, status: int) -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            for engine in b.fleet.engines:
                _answer_with(engine, status)
            body = {**CHAT_BODY, "max_tokens": 5} if path == CHAT else {"prompt": "x", "max_tokens": 5}
            for further in ({}, {"stream": True}, {"n": 2}, {"n": 2, "stream": True}):
                # All engines may be fenced by now, so that a request would wait for one to come back.
                for instance in b.world.instances.values():
                    if instance.health is not Health.UP:
                        return
                answer = await b.post({**body, **further}, path)
                assert answer.status >= 400
                assert answer.status != 500
                assert "error" in msgspec.json.decode(answer.body)
                clean(b, answer.body, answer.headers)
            await b.settled()

    def _answer_with(engine: EmulatedEngine, status: int) -> None:
        handle = engine._api.handle

        def refusing(reply: Any) -> None:
            if reply.request.method == "POST" and reply.request.headers.get("content-type"):
                body = msgspec.json.encode({"error": {"message": SECRET, "type": "x", "param": SECRET, "code": status}})
                reply.send(status, body, headers={"server": "uvicorn", "x-internal": SECRET})
            else:
                handle(reply)

        engine._api.handle = refusing  # type: ignore[method-assign]

    run(work)


def test_a_complaint_in_the_middle_of_what_was_read_is_cut_out() -> None:
    """A chunk and the complaint may come in one read, and the complaint in several."""

    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            chunk = b'data: {"id":"x","object":"text_completion","choices":[{"index":0,"text":"a"}]}\n\n'
            complaint = b'data: {"error":{"message":"%s"}}\n\ndata: [DONE]\n\n' % SECRET.encode()
            for parts in ([chunk + complaint], [chunk + complaint[:9], complaint[9:30], complaint[30:]]):
                for engine in b.fleet.engines:
                    _say(engine, parts)
                stream = await b.whole({"prompt": PROMPT, "n": 2})
                assert stream.head is not None
                assert chunk in stream.raw and b"error" in stream.raw
                clean(b, stream.raw, stream.head.headers)

    def _say(engine: EmulatedEngine, parts: list[bytes]) -> None:
        handle = type(engine._api).handle

        def saying(reply: Any) -> None:
            if b'"n":2' not in reply.request.body:
                handle(engine._api, reply)
                return
            reply.start()

            async def speak() -> None:
                for part in parts:
                    reply.write(part)
                    await asyncio.sleep(0.01)
                reply.end()

            tasks.add(asyncio.get_running_loop().create_task(speak()))

        engine._api.handle = saying  # type: ignore[method-assign]

    tasks: set[asyncio.Task[None]] = set()
    run(work)


# -- sizes and shapes -----------------------------------------------------------------------------------------------


def test_too_much_of_anything() -> None:
    async def work() -> None:
        limits = Limits(head_bytes=4096, body_bytes=100_000)
        async with bench(engine=quick(), roles=PDD, limits=limits) as b:
            assert (await b.post(b'{"prompt":"' + b"x" * 200_000 + b'"}')).status == 413
            assert (await b.post({"prompt": "x"}, headers={"x-long": "y" * 5000})).status == 431
            assert (await b.post({"prompt": "x"}, "/v1/" + "y" * 5000)).status == 431
            assert (await b.post(b'{"prompt":' + b"[" * 50_000)).status == 400
            assert (await b.post(b'{"prompt":' + b"[" * 40_000 + b"]" * 40_000 + b"}")).status == 400
            assert (await b.post(b'{"prompt":' + b"[" * 40_000 + b"]" * 40_000 + b"}", "/tokenize")).status == 400
            assert (await b.post(b'{"prompt":"x","stop":' + msgspec.json.encode(["y"] * 65) + b"}")).status == 400
            await b.settled()

    run(work)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123_x.y:z", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("", False),
        ("a b", False),
        ("a\tb", False),
        ("../../etc", False),
        ("<script>", False),
        ("h\xe9", False),
        ('"quoted"', False),
        ("a,b;c", False),
    ],
)
def test_request_ids(given: str, kept: bool) -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            for further in ({}, {"n": 2}):
                answers = [await b.post({"prompt": PROMPT, **further}, headers={"x-request-id": given}) for _ in (1, 2)]
                names = [a.headers["x-request-id"] for a in answers]
                assert names[0] != names[1]
                for answer, name in zip(answers, names, strict=True):
                    assert name.startswith(given + "-") == (kept and bool(given))
                    assert name.isascii() and all(c.isalnum() or c in "-_.:" for c in name)
                    assert msgspec.json.decode(answer.body)["id"] == "cmpl-" + name
            await b.settled()

    run(work)


def test_a_client_cannot_choose_what_engines_are_told_in_headers() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            seen: list[dict[str, str]] = []
            for engine in b.fleet.engines:
                handle = engine._api.handle

                def noting(reply: Any, handle: Any = handle) -> None:
                    seen.append(reply.request.headers)
                    handle(reply)

                engine._api.handle = noting  # type: ignore[method-assign]
            evil = {
                "x-data-parallel-rank": "7",
                "cookie": "a=b",
                "authorization": "Bearer of-the-client",
                "x-evil": "1",
            }
            for path, body in (*BODIES, ("/tokenize", {"prompt": "x"})):
                assert (await b.post(body, path, headers=evil)).status == 200
            assert seen
            for headers in seen:
                assert not set(evil) & set(headers)
            await b.settled()

    run(work)


def test_odd_paths_and_queries_do_no_harm() -> None:
    """Sent as raw bytes: our own client would not let them out."""
    targets = [
        b"/v1/\xc3\xa9",
        b"/v1/x?\xc3\xa9=1",
        b"/v1/%00",
        b"/v1/a b",
        b"/v1/models?x=%0d%0aevil:1",
        b"//v1/models",
    ]
    targets += [
        b"/version?a=\x7f",
        b"/v1/" + b"a/" * 200,
        b"/v1/models/..",
        b"/v1/./models",
        b"/tokenize;x",
        b"/v1/\\x",
    ]

    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            host, port = b.url.removeprefix("http://").split(":")
            for target in targets:
                for method in (b"GET", b"POST"):
                    reader, writer = await asyncio.open_connection(host, int(port))
                    head = b"%b %b HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
                    writer.write(head % (method, target))
                    async with asyncio.timeout(5):
                        answer = await reader.read()
                    status = int(answer.split(b" ", 2)[1])
                    assert status in (200, 400, 404, 405), (target, answer)
                    clean(b, answer.partition(b"\r\n\r\n")[2], {})
                    writer.close()
            await b.settled()

    run(work)


def test_the_door_is_on_loopback_unless_told_otherwise() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            assert b.url.startswith("http://127.0.0.1:")

    run(work)


def test_urls_of_engines_come_from_configuration_only() -> None:
    """A request in absolute form, or for another host, is still answered by us."""

    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            other = HttpClient()
            host, port = b.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET http://127.0.0.1:1/health HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()
            stream = b.stream({"prompt": PROMPT, "remote_host": "evil", "base_url": "http://evil"})
            await more(stream, 3)
            await stream.over.wait()
            assert stream.done
            await other.close()
            await b.settled()

    run(work)
