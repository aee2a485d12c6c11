"""A server that does what a test says, on a thread of its own, so that commands that run an event loop can call it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import uvloop

from penstock.live.http.server import HttpServer, Reply

Body = dict[str, Any]
Script = Callable[["Reply", Body, "Scripted"], None]


def chunk(**fields: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def answer(reply: Reply, body: Body, server: Scripted) -> None:
    """A good answer: one chunk a token, then usage."""
    n = body["max_tokens"]
    reply.start()
    for i in range(n):
        choice: Body = {"text": "x", "finish_reason": "length" if i == n - 1 else None}
        if body.get("return_token_ids"):
            choice["token_ids"] = [300 + i % 100]
        reply.write(chunk(choices=[choice]))
    prompt = len(body["prompt"]) if isinstance(body["prompt"], list) else len(body["prompt"].split())
    reply.write(chunk(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": n}))
    reply.write(b"data: [DONE]\n\n")
    reply.end()


class Scripted:
    """Answers ``/v1/models``; whole requests (probes) with one token; streamed ones as the script says.

    ``bodies`` are the streamed requests in order of arrival, ``flying`` those not answered yet, ``most`` their maximum.
    """

    def __init__(self, script: Script, models: Any = None, refuse: Callable[[Body], str | None] | None = None) -> None:
        self.script = script
        self.models = models if models is not None else {"data": [{"id": "toy", "max_model_len": 4096}]}
        self.refuse = refuse or (lambda body: None)
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.held: list[tuple[Reply, Body]] = []
        self.flying = 0
        self.most = 0
        self.url = ""

    def handle(self, reply: Reply) -> None:
        """The handler of the HTTP server."""
        request = reply.request
        if request.path == "/v1/models":
            reply.send(200, msgspec.json.encode(self.models))
            return
        if request.method == "GET":
            reply.send(404, b"{}")
            return
        body: Body = msgspec.json.decode(request.body)
        problem = self.refuse(body)
        if problem is not None:
            reply.send(400, msgspec.json.encode({"error": {"message": problem}}))
        elif not body.get("stream"):
            text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            words = len(text) if isinstance(text, list) else 7 + 2 * len(text.split())
            reply.send(200, msgspec.json.encode({"choices": [{"text": "x"}], "usage": {"prompt_tokens": words}}))
        else:
            self.bodies.append(body)
            self.headers.append(request.headers)
            self.flying += 1
            self.most = max(self.most, self.flying)
            self.script(reply, body, self)
            self.flying -= reply.closed


@contextmanager
def serving(script: Script = answer, **options: Any) -> Iterator[Scripted]:
    """Run a scripted server while the block runs."""
    scripted, ready, stop = Scripted(script, **options), threading.Event(), asyncio.Event()
    loop: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loop.append(asyncio.get_running_loop())
        server = HttpServer(scripted.handle)
        scripted.url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
        ready.set()
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
    thread.start()
    try:
        assert ready.wait(20)
        yield scripted
    finally:
        loop[0].call_soon_threadsafe(stop.set)
        thread.join(20)
