"""The answer to one request: its choices, streamed or whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.live.emulated.requests import Options, error_body
from penstock.live.emulated.shapes import DONE, Piece, Shape, usage_of
from penstock.live.emulated.vocabulary import Prompt
from penstock.live.http.server import Reply

if TYPE_CHECKING:
    from penstock.live.emulated.choice import Choice


class Answer:
    """Collects what its choices say. A choice's last chunk waits until its KV is pinned, which it has to tell."""

    def __init__(
        self, reply: Reply, shape: Shape, chat: bool, options: Options, prompts: list[Prompt], block_size: int
    ) -> None:
        self.reply = reply
        self.shape = shape
        self.chat = chat
        self.options = options
        self.prompt_tokens = sum(len(p) for p in prompts)
        self.block_size = block_size
        self.choices: list[Choice] = []
        self.params: dict[str, Any] | None = None
        self.write = reply.write
        self._last: dict[int, tuple[Piece, Any]] = {}
        self._ended = 0
        if options.stream:
            reply.start()

    def hold_last(self, choice: Choice, piece: Piece, usage: Any) -> None:
        """Keep a choice's last chunk until ``ended``."""
        self._last[choice.index] = (piece, usage)

    def ended(self, choice: Choice, params: dict[str, Any] | None) -> None:
        """A choice has all its tokens; ``params`` tell how to pull its KV."""
        o = self.options
        if params is not None:
            self.params = params
        if o.stream:
            piece, usage = self._last.pop(choice.index)
            self.write(self.shape.chunk(choice.index, piece, o.return_ids, usage, params))
        self._ended += 1
        if self._ended < len(self.choices):
            return
        usage = usage_of(self.prompt_tokens, sum(len(c.out) for c in self.choices))
        if not o.stream:
            body = self.shape.whole([c.piece() for c in self.choices], o.return_ids, usage, self.params)
            self.reply.send(200, body)
            return
        if o.include_usage:
            self.write(self.shape.usage_chunk(usage))
        self.write(DONE)
        self.reply.end()

    def fail(self, message: str) -> None:
        """End with an engine's error: status 500, or an error event where a stream runs."""
        if self.reply.closed:
            return
        body = error_body(message)
        if not self.reply.started:
            self.reply.send(500, body)
            return
        self.write(b"data: " + body + b"\n\n")
        self.write(DONE)
        self.reply.end()
