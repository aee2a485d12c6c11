"""The ``openai`` package, as users have it, against the gateway."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import openai
import pytest
import uvloop

from penstock.live.gateway import GatewaySettings
from tests.live.answers import ENGINE, quick, text_of
from tests.live.support import PDD, Bench, bench, ids

PROMPT = ids(40)
MESSAGES: Any = [{"role": "user", "content": "Hello"}]


class Served:
    """A gateway in a thread of its own, for clients that block."""

    def __init__(self) -> None:
        self.bench: Bench
        self._ready: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()))

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with bench(engine=quick(max_model_len=1000), roles=PDD, gateway=GatewaySettings(api_keys=("key",))) as b:
            self.bench = b
            self._ready.set_result(None)
            await self._stop.wait()

    def __enter__(self) -> Served:
        self._thread.start()
        self._ready.result(20)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            asyncio.run_coroutine_threadsafe(self.bench.settled(), self._loop).result(30)
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(20)


@pytest.fixture
def served() -> Iterator[Served]:
    with Served() as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.bench.url + "/v1", api_key="key", max_retries=0, timeout=20) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [ENGINE]


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=ENGINE, prompt=PROMPT, max_tokens=50, temperature=0)
    assert whole.choices[0].text == text_of(PROMPT, 50)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 50
    parts = client.completions.create(model=ENGINE, prompt=PROMPT, max_tokens=50, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text_of(PROMPT, 50)


def test_chats(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=ENGINE, messages=MESSAGES, max_tokens=50, temperature=0)
    assert whole.choices[0].message.role == "assistant"
    text = whole.choices[0].message.content
    assert text
    parts = list(
        client.chat.completions.create(
            model=ENGINE,
            messages=MESSAGES,
            max_completion_tokens=50,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == text
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].usage is not None and parts[-1].usage == whole.usage
    stop = text[10:14]
    with client.chat.completions.stream(model=ENGINE, messages=MESSAGES, max_tokens=50, stop=stop) as stream:
        assert stream.get_final_completion().choices[0].message.content == text[: text.find(stop)]


def test_stop_n_and_logprobs(client: openai.OpenAI) -> None:
    text = text_of(PROMPT, 50)
    stopped = client.completions.create(model=ENGINE, prompt=PROMPT, max_tokens=50, stop=text[20:24])
    assert stopped.choices[0].text == text[: text.find(text[20:24])]
    assert stopped.choices[0].finish_reason == "stop"
    several = client.completions.create(model=ENGINE, prompt=PROMPT, max_tokens=5, n=3)
    assert [c.index for c in several.choices] == [0, 1, 2]
    chat = client.chat.completions.create(model=ENGINE, messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=2)
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 5


def test_a_stream_may_be_left_in_the_middle(client: openai.OpenAI) -> None:
    with client.completions.create(model=ENGINE, prompt=PROMPT, max_tokens=900, stream=True) as stream:
        for _, _part in zip(range(3), stream, strict=False):
            pass


def test_headers_can_be_read(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=ENGINE, prompt=PROMPT, max_tokens=5)
    assert raw.headers["penstock-movable"] == "yes"
    assert raw.parse().id == "cmpl-" + raw.headers["x-request-id"]


def test_errors_are_of_the_right_type(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=ENGINE, prompt="x", temperature=-1)
    assert refused.value.param == "temperature" and "temperature" in refused.value.message
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=ENGINE, prompt=PROMPT, max_tokens=5000)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=ENGINE, prompt="x", extra_body={"kv_transfer_params": {"a": 1}})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=ENGINE, input="x")


def test_what_the_package_does_not_know_can_be_asked_for(client: openai.OpenAI) -> None:
    own = {"return_token_ids": True, "penstock": {"slo": {"ttft_ms": 500, "tpot_ms": 50}}}
    answer: Any = client.completions.create(model=ENGINE, prompt=PROMPT, max_tokens=5, extra_body=own)
    assert len(answer.choices[0].token_ids) == 5


def test_async(served: Served) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> None:
        prompt = ids(30, seed)
        text = text_of(prompt, 40)
        whole = await client.completions.create(model=ENGINE, prompt=prompt, max_tokens=40)
        assert whole.choices[0].text == text
        stream = await client.completions.create(model=ENGINE, prompt=prompt, max_tokens=40, stream=True)
        assert "".join([part.choices[0].text async for part in stream]) == text
        chat = await client.chat.completions.create(model=ENGINE, messages=MESSAGES, max_tokens=40, stream=True)
        assert len([part async for part in chat]) > 10

    async def work() -> None:
        base = served.bench.url + "/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="key", max_retries=0, timeout=20) as client:
            await asyncio.gather(*(one(client, seed) for seed in range(8)))

    asyncio.run(work())
