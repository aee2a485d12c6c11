"""The surface: shapes of answers, pages, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from penstock.core.errors import PenstockError
from penstock.experiment.setup import ClusterSetup
from penstock.live.emulated import EmulatedFleet, EmulatedSettings
from penstock.live.emulated.settings import plan
from penstock.live.emulated.vocabulary import decode_output

from .support import bench, expected, run, settings, spec

HELLO = [{"role": "user", "content": "hello"}]
RENDERED = [256, 260, *b"hello", 258, 261]


def test_a_completion() -> None:
    async def main() -> None:
        async with bench() as b:
            found = await b.complete(0, "hello", 40)
            ids = expected("hello", 40)
            assert found["id"].startswith("cmpl-")
            assert found["object"] == "text_completion"
            assert found["model"] == b.model == "emulated-engine"
            assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 40, "total_tokens": 45}
            assert found["kv_transfer_params"] is None
            assert found["choices"] == [
                {
                    "index": 0,
                    "text": decode_output(ids),
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                    "prompt_token_ids": list(b"hello"),
                    "token_ids": ids,
                }
            ]
            default = await b.post(0, "/v1/completions", prompt="hello", model=b.model)
            assert default[1]["usage"]["completion_tokens"] == 16
            assert default[1]["choices"][0]["token_ids"] is None

    run(main())


def test_a_streamed_completion_says_the_same() -> None:
    async def main() -> None:
        async with bench() as b:
            s = await b.stream(0, "hello", 300, stream_options={"include_usage": True}).over()
            assert s.ended
            assert s.ids == expected("hello", 300)
            assert s.text == decode_output(s.ids)
            assert len({c["id"] for c in s.chunks}) == 1
            assert len(s.chunks) == 301
            first, last, usage = s.chunks[0], s.chunks[-2], s.chunks[-1]
            assert first["choices"][0]["prompt_token_ids"] == list(b"hello")
            assert s.chunks[1]["choices"][0]["prompt_token_ids"] is None
            assert [c["choices"][0]["finish_reason"] for c in s.chunks[:-2]] == [None] * 299
            assert last["choices"][0]["finish_reason"] == "length"
            assert usage["choices"] == []
            assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 300, "total_tokens": 305}
            # A character of several bytes gives no text until it is whole.
            assert any(c["choices"][0]["text"] == "" for c in s.chunks[:-1])
            counted = await b.stream(0, "hello", 3, stream_options={"continuous_usage_stats": True}).over()
            assert [c["usage"]["completion_tokens"] for c in counted.chunks] == [1, 2, 3]

    run(main())


def test_a_character_that_the_prompt_began_is_not_shown() -> None:
    async def main() -> None:
        async with bench() as b:
            s = await b.stream(0, [*b"caf", 0xC3], 8).over()
            assert s.ids == expected([*b"caf", 0xC3], 8)
            assert 0x80 <= s.ids[0] <= 0xBF
            assert s.text == decode_output(s.ids) == bytes(s.ids[1:]).decode("utf-8", "ignore")

    run(main())


def test_a_chat_whole_and_streamed() -> None:
    async def main() -> None:
        async with bench() as b:
            path = "/v1/chat/completions"
            status, found = await b.post(0, path, messages=HELLO, max_tokens=30, return_token_ids=True)
            assert status == 200
            ids = expected(RENDERED, 30)
            assert found["id"].startswith("chatcmpl-")
            assert found["prompt_token_ids"] == RENDERED
            choice = found["choices"][0]
            assert choice["message"]["role"] == "assistant"
            assert choice["message"]["content"] == decode_output(ids)
            assert choice["token_ids"] == ids
            s = await b.stream(0, HELLO, 30, path).over()
            assert s.ids == ids
            assert s.text == decode_output(ids)
            assert s.chunks[0]["object"] == "chat.completion.chunk"
            assert s.chunks[0]["prompt_token_ids"] == RENDERED
            assert s.chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert s.chunks[-1]["choices"][0]["finish_reason"] == "length"
            parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
            assert (await b.stream(0, parts, 99, path, max_completion_tokens=30).over()).ids == ids

    run(main())


def test_several_prompts_and_choices_share_an_answer() -> None:
    async def main() -> None:
        async with bench() as b:
            found = await b.complete(0, ["one", "two"], 10, n=2)
            texts = [c["token_ids"] for c in found["choices"]]
            assert texts == [expected(p, 10) for p in ("one", "one", "two", "two")]
            assert [c["index"] for c in found["choices"]] == [0, 1, 2, 3]
            assert found["usage"] == {"prompt_tokens": 6, "completion_tokens": 40, "total_tokens": 46}
            s = await b.stream(0, [[1, 2], [3]], 10).over()
            for index, prompt in enumerate(([1, 2], [3])):
                chunks = [c["choices"][0] for c in s.chunks if c["choices"][0]["index"] == index]
                assert [t for c in chunks for t in c["token_ids"]] == expected(prompt, 10)

    run(main())


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(include: bool) -> None:
    async def main() -> None:
        async with bench() as b:
            ids = expected("stop", 60)
            text = decode_output(ids)
            stop = text[20:24]
            at = text.find(stop) + (len(stop) if include else 0)
            wanted: dict[str, Any] = {"stop": [stop, "never there"], "include_stop_str_in_output": include}
            found = (await b.complete(0, "stop", 60, **wanted))["choices"][0]
            assert found["text"] == text[:at]
            assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)
            assert decode_output(found["token_ids"]).endswith(stop)
            s = await b.stream(0, "stop", 60, **wanted).over()
            assert s.text == text[:at]
            assert s.ids == found["token_ids"]
            assert s.chunks[-1]["choices"][0]["stop_reason"] == stop
            late = await b.complete(0, "stop", 60, min_tokens=59, **wanted)
            assert len(late["choices"][0]["token_ids"]) == 60

    run(main())


def test_stop_token_ids() -> None:
    async def main() -> None:
        async with bench() as b:
            ids = expected("ids", 60)
            at = next(i for i, t in enumerate(ids) if i > 5 and t < 128 and t not in ids[:i])
            found = (await b.complete(0, "ids", 60, stop_token_ids=[ids[at]]))["choices"][0]
            assert found["token_ids"] == ids[: at + 1]
            assert found["text"] == decode_output(ids[:at])
            assert (found["finish_reason"], found["stop_reason"]) == ("stop", ids[at])

    run(main())


def test_outputs_end_by_themselves_unless_told_not_to() -> None:
    async def main() -> None:
        async with bench(mean_output=20) as b:
            lengths = []
            for i in range(20):
                found = (await b.complete(0, f"prompt {i}", 300))["choices"][0]
                assert (found["token_ids"][-1] == 257) == (found["finish_reason"] == "stop")
                lengths.append(len(found["token_ids"]))
            assert 5 < sum(lengths) / 20 < 60
            assert len(await b.ids(0, "prompt 0", 300, ignore_eos=True)) == 300
            assert len(await b.ids(0, "prompt 0", 300, min_tokens=200)) >= 200

    run(main())


def test_logprobs() -> None:
    async def main() -> None:
        async with bench() as b:
            found = (await b.complete(0, "log", 12, logprobs=2))["choices"][0]
            probs = found["logprobs"]
            assert {len(v) for v in probs.values()} == {12}
            assert all(p <= 0 for p in probs["token_logprobs"])
            assert all(len(t) == 2 for t in probs["top_logprobs"])
            s = await b.stream(0, "log", 12, logprobs=2).over()
            streamed = [p for c in s.chunks for p in c["choices"][0]["logprobs"]["token_logprobs"]]
            assert streamed == probs["token_logprobs"]
            status, chat = await b.post(
                0, "/v1/chat/completions", messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3
            )
            assert status == 200
            content = chat["choices"][0]["logprobs"]["content"]
            assert [len(c["top_logprobs"]) for c in content] == [3] * 4

    run(main())


def test_tokens_and_pages() -> None:
    async def main() -> None:
        async with bench(max_model_len=500) as b:
            _, found = await b.post(0, "/tokenize", prompt="hé")
            assert found == {"count": 3, "max_model_len": 500, "tokens": [104, 195, 169], "token_strs": None}
            _, found = await b.post(0, "/tokenize", messages=HELLO)
            assert found["tokens"] == RENDERED
            _, found = await b.post(0, "/detokenize", tokens=[104, 195, 169])
            assert found == {"prompt": "hé"}
            assert await b.get(0, "/health") == await b.get(0, "/ping") == b""
            assert b"emulated" in await b.get(0, "/version")
            assert b'"max_model_len":500' in await b.get(0, "/v1/models")
            assert b"emulated" in await b.get(0, "/v1/models")

    run(main())


def test_metrics_count() -> None:
    async def main() -> None:
        async with bench() as b:
            prompt = "a" * 100
            for _ in range(2):
                await b.complete(0, prompt, 30)
            assert await b.metric(0, "vllm:prompt_tokens_total") == 200
            assert await b.metric(0, "vllm:generation_tokens_total") == 60
            assert await b.metric(0, "vllm:prefix_cache_queries_total") == 200
            assert await b.metric(0, "vllm:prefix_cache_hits_total") == 96
            assert await b.metric(0, "vllm:kv_cache_usage_perc") == 0
            assert b'num_gpu_blocks="400"' in await b.get(0, "/metrics")
            assert b'block_size="16"' in await b.get(0, "/metrics")
            s = b.stream(0, prompt, 2000)
            await s.reached(5)
            assert await b.metric(0, "vllm:num_requests_running") == 1
            assert await b.metric(0, "vllm:num_requests_waiting") == 0
            assert await b.metric(0, "vllm:kv_cache_usage_perc") >= 7 / 400
            s.call.abort()

    run(main())


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": "x", "model": "other"}, 404, "does not exist"),
    ({"prompt": "x" * 501}, 400, "maximum context length"),
    ({"prompt": "x" * 400, "max_tokens": 101}, 400, "too large"),
    ({"prompt": "x", "max_tokens": 0}, 400, "at least 1"),
    ({"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
    ({"prompt": ""}, 400, "empty"),
    ({"prompt": []}, 400, "empty"),
    ({"prompt": {}}, 400, "prompt"),
    ({}, 400, "prompt"),
    ({"prompt": [1, "x"]}, 400, "out of vocabulary"),
    ({"prompt": [70000]}, 400, "out of vocabulary"),
    ({"prompt": [-1]}, 400, "out of vocabulary"),
    ({"prompt": "x", "echo": True}, 400, "echo"),
    ({"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ({"prompt": "x", "n": 0}, 400, "n must be"),
    ({"prompt": "x", "temperature": -1}, 400, "temperature"),
    ({"prompt": "x", "top_p": 2}, 400, "top_p"),
    ({"prompt": "x", "stop": ""}, 400, "stop"),
    ({"prompt": "x", "logprobs": 99}, 400, "logprobs"),
    ({"prompt": "x", "min_tokens": 20}, 400, "min_tokens"),
    ({"prompt": "x", "use_beam_search": True}, 400, "beam"),
    ({"prompt": "x", "prompt_logprobs": 1}, 400, "prompt_logprobs"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream"),
    ({"prompt": "x", "kv_transfer_params": {"remote_block_ids": "no"}}, 400, "remote_block_ids"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "multimodal"),
]


def test_what_is_refused() -> None:
    async def main() -> None:
        async with bench(max_model_len=500) as b:
            for body, status, words in BAD:
                path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
                found = await b.post(0, path, **body)
                assert found[0] == status, (body, found)
                assert words in found[1]["error"]["message"], (body, found)
                assert found[1]["error"]["code"] == status
            for raw in (b"{", b'{"prompt": "\\ud800 x"', b"\xff", b"[]", b"[" * 100000):
                answer = await b.client.fetch(b.urls[0], "POST", "/v1/completions", raw)
                assert answer.status == 400, raw[:20]
            assert (await b.post(0, "/nowhere"))[0] == 404
            assert (await b.post(0, "/v1/models"))[0] == 405

    run(main())


def test_half_a_surrogate_pair_does_no_harm() -> None:
    async def main() -> None:
        async with bench() as b:
            raw = b'{"prompt": "a\\ud800b", "max_tokens": 2}'
            answer = await b.client.fetch(b.urls[0], "POST", "/v1/completions", raw)
            assert answer.status in (200, 400)

    run(main())


def test_the_openai_package_is_content() -> None:
    async def main() -> None:
        async with bench() as b:
            client = openai.AsyncOpenAI(base_url=b.urls[0] + "/v1", api_key="none")
            whole = await client.chat.completions.create(
                model=b.model, messages=[{"role": "user", "content": "hello"}], max_tokens=20
            )
            pieces = []
            stream = await client.chat.completions.create(
                model=b.model, messages=[{"role": "user", "content": "hello"}], max_tokens=20, stream=True
            )
            async for chunk in stream:
                pieces.append(chunk.choices[0].delta.content or "")
            assert "".join(pieces) == whole.choices[0].message.content == decode_output(expected(RENDERED, 20))
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="x")
            await client.close()

    run(main())


def test_settings_are_checked() -> None:
    assert plan(EmulatedSettings()).model == "emulated-llama-3.1-8b"
    small = plan(EmulatedSettings(cluster=ClusterSetup(model="qwen2.5-7b", hardware="h100", kv_blocks=100)))
    assert (small.model, small.max_model_len, small.spec.capacity_blocks) == ("emulated-qwen2.5-7b", 1600, 100)
    for bad in (
        settings(model="llama"),
        settings(max_model_len=10**6),
        settings(speed=0.0),
        settings(lease_s=0.0),
        settings(kv_load_failure_policy="hope"),
        EmulatedSettings(cluster=ClusterSetup(model="no-such")),
    ):
        with pytest.raises(PenstockError):
            plan(bad)


def test_a_port_that_is_taken_leaves_nothing_behind() -> None:
    async def main() -> None:
        first, second = EmulatedFleet(), EmulatedFleet()
        urls = await first.start(settings(spec()), 1)
        port = int(urls[0].rpartition(":")[2])
        with pytest.raises(PenstockError):
            await second.start(settings(spec()), 1, base_port=port)
        assert second.integrity() == []
        await asyncio.gather(first.stop(), second.stop())

    run(main())
