"""The JSON of answers: completions and chats, whole and streamed, as vLLM writes them.

Nearly every chunk of a stream differs from its neighbours in one token only, so its two ends are prepared:
``prepared`` gives the beginning that belongs to a choice, ``ENDINGS`` what follows for each ASCII token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

_encode = msgspec.json.encode
DONE: Final = b"data: [DONE]\n\n"


def usage_of(prompt: int, completion: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def _text(token: int) -> bytes:
    return _encode(chr(token))[1:-1]


_COMPLETION_END: Final = (
    b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":'
)
_CHAT_END: Final = b'"},"logprobs":null,"finish_reason":null,"token_ids":'


def _endings(middle: bytes) -> tuple[list[bytes], list[bytes]]:
    """What follows a choice's beginning for each ASCII token, without and with its id."""
    plain = [_text(t) + middle + b"null}]}\n\n" for t in range(128)]
    return plain, [_text(t) + middle + b"[%d]}]}\n\n" % t for t in range(128)]


class Piece(msgspec.Struct):
    """What one chunk, or one choice of a whole answer, says."""

    text: str
    ids: list[int]
    logprobs: Any = None
    finish: str | None = None
    stop_reason: int | str | None = None
    prompt_ids: list[int] | None = None


class Shape:
    """The JSON of one answer: ``id``, time and model, and which of the two forms it has."""

    KIND = ""
    CHUNK = ""
    PREFIX = ""

    def __init__(self, request_id: str, created: int, model: str) -> None:
        self.id = self.PREFIX + request_id
        self.created = created
        self.model = model
        head = {"id": self.id, "object": self.CHUNK, "created": created, "model": model}
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['

    def prepared(self, index: int) -> bytes:
        """The beginning of choice ``index``'s chunks, up to its text."""
        raise NotImplementedError

    def endings(self, with_ids: bool) -> list[bytes]:
        """What follows it, by ASCII token."""
        raise NotImplementedError

    def opening(self, index: int, prompt_ids: list[int] | None) -> bytes:
        """What a choice's stream begins with, before any token."""
        return b""

    def piece(self, index: int, piece: Piece, with_ids: bool) -> dict[str, Any]:
        """One choice of a chunk."""
        raise NotImplementedError

    def chunk(self, index: int, piece: Piece, with_ids: bool, usage: Any = None, params: Any = None) -> bytes:
        """A chunk of one choice."""
        tail = b"" if usage is None else b',"usage":' + _encode(usage)
        if params is not None:
            tail += b',"kv_transfer_params":' + _encode(params)
        return self._head + _encode(self.piece(index, piece, with_ids)) + b"]" + tail + b"}\n\n"

    def usage_chunk(self, usage: Any) -> bytes:
        """The chunk that ``include_usage`` asks for, after the last token."""
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"

    def whole(self, pieces: Sequence[Piece], with_ids: bool, usage: Any, params: Any) -> bytes:
        """An answer that is not streamed."""
        choices = [self.whole_choice(i, piece, with_ids) for i, piece in enumerate(pieces)]
        answer = {"id": self.id, "object": self.KIND, "created": self.created, "model": self.model, "choices": choices}
        answer |= {"usage": usage, "kv_transfer_params": params}
        return _encode(answer | self.whole_extra(pieces, with_ids))

    def whole_choice(self, index: int, piece: Piece, with_ids: bool) -> dict[str, Any]:
        """One choice of a whole answer."""
        return self.piece(index, piece, with_ids)

    def whole_extra(self, pieces: Sequence[Piece], with_ids: bool) -> dict[str, Any]:
        """Further keys of a whole answer."""
        return {}


class CompletionShape(Shape):
    """``/v1/completions``."""

    KIND = "text_completion"
    CHUNK = "text_completion"
    PREFIX = "cmpl-"
    ENDINGS = _endings(_COMPLETION_END)

    def prepared(self, index: int) -> bytes:
        """See :class:`Shape`."""
        return self._head + b'{"index":%d,"text":"' % index

    def endings(self, with_ids: bool) -> list[bytes]:
        """See :class:`Shape`."""
        return self.ENDINGS[with_ids]

    def piece(self, index: int, piece: Piece, with_ids: bool) -> dict[str, Any]:
        """See :class:`Shape`."""
        return {
            "index": index,
            "text": piece.text,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
            "prompt_token_ids": piece.prompt_ids if with_ids else None,
            "token_ids": piece.ids if with_ids else None,
        }


class ChatShape(Shape):
    """``/v1/chat/completions``. Prompt ids stand beside the choices, not in them."""

    KIND = "chat.completion"
    CHUNK = "chat.completion.chunk"
    PREFIX = "chatcmpl-"
    ENDINGS = _endings(_CHAT_END)

    def prepared(self, index: int) -> bytes:
        """See :class:`Shape`."""
        return self._head + b'{"index":%d,"delta":{"content":"' % index

    def endings(self, with_ids: bool) -> list[bytes]:
        """See :class:`Shape`."""
        return self.ENDINGS[with_ids]

    def opening(self, index: int, prompt_ids: list[int] | None) -> bytes:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._head + _encode(choice) + b'],"prompt_token_ids":' + _encode(prompt_ids) + b"}\n\n"

    def piece(self, index: int, piece: Piece, with_ids: bool) -> dict[str, Any]:
        """See :class:`Shape`."""
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": piece.text},
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish,
        }
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        return choice | {"token_ids": piece.ids if with_ids else None}

    def whole_choice(self, index: int, piece: Piece, with_ids: bool) -> dict[str, Any]:
        """See :class:`Shape`."""
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None, "tool_calls": []}
        return {
            "index": index,
            "message": message,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
            "token_ids": piece.ids if with_ids else None,
        }

    def whole_extra(self, pieces: Sequence[Piece], with_ids: bool) -> dict[str, Any]:
        """The prompt's ids."""
        return {"prompt_token_ids": pieces[0].prompt_ids if with_ids else None}


def logprobs_piece(chat: bool, tokens: list[int], states: list[int], top: int, offset: int) -> dict[str, Any]:
    """Log probabilities that look the part: the token's own between 0 and -1, further ones below it."""
    own = [-((s >> 20) & 0xFFFF) / 65536.0 for s in states]
    names = [_token_text(t) for t in tokens]
    rivals = [{_rival(t, k): p - 0.5 * k for k in range(1, top)} for t, p in zip(tokens, own, strict=True)]
    if chat:
        content = []
        for t, name, p, others in zip(tokens, names, own, rivals, strict=True):
            ranked = [{"token": n, "logprob": q, "bytes": list(n.encode())} for n, q in [(name, p), *others.items()]]
            raw = [t] if t < 256 else []
            content.append({"token": name, "logprob": p, "bytes": raw, "top_logprobs": ranked[:top]})
        return {"content": content}
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    tops = [{name: p} | others for name, p, others in zip(names, own, rivals, strict=True)]
    return {"text_offset": offsets, "token_logprobs": own, "tokens": names, "top_logprobs": tops}


def _token_text(token: int) -> str:
    return chr(token) if token < 128 else "�" if token < 256 else ""


def _rival(token: int, k: int) -> str:
    return chr(33 + (token + 7 * k) % 94)
