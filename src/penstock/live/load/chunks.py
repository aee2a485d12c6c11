"""What a streamed answer says, as far as a load generator reads it (OpenAI's API, with vLLM's ``token_ids``)."""

from __future__ import annotations

from typing import Any

import msgspec


class Usage(msgspec.Struct, gc=False):
    """Token counts, as the server reports them at the end of a stream."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Delta(msgspec.Struct, gc=False):
    """What a chat chunk adds. ``reasoning`` is vLLM's name, ``reasoning_content`` that of others."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class Choice(msgspec.Struct, gc=False):
    """One choice of a chunk, of a completion or of a chat."""

    text: str | None = None
    delta: Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    def says(self) -> bool:
        """Does the chunk carry any output?"""
        if self.delta is None:
            return bool(self.text)
        d = self.delta
        return bool(d.content or d.reasoning or d.reasoning_content or d.tool_calls)


class Chunk(msgspec.Struct, gc=False):
    """One event of the stream; ``error`` replaces everything else where the server complains in mid-stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class _Complaint(msgspec.Struct):
    message: str = ""


class _Refusal(msgspec.Struct):
    error: Any = None
    message: str = ""
    detail: Any = None


decode_chunk = msgspec.json.Decoder(Chunk).decode
"""One payload as a Chunk; raises ``msgspec.MsgspecError``."""


def complaint(body: bytes, limit: int = 300) -> str:
    """What an error answer says, in one line of at most ``limit`` characters: its message, or the body itself."""
    try:
        refusal = msgspec.json.decode(body, type=_Refusal)
        text = _words(refusal.error) or refusal.message or _words(refusal.detail)
    except msgspec.MsgspecError:
        text = ""
    text = " ".join((text or body.decode("utf-8", "replace")).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _words(part: Any) -> str:
    if isinstance(part, str):
        return part
    try:
        return msgspec.convert(part, _Complaint).message
    except msgspec.MsgspecError:
        return ""
