"""What the client gets: one completion or chat, streamed or whole, whatever engines it came from.

The gateway writes the chunks itself, so that id, usage and text are those of one request across moves. ``ClientOutput``
is fed with tokens in order and nothing else.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from penstock.live.intake import Intake
from penstock.live.stops import StopMatcher

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


class Line(Protocol):
    """The part of ``live.http.server.Reply`` that an answer needs."""

    @property
    def closed(self) -> bool: ...

    @property
    def started(self) -> bool: ...

    def send(self, status: int, body: bytes, content_type: str = ..., headers: dict[str, str] | None = ...) -> None: ...

    def start(self, status: int = ..., content_type: str = ..., headers: dict[str, str] | None = ...) -> None: ...

    def write(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def drop(self) -> None: ...


class ClientOutput:
    """Writes one answer.

    ``tokens`` takes what an engine decoded; it returns True when the answer has ended there (a stop string, or the
    engine's own end). ``headers`` go out with the first byte.
    """

    def __init__(self, intake: Intake, line: Line, request_id: str, model: str, headers: dict[str, str]) -> None:
        self.intake = intake
        self.line = line
        self.headers = headers
        self.id = ("chatcmpl-" if intake.chat else "cmpl-") + request_id
        self.model = model
        self.created = int(time.time())
        self.stops = StopMatcher(intake.stop, intake.include_stop)
        self.prompt_ids: list[int] = []
        self.completion_tokens = 0
        self.ended = False
        self.finish: str | None = None
        self.owner: Any = None  # the session that speaks here: the one to stop when the client goes away
        self._started = False
        self._texts: list[str] = []
        self._ids: list[int] = []
        kind = "chat.completion.chunk" if intake.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        # The common chunk, ready but for its text.
        if intake.chat:
            self._before = self._head + b'{"index":0,"delta":{"content":'
            self._after = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        else:
            self._before = self._head + b'{"index":0,"text":'
            self._after = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
        self._plain = intake.stream and not intake.return_token_ids and not intake.continuous_usage

    def tokens(self, ids: list[int], text: str, finish: str | None, stop_reason: int | str | None = None) -> bool:
        """Take decoded tokens with their text; ``finish`` is the engine's finish_reason. True: the answer has ended."""
        self.completion_tokens += len(ids)
        if self._plain and finish is None and not self.stops.stops:
            if text:
                if not self._started:
                    self._start()
                self.line.write(self._before + _encode(text) + self._after)
            return False
        shown = self.stops.feed(text)
        if self.stops.hit is not None:
            finish, stop_reason = "stop", self.stops.hit
        elif finish is not None:
            shown += self.stops.flush()
        if self.intake.stream:
            self._chunk(ids, shown, finish, stop_reason)
        else:
            self._texts.append(shown)
            self._ids.extend(ids)
        if finish is None:
            return False
        self._finish(finish, stop_reason)
        return True

    def line_started(self) -> bool:
        """Has the client got anything yet?"""
        return self._started or self.line.started

    def fail(self, status: int, message: str, kind: str, retry_after_s: int | None = None) -> None:
        """End with an error: an answer of its own, or an error event in a stream that runs."""
        if self.ended or self.line.closed:
            return
        self.ended = True
        body = error_body(status, message, kind)
        if self.line_started():
            self.line.write(b"data: " + body + b"\n\n")
            self.line.write(DONE)
            self.line.end()
        else:
            headers = dict(self.headers)
            if retry_after_s is not None:
                headers["retry-after"] = str(retry_after_s)
            self.line.send(status, body, "application/json", headers)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._started = True
        self.line.start(200, "text/event-stream; charset=utf-8", self.headers)
        if self.intake.chat:
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            more = b""
            if self.intake.return_token_ids:
                more = b',"prompt_token_ids":' + _encode(self.prompt_ids)
            if self.intake.continuous_usage:
                more += b',"usage":' + _encode(usage_of(len(self.prompt_ids), 0))
            self.line.write(self._head + _encode(first) + b"]" + more + b"}\n\n")

    def _chunk(self, ids: list[int], text: str, finish: str | None, stop_reason: int | str | None) -> None:
        fresh = not self._started
        if fresh:
            self._start()
        if not text and finish is None and not self.intake.return_token_ids:
            return
        choice: dict[str, Any] = {"index": 0}
        if self.intake.chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = None
        choice["finish_reason"] = finish
        choice["stop_reason"] = stop_reason
        if self.intake.return_token_ids:
            choice["token_ids"] = ids
            if fresh and not self.intake.chat:
                choice["prompt_token_ids"] = self.prompt_ids
        tail = b"]}\n\n"
        if self.intake.continuous_usage:
            tail = b'],"usage":' + _encode(self.usage()) + b"}\n\n"
        self.line.write(self._head + _encode(choice) + tail)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, of the request as the client knows it."""
        return usage_of(len(self.prompt_ids), self.completion_tokens)

    def _finish(self, finish: str, stop_reason: int | str | None) -> None:
        self.ended = True
        self.finish = finish
        if self.line.closed:
            return
        if self.intake.stream:
            if self.intake.include_usage:
                self.line.write(self._head + b'],"usage":' + _encode(self.usage()) + b"}\n\n")
            self.line.write(DONE)
            self.line.end()
            return
        text = "".join(self._texts)
        choice: dict[str, Any] = {"index": 0}
        if self.intake.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": finish, "stop_reason": stop_reason}
        answer: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion" if self.intake.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "usage": self.usage(),
        }
        if self.intake.return_token_ids:
            choice["token_ids"] = self._ids
            if self.intake.chat:
                answer["prompt_token_ids"] = self.prompt_ids
            else:
                choice["prompt_token_ids"] = self.prompt_ids
        self.line.send(200, _encode(answer), "application/json", self.headers)


def usage_of(prompt: int, completion: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def error_body(status: int, message: str, kind: str, param: str | None = None) -> bytes:
    """An error as OpenAI and vLLM shape it."""
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": status}})
