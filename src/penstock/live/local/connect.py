"""First contact between engines, before users pay for it: NIXL's handshake of each ordered pair, and first requests."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.http import HttpFault
from penstock.live.http.client import HttpClient

_PROMPT = 288  # tokens: at least two blocks for block sizes up to 128
_TIMEOUT_S = 120.0  # an engine's first request imports and compiles


async def preconnect(urls: Sequence[str], client: HttpClient | None = None) -> None:
    """Let every engine serve a first request, and every ordered pair move KV once.

    Without it the first user of each pair waits for the handshake (0.2 to 1 s), and the first chat request of an engine
    for imports (up to 20 s on a busy small machine). All engines must serve the same model.

    Parameters
    ----------
    urls : Sequence[str]
        Origins of the engines.
    client : HttpClient, optional
        One to use; by default one of its own.

    Raises
    ------
    PenstockError
        An engine does not answer, or a pair cannot move KV.
    """
    own = client is None
    caller = client or HttpClient()
    try:
        models = await asyncio.gather(*(_model(caller, url) for url in urls))
        await asyncio.gather(*(_chat(caller, url, name) for url, name in zip(urls, models, strict=True)))
        # In each round every engine gives once and takes once.
        for step in range(1, len(urls)):
            pairs = [(giver, (giver + step) % len(urls)) for giver in range(len(urls))]
            await asyncio.gather(*(_move(caller, urls[giver], urls[taker], models[giver]) for giver, taker in pairs))
    finally:
        if own:
            await caller.close()


async def _model(client: HttpClient, url: str) -> str:
    return str((await _call(client, url, "GET", "/v1/models"))["data"][0]["id"])


async def _chat(client: HttpClient, url: str, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    with contextlib.suppress(_Refused):  # a model without a chat template serves completions all the same
        await _call(client, url, "POST", "/v1/chat/completions", body)


async def _move(client: HttpClient, giver: str, taker: str, model: str) -> None:
    # New tokens each time: what the taker has in its prefix cache it would not fetch. Every vocabulary has these ids.
    prompt = [random.randrange(10, 200) for _ in range(_PROMPT)]
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    prefill = await _call(
        client, giver, "POST", "/v1/completions", body | {"kv_transfer_params": {"do_remote_decode": True}}
    )
    params = prefill.get("kv_transfer_params")
    if not params:
        raise PenstockError(
            f"engine {giver} does not hand over KV", "start it with --kv-transfer-config (NixlConnector)"
        )
    await _call(client, taker, "POST", "/v1/completions", body | {"kv_transfer_params": params})


class _Refused(PenstockError):
    """The engine answered with an error."""


async def _call(client: HttpClient, url: str, method: str, path: str, body: object = None) -> dict[str, Any]:
    raw = b"" if body is None else msgspec.json.encode(body)
    headers = {"Content-Type": "application/json"} if raw else None
    try:
        answer = await client.fetch(url, method, path, raw, headers, timeout_s=_TIMEOUT_S)
    except HttpFault as fault:
        raise PenstockError(f"engine {url} does not answer ({fault.reason})", "look at its log") from None
    if answer.status != 200:
        raise _Refused(f"engine {url} answers {path} with status {answer.status}", "look at its log")
    content: dict[str, Any] = msgspec.json.decode(answer.body)
    return content
