"""What engines say and what they are told: the shapes of the OpenAI-compatible API that the gateway relies on.

Checked against vLLM 0.32 and 0.33 (docs/live.md lists what was run). Fields that nobody here reads are not named, so
that a newer engine may add some.
"""

from __future__ import annotations

from typing import Any

import msgspec

Json = dict[str, Any]


class Delta(msgspec.Struct):
    """What a chat chunk adds. ``reasoning`` and ``tool_calls`` show that the engine parses its output."""

    content: str | None = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None

    def parsed(self) -> bool:
        """Does a parser of the engine stand between tokens and text?"""
        return bool(self.reasoning or self.reasoning_content or self.tool_calls)


class Choice(msgspec.Struct):
    """One choice of a completion or chat, whole or streamed: the fields of all four shapes."""

    text: str = ""
    delta: Delta | None = None
    message: Delta | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def words(self) -> str:
        """The text, whichever shape it came in."""
        part = self.delta if self.delta is not None else self.message
        return self.text if part is None else part.content or ""

    def parsed(self) -> bool:
        """See :meth:`Delta.parsed`."""
        part = self.delta if self.delta is not None else self.message
        return part is not None and part.parsed()


class Chunk(msgspec.Struct):
    """A streamed chunk or a whole answer. ``error`` replaces everything else in an engine's complaint."""

    choices: list[Choice] = []
    prompt_token_ids: list[int] | None = None
    kv_transfer_params: Json | None = None
    error: Any = None


_CHUNK = msgspec.json.Decoder(Chunk)


def read_chunk(data: bytes) -> Chunk:
    """Decode one ``data:`` payload or body; raises ``msgspec.MsgspecError``."""
    return _CHUNK.decode(data)


def prompt_ids_of(chunk: Chunk) -> list[int] | None:
    """Prompt token ids, which completions put on the choice and chats on the chunk."""
    if chunk.prompt_token_ids is not None:
        return chunk.prompt_token_ids
    return chunk.choices[0].prompt_token_ids if chunk.choices else None


def encode(body: Json) -> bytes:
    """A request body."""
    return msgspec.json.encode(body)


HANDOVER: Json = {"do_remote_decode": True, "do_remote_prefill": False}
"""Asks an engine to pin the KV of a request that ends, and to answer with how to pull it (vLLM's NixlConnector)."""
