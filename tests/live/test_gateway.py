"""What clients of the gateway get, against what the engine says when asked directly."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from penstock.core.types import MigrationLevel, Role
from penstock.live.openapi import document
from tests.live.answers import CHAT, COMPLETIONS, ENGINE, chunks_of, direct, order, quick, text_of, until
from tests.live.emulated.support import expected
from tests.live.support import PDD, Bench, bench, ids, run

PROMPT = ids(40)
TEXT = "An ünusual prompt, with 日本 in it."
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
GREEDY = {"temperature": 0, "max_tokens": 60}
# Keys that an engine adds and that mean nothing to OpenAI's clients, or that differ from request to request.
VOLATILE = ("id", "created", "kv_transfer_params", "system_fingerprint")

BODIES: list[dict[str, Any]] = [
    {},
    {"return_token_ids": True},
    {"max_tokens": 1},
    {"max_tokens": 1, "return_token_ids": True},
    {"max_tokens": 2},
    {"stop": "e"},
    {"stop": ["zzzz", " t"], "include_stop_str_in_output": True},
    {"stop": ["never to be seen"]},
    {"stop_token_ids": [ord("e")], "return_token_ids": True},
    {"stop_token_ids": [ord("e")], "include_stop_str_in_output": True},
    {"stop_token_ids": [ord("e"), ord(" ")], "min_tokens": 20, "return_token_ids": True},
    {"min_tokens": 20, "stop": "e"},
    {"n": 2},
    {"logprobs": True},
    {"ignore_eos": True, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "user": "me"},
    {"logit_bias": {"5": 1}, "skip_special_tokens": False, "spaces_between_special_tokens": True, "priority": 1},
    {"seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"made_up_parameter": {"a": [1, None]}},
    {"metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
]
KINDS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": PROMPT}),
    (COMPLETIONS, {"prompt": TEXT}),
    (CHAT, {"messages": MESSAGES}),
]


def adapted(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Logprobs are a number for completions."""
    if path == COMPLETIONS and body.get("logprobs"):
        return {**body, "logprobs": 3}
    return {**body, "top_logprobs": 2} if body.get("logprobs") else body


def plain(answer: dict[str, Any]) -> Any:
    """An answer without what may differ, and without empty fields: engines write some as null, some not at all."""
    found = {k: v for k, v in answer.items() if k not in VOLATILE}
    return _without_nothing(found)


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nothing(v) for k, v in value.items() if v is not None and v != []}
    if isinstance(value, list):
        return [_without_nothing(v) for v in value]
    return value


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a stream adds up to, by choice: chunks may be cut at other places."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = found.setdefault(choice["index"], {"text": "", "ids": [], "prompt": None, "finish": None})
            delta = choice.get("delta")
            whole["text"] += choice["text"] if delta is None else delta.get("content") or ""
            whole["ids"] += choice.get("token_ids") or []
            for place in (chunk, choice):
                whole["prompt"] = whole["prompt"] or place.get("prompt_token_ids")
            if choice.get("finish_reason"):
                assert whole["finish"] is None
                whole["finish"] = (choice["finish_reason"], choice.get("stop_reason"))
            if choice.get("logprobs"):
                whole.setdefault("logprobs", []).append(choice["logprobs"])
    return found


async def compare(b: Bench, path: str, further: dict[str, Any]) -> None:
    """The gateway's whole answer is the engine's."""
    body = {"model": ENGINE, **GREEDY, **further}
    ours, theirs = await asyncio.gather(b.post(body, path), direct(b, body, path))
    assert theirs.status == 200, (further, theirs.body)
    assert ours.status == 200, (further, ours.body)
    assert plain(msgspec.json.decode(ours.body)) == plain(msgspec.json.decode(theirs.body)), further
    assert b"kv_transfer_params" not in ours.body


async def compare_streams(b: Bench, path: str, further: dict[str, Any]) -> None:
    """The gateway's stream adds up to the engine's."""
    body = {"model": ENGINE, **GREEDY, "stream": True, **further}
    stream, theirs = await asyncio.gather(b.whole(body, path), direct(b, body, path))
    assert theirs.status == 200, (further, theirs.body)
    assert stream.head is not None and stream.head.status == 200, (further, stream.raw)
    assert stream.done, further
    reference = chunks_of(theirs.body)
    assert joined(stream.chunks) == joined(reference), further
    assert {c["id"] for c in stream.chunks} == {stream.chunks[0]["id"]}
    assert {c["object"] for c in stream.chunks} == {reference[0]["object"]}
    assert {c["model"] for c in stream.chunks} == {ENGINE}
    assert stream.chunks[-1].get("usage") == reference[-1].get("usage")
    if path == CHAT:
        roles = [c["choices"][0]["delta"].get("role") for c in stream.chunks if c["choices"]]
        assert roles[0] == "assistant" and roles.count("assistant") == further.get("n", 1)


@pytest.mark.parametrize(("path", "kind"), KINDS, ids=["ids", "text", "chat"])
def test_a_client_gets_what_the_engine_would_have_said(path: str, kind: dict[str, Any]) -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            await asyncio.gather(*(compare(b, path, {**kind, **adapted(path, further)}) for further in BODIES))
            await b.settled()

    run(work)


@pytest.mark.parametrize(("path", "kind"), KINDS, ids=["ids", "text", "chat"])
def test_streams_add_up_to_what_the_engine_would_have_streamed(path: str, kind: dict[str, Any]) -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            bodies = [*BODIES, {"stream_options": {"include_usage": True}}]
            await asyncio.gather(*(compare_streams(b, path, {**kind, **adapted(path, f)}) for f in bodies))
            await b.settled()

    run(work)


@pytest.mark.parametrize(("path", "kind"), KINDS, ids=["ids", "text", "chat"])
def test_usage_in_every_chunk(path: str, kind: dict[str, Any]) -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            options = {"include_usage": True, "continuous_usage_stats": True}
            body = {"model": ENGINE, **GREEDY, **kind, "stream_options": options}
            stream = await b.whole(body, path)
            usages = [c["usage"] for c in stream.chunks]
            assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)
            counts = [u["completion_tokens"] for u in usages]
            assert counts == sorted(counts) and counts[-1] == 60
            assert len({u["prompt_tokens"] for u in usages}) == 1
            assert stream.chunks[-1]["choices"] == []
            await b.settled()

    run(work)


def test_headers_say_what_may_move_and_why_not() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        (COMPLETIONS, {"prompt": PROMPT}, "yes"),
        (CHAT, {"messages": MESSAGES}, "yes"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "text"}}, "yes"),
        (COMPLETIONS, {"prompt": PROMPT, "n": 2}, "no; reason=several-choices"),
        (COMPLETIONS, {"prompt": [PROMPT, PROMPT]}, "no; reason=several-prompts"),
        (COMPLETIONS, {"prompt": PROMPT, "seed": 1}, "no; reason=seed"),
        (COMPLETIONS, {"prompt": PROMPT, "logprobs": 1}, "no; reason=logprobs"),
        (COMPLETIONS, {"prompt": PROMPT, "presence_penalty": 1}, "no; reason=penalty"),
        (COMPLETIONS, {"prompt": PROMPT, "bad_words": ["x"]}, "no; reason=bad-words"),
        (COMPLETIONS, {"prompt": PROMPT, "min_tokens": 2, "stop": "x"}, "no; reason=stop-with-min-tokens"),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "no; reason=tools"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "no; reason=guided-decoding"),
        (CHAT, {"messages": MESSAGES, "continue_final_message": True}, "no; reason=continued-message"),
        (COMPLETIONS, {"prompt": PROMPT, "structured_outputs": {"regex": "a"}}, "no; reason=guided-decoding"),
        (COMPLETIONS, {"prompt": PROMPT, "something": 1}, "no; reason=unknown-parameter"),
    ]

    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            for stream in (False, True):
                every = [({"model": ENGINE, **GREEDY, **body, "stream": stream}, path) for path, body, _ in cases]
                answers = await asyncio.gather(*(b.post(*one) for one in every))
                assert [a.status for a in answers] == [200] * len(cases)
                assert [a.headers["penstock-movable"] for a in answers] == [said for _, _, said in cases]
            echo = await b.post({"model": ENGINE, **GREEDY, "prompt": PROMPT, "echo": True})
            assert echo.status == 400  # the emulated engine knows no echo
            assert echo.headers["penstock-movable"] == "no; reason=echo"
            await b.settled()

    run(work)


def test_the_model_may_be_left_out_and_null_means_default() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            nothing = dict.fromkeys(["stop", "n", "stream", "top_p", "logprobs", "tools", "stream_options", "penstock"])
            answer = await b.post({"prompt": PROMPT, "max_tokens": 30, **nothing})
            assert answer.status == 200
            assert answer.headers["penstock-movable"] == "yes"
            assert msgspec.json.decode(answer.body)["choices"][0]["text"] == text_of(PROMPT, 30)
            await b.settled()

    run(work)


def test_sixteen_tokens_is_what_a_completion_gets_that_asks_for_nothing() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            answer = msgspec.json.decode((await b.post({"prompt": PROMPT})).body)
            assert answer["usage"] == {"prompt_tokens": 40, "completion_tokens": 16, "total_tokens": 56}
            await b.settled()

    run(work)


def test_a_chat_without_a_limit_ends_at_the_context() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.0005, max_model_len=200), roles=PDD) as b:
            chat = {"messages": [{"role": "user", "content": "Hi"}]}
            answer, theirs = await asyncio.gather(b.post(chat, CHAT), direct(b, chat, CHAT))
            assert plain(msgspec.json.decode(answer.body)) == plain(msgspec.json.decode(theirs.body))
            assert msgspec.json.decode(answer.body)["usage"]["total_tokens"] == 200
            await b.settled()

    run(work)


def test_sequences_that_end_by_themselves() -> None:
    async def work() -> None:
        async with bench(engine=quick(mean_output=12), roles=PDD) as b:
            for seed in range(25):
                body = {"prompt": ids(20, seed), "max_tokens": 100, "return_token_ids": True}
                ours, theirs = await asyncio.gather(b.post(body), direct(b, body))
                assert plain(msgspec.json.decode(ours.body)) == plain(msgspec.json.decode(theirs.body))
                streamed = await b.whole(body)
                assert streamed.ids == msgspec.json.decode(theirs.body)["choices"][0]["token_ids"]
                assert streamed.finish == msgspec.json.decode(theirs.body)["choices"][0]["finish_reason"]
            await b.settled()

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_the_clients_mistake(stream: bool) -> None:
    async def work() -> None:
        async with bench(engine=quick(max_model_len=256), roles=PDD) as b:
            cases: list[tuple[str, dict[str, Any]]] = [
                (COMPLETIONS, {"prompt": ids(250), "max_tokens": 10}),
                (COMPLETIONS, {"prompt": ids(300)}),
                (COMPLETIONS, {"prompt": "x" * 250, "max_tokens": 10}),
                (COMPLETIONS, {"prompt": "x" * 300, "max_tokens": 10}),
                (COMPLETIONS, {"prompt": "x" * 300, "max_tokens": 10, "seed": 1}),
                (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 100000}),
                (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}),
                (CHAT, {"messages": [{"role": "user", "content": "x" * 200}], "max_tokens": 100}),
                (COMPLETIONS, {"prompt": [70000]}),
            ]
            for path, body in cases:
                answer = await b.post({**body, "stream": stream}, path)
                error = msgspec.json.decode(answer.body)["error"]
                assert (answer.status, error["code"], error["type"]) == (400, 400, "BadRequestError"), body
            await b.settled()
            await until(lambda: len(b.world.claims) == 0)

    run(work)


def test_prompt_and_output_may_fill_the_context_to_the_last_token() -> None:
    async def work() -> None:
        async with bench(engine=quick(max_model_len=256), roles=PDD) as b:
            for prompt in (ids(246), "x" * 246):
                answer = await b.post({"prompt": prompt, "max_tokens": 10})
                assert msgspec.json.decode(answer.body)["usage"]["total_tokens"] == 256
            await b.settled()

    run(work)


def test_another_model_is_not_served() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            answer = await b.post({"model": "gpt-4", "prompt": "x"})
            error = msgspec.json.decode(answer.body)["error"]
            assert (answer.status, error["type"], error["param"]) == (404, "NotFoundError", "model")
            await b.settled()

    run(work)


def test_the_small_routes() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            assert (await b.get("/health")).status == 200
            assert (await b.get("/ping")).status == 200
            assert (await b.get("/ready")).body == b'{"ready":true}'
            models = msgspec.json.decode((await b.get("/v1/models")).body)
            assert [m["id"] for m in models["data"]] == [ENGINE]
            assert models["data"][0]["max_model_len"] == 32000
            await b.post({"prompt": PROMPT})
            metrics = (await b.get("/metrics")).body.decode()
            assert 'penstock:requests_total{outcome="finished",slo_class="default"} 1.0' in metrics
            assert f'penstock:time_to_first_token_seconds_count{{model_name="{ENGINE}",slo_class="default"}} 1.0' in (
                metrics
            )
            assert msgspec.json.decode((await b.get("/openapi.json")).body) == document()
            version = msgspec.json.decode((await b.get("/version")).body)
            assert "emulated" in version["version"]
            await b.settled()

    run(work)


def test_tokenize_is_passed_on() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            for path, body in (
                ("/tokenize", {"prompt": TEXT}),
                ("/tokenize", {"messages": MESSAGES}),
                ("/detokenize", {"tokens": PROMPT}),
            ):
                ours, theirs = await asyncio.gather(b.post(body, path), direct(b, body, path))
                assert (ours.status, ours.body) == (200, theirs.body)
            assert (await b.post({"nothing": 1}, "/tokenize")).status == 400
            assert (await b.post(b"{", "/tokenize")).status == 400
            assert (await b.get("/tokenize")).status == 405
            await b.settled()

    run(work)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nothing",
        "/reset_prefix_cache",
        "/sleep",
        "/wake_up",
        "/collective_rpc",
        "/server_info",
        "/start_profile",
        "/docs",
        "/tokenizer_info",
        "/tokenizex",
        "/versions",
        "/v1/../reset_prefix_cache",
        "/v1/%2e%2e/reset_prefix_cache",
        "/v1//reset_prefix_cache",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/complet%69ons",
        "/v1/completions/",
        "/v1/nothing",
    ],
)
def test_nothing_else_of_an_engine_can_be_reached(path: str) -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            for engine in b.fleet.engines:
                engine.driver.reset_prefix_cache = pytest.fail  # type: ignore[method-assign]
            for method in ("GET", "POST"):
                answer = await b.client.fetch(b.url, method, path, b"{}" if method == "POST" else b"")
                assert answer.status == 404
                assert "error" in msgspec.json.decode(answer.body)
            await b.settled()

    run(work)


def test_methods() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            for path in ("/v1/completions", "/v1/chat/completions"):
                answer = await b.get(path)
                assert (answer.status, answer.headers["allow"]) == (405, "POST")
            for path in ("/v1/models", "/health", "/metrics"):
                answer = await b.client.fetch(b.url, "POST", path, b"{}")
                assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
                assert (await b.client.fetch(b.url, "HEAD", path)).status == 200
            assert (await b.client.fetch(b.url, "DELETE", "/v1/models")).status == 405
            await b.settled()

    run(work)


def test_wide_characters_and_stop_strings_across_moves() -> None:
    """The text of a moved request is that of an unmoved one, also where a stop string begins before the cut."""

    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            moves = 0
            for seed in range(6):
                # A replay always works; make before break does where the machine is quick enough.
                level = MigrationLevel.REPLAY if seed % 2 else MigrationLevel.REPROMPT
                prompt = ids(30, seed)
                tokens = expected(prompt, 300)
                text = text_of(prompt, 300)
                stop = text[140:147]
                cut = text.find(stop)
                body = {"prompt": prompt, "max_tokens": 300, "stop": [stop]}
                stream = b.stream(body)
                await stream.tokens(20)
                while not stream.over.is_set():
                    moves += await order(b, stream, level=level)
                await stream.over.wait()
                assert stream.text == text[:cut]
                assert stream.finish == "stop"
                assert stream.chunks[-1]["choices"][0]["stop_reason"] == stop
                assert len(tokens) == 300
            assert moves >= 3
            await b.settled()

    run(work)


def test_usage_and_ids_across_moves() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003), roles=PDD) as b:
            await asyncio.gather(*(one(b, path, kind) for path, kind in KINDS))
            await b.settled()

    async def one(b: Bench, path: str, kind: dict[str, Any]) -> None:
        body = {**kind, "max_tokens": 400, "return_token_ids": True, "stream_options": {"include_usage": True}}
        reference = msgspec.json.decode((await direct(b, {**kind, "max_tokens": 400}, path)).body)
        stream = b.stream(body, path)
        await stream.tokens(10)
        assert await order(b, stream)
        await stream.over.wait()
        assert stream.chunks[-1]["usage"] == reference["usage"]
        assert len(stream.ids) == 400
        choice = reference["choices"][0]
        assert stream.text == (choice["message"]["content"] if path == CHAT else choice["text"])
        assert len({c["id"] for c in stream.chunks}) == 1

    run(work)


def test_one_mixed_instance_serves_everything() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=(Role.MIXED,), policy="mixed") as b:
            bodies = [(path, {**kind, **adapted(path, further)}) for path, kind in KINDS for further in BODIES]
            await asyncio.gather(*(compare(b, path, body) for path, body in bodies))
            await b.settled()

    run(work)


def test_slo_by_body_and_by_header() -> None:
    async def slo_of(b: Bench, body: dict[str, Any], headers: dict[str, str]) -> tuple[float, float]:
        task = asyncio.create_task(b.post({"prompt": PROMPT, "max_tokens": 50, **body}, headers=headers))
        while not b.world.sessions:
            await asyncio.sleep(0)
        (session,) = b.world.sessions.values()
        assert (await task).status == 200
        return session.slo.ttft_s, session.slo.tpot_s

    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            own = {"penstock": {"slo": {"ttft_ms": 250, "tpot_ms": 40.5}}}
            header = {"penstock-slo-ttft-ms": "300", "penstock-slo-tpot-ms": "20"}
            assert await slo_of(b, own, {}) == (0.25, 0.0405)
            assert await slo_of(b, {}, header) == (0.3, 0.02)
            assert await slo_of(b, own, header) == (0.25, 0.0405)
            assert await slo_of(b, {}, {}) == (float("inf"), float("inf"))
            await b.settled()

    run(work)
