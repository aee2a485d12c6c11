"""One sequence of an answer: its next token, its text, and when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.live.emulated.requests import Options
from penstock.live.emulated.shapes import Piece, logprobs_piece, usage_of
from penstock.live.emulated.vocabulary import (
    BYTES,
    EOS,
    MASK,
    MULTIPLIER,
    Prompt,
    advance,
    decode_output,
    next_token,
    width,
)
from penstock.sim.seq import Seq

if TYPE_CHECKING:
    from penstock.live.emulated.answer import Answer

POISON = 0xA5A5A5A5A5A5A5A5
"""What wrong KV does to the state: the text goes on, and it is another one."""


class Choice:
    """A sequence. ``token`` is called once for each step of the engine that yields one for it.

    Text comes as vLLM's incremental detokeniser gives it: nothing for the bytes of a character until it is whole, and
    nothing at all for one that the prompt has begun. While a stop string may be coming, as many characters are held
    back as the longest one has, but one.
    """

    __slots__ = (
        "_begun",
        "_end",
        "_endings",
        "_foreign",
        "_head",
        "_hold",
        "_opened",
        "_plain",
        "_sent",
        "_shown",
        "_stream",
        "_text",
        "answer",
        "arrived_s",
        "block_states",
        "cached",
        "finish",
        "first_s",
        "index",
        "left",
        "options",
        "out",
        "parked",
        "poisoned",
        "prompt",
        "request",
        "seq",
        "state",
        "stop_reason",
    )

    def __init__(self, answer: Answer, index: int, prompt: Prompt, limit: int, options: Options, request: int) -> None:
        self.answer = answer
        self.index = index
        self.prompt = prompt
        self.options = options
        self.request = request
        self.seq: Seq
        self.state = prompt.state
        self.out: list[int] = []
        self.left = limit
        self.block_states = list(prompt.blocks)
        self.cached = -1  # prompt tokens found here; -1 until that is known
        self.finish: str | None = None
        self.stop_reason: int | str | None = None
        self.poisoned = False
        self.parked = False  # stock vLLM waits for ever for what will never come
        self.arrived_s = 0.0
        self.first_s = -1.0

        self._opened = prompt.opened
        self._foreign = bool(prompt.opened)  # the open character began in the prompt
        self._text = ""  # all text so far, where stop strings are looked for
        self._end = -1  # where a stop string cuts it
        self._sent = 0
        self._shown = 0
        self._hold = 0
        if options.stop and not options.include_stop:
            self._hold = max(len(s) for s in options.stop) - 1
        self._begun = False
        self._stream = options.stream
        self._plain = False
        self._head = answer.shape.prepared(index)
        self._endings = answer.shape.endings(options.return_ids)

    @property
    def name(self) -> str:
        """The engine's own name of it, which holds the client's request id."""
        return f"{self.answer.shape.id}-{self.index}-{self.request:08x}"

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return len(self.prompt) + len(self.out)

    def token(self) -> bool:
        """Generate the next token and send it; True if it is the last."""
        if self._plain and self.left > 1:
            state = self.state
            token = BYTES[state >> 52]
            if token < 128:
                self.state = (state * MULTIPLIER + token + 1) & MASK
                self.out.append(token)
                self.left -= 1
                if self._stream:
                    self.answer.write(self._head + self._endings[token])
                return False
        return self._token()

    def poison(self) -> None:
        """Its KV is wrong."""
        if not self.poisoned:
            self.poisoned = True
            self.state ^= POISON

    def remaining(self) -> int:
        """Tokens still to come: up to where it ends by itself, or to its limit. Stop strings are not foreseen."""
        o = self.options
        if not o.eos_below:
            return self.left
        state, opened = self.state, self._opened
        for ahead in range(self.left):
            can_end = len(self.out) + ahead >= o.min_tokens
            token = next_token(state, opened, o.eos_below if can_end else 0)
            if token == EOS:
                return ahead + 1
            state = advance(state, token)
            if opened:
                opened += bytes([token])
                opened = b"" if len(opened) >= width(opened[0]) else opened
            elif token < 256 and width(token) > 1:
                opened = bytes([token])
        return self.left

    def block_state(self, index: int) -> int:
        """The hash of the sequence up to the end of full block ``index``."""
        known = self.block_states
        size = self.answer.block_size
        while len(known) <= index:
            start = len(known) * size
            before = len(self.prompt)
            state = known[-1] if known else Prompt.START
            inside = self.prompt.ids[start : start + size].tolist() if start < before else []
            for token in [*inside, *self.out[max(0, start - before) : start + size - before]]:
                state = advance(state, token)
            known.append(state)
        return known[index]

    def all_tokens(self) -> list[int]:
        """Prompt and output."""
        ids: list[int] = self.prompt.ids.tolist()
        return ids + self.out

    def piece(self) -> Piece:
        """The whole choice, for an answer that is not streamed."""
        o = self.options
        text = self._text[: self._end] if self._end >= 0 else decode_output(self._kept())
        found = None
        if o.logprobs is not None:
            found = logprobs_piece(self.answer.chat, self.out, self._states(), o.logprobs, 0)
        ids = self.prompt.ids.tolist() if o.return_ids else None
        return Piece(text, self.out, found, self.finish, self.stop_reason, ids)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _token(self) -> bool:
        """The general case: characters of several bytes, ends, stops, and everything that is asked for but seldom."""
        o = self.options
        before = self.state
        can_end = len(self.out) >= o.min_tokens
        token = next_token(before, self._opened, o.eos_below if can_end else 0)
        self.state = advance(before, token)
        self.out.append(token)
        self.left -= 1
        text = self._read(token)
        if token == EOS:
            self.finish = "stop"
        elif token in o.stop_ids and len(self.out) > o.min_tokens:
            self.finish, self.stop_reason = "stop", token
            text = text if o.include_stop else ""
        elif self.left == 0:
            self.finish = "length"
        if o.stop:
            self._text += text
            if self.finish != "stop" and len(self.out) > o.min_tokens:
                self._look_for_stop(len(text))
            text = self._release()
        if self._stream:
            self._send(token, before, text)
        self._plain = not (
            self._opened or o.stop or o.stop_ids or o.usage_each or o.eos_below or o.logprobs is not None
        )
        return self.finish is not None

    def _read(self, token: int) -> str:
        """The text that a token completes."""
        if token >= 256:
            return ""
        if not self._opened:
            if width(token) == 1:
                return chr(token) if token < 128 else ""
            self._opened = bytes([token])
            return ""
        self._opened += bytes([token])
        if len(self._opened) < width(self._opened[0]):
            return ""
        text = "" if self._foreign else self._opened.decode("utf-8", "ignore")
        self._opened, self._foreign = b"", False
        return text

    def _look_for_stop(self, fresh: int) -> None:
        for stop in self.options.stop:
            at = self._text.find(stop, max(0, len(self._text) - fresh - len(stop) + 1)) if fresh else -1
            if at >= 0:
                self.finish, self.stop_reason = "stop", stop
                self._end = at + len(stop) if self.options.include_stop else at
                return

    def _release(self) -> str:
        """What may be shown of the text."""
        end = self._end if self._end >= 0 else len(self._text) - (0 if self.finish else self._hold)
        start = self._sent
        self._sent = max(start, end)
        return self._text[start : self._sent]

    def _send(self, token: int, state: int, text: str) -> None:
        o, answer = self.options, self.answer
        prompt_ids = None
        if not self._begun:
            self._begun = True
            prompt_ids = self.prompt.ids.tolist() if o.return_ids else None
            answer.write(answer.shape.opening(self.index, prompt_ids))
        found = None
        if o.logprobs is not None:
            found = logprobs_piece(answer.chat, [token], [state], o.logprobs, self._shown)
            self._shown += len(text)
        usage = usage_of(len(self.prompt), len(self.out)) if o.usage_each else None
        piece = Piece(text, [token], found, self.finish, self.stop_reason, prompt_ids)
        if self.finish is not None:
            answer.hold_last(self, piece, usage)
        else:
            answer.write(answer.shape.chunk(self.index, piece, o.return_ids, usage))

    def _kept(self) -> list[int]:
        """Tokens whose text is shown: a stop token's is not."""
        hidden = self.finish == "stop" and isinstance(self.stop_reason, int) and not self.options.include_stop
        return self.out[:-1] if hidden else self.out

    def _states(self) -> list[int]:
        state, states = self.prompt.state, []
        for token in self.out:
            states.append(state)
            state = advance(state, token)
        return states
