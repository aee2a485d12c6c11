"""How to talk to a server: which of our wishes it takes, found out with a few short requests."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Response
from penstock.live.load.chunks import Usage, complaint
from penstock.live.load.endpoint import Endpoint, ask, refused
from penstock.live.load.words import WORDS

Form = Literal["tokens", "text"]
_UNDERSTOOD_BUT_REFUSED = (400, 415, 422)
_PROBE_WORDS = (16, 144)


class Dialect(msgspec.Struct, frozen=True):
    """What a server takes.

    ``form`` is how prompts are sent; ``ids`` whether it sends ``token_ids`` back when asked. A text of ``w`` words has
    about ``fixed + per_word * w`` prompt tokens (chat templates add some). ``notes`` say what it refused.
    """

    form: Form
    ids: bool
    fixed: float = 0.0
    per_word: float = 1.0
    notes: tuple[str, ...] = ()

    def words(self, tokens: int) -> int:
        """Words that make about this many prompt tokens, at least 1."""
        return max(1, round((tokens - self.fixed) / self.per_word))


class Wishes(msgspec.Struct, frozen=True):
    """What the user wants of every request.

    ``form`` None sends token ids where the server takes them. ``natural_end`` lets the model end the output. ``body``
    is merged into every body.
    """

    model: str
    form: Form | None = None
    natural_end: bool = False
    body: dict[str, Any] = {}


class _Answer(msgspec.Struct):
    usage: Usage | None = None


def common(wishes: Wishes, ids: bool) -> dict[str, Any]:
    """The fields that every request has."""
    content: dict[str, Any] = {"model": wishes.model, "temperature": 0}
    if not wishes.natural_end:
        content["ignore_eos"] = True
    if ids:
        content["return_token_ids"] = True
    return content | wishes.body


async def find_dialect(client: HttpClient, at: Endpoint, wishes: Wishes, vocab: range) -> Dialect:
    """Send up to eight requests of one output token, from the best dialect down, until the server takes one.

    Raises
    ------
    PenstockError
        It takes none, with what it said to the first.
    """
    if at.kind == "chat" and wishes.form == "tokens":
        raise PenstockError("chat takes no token ids", "drop --prompt tokens, or use --endpoint completions")
    forms: list[Form] = ["text"] if at.kind == "chat" else ["tokens", "text"] if wishes.form is None else [wishes.form]
    notes: list[str] = []
    first: Response | None = None
    for form in forms:
        for ids in (True, False):
            prompt = _token_prompt(vocab) if form == "tokens" else _text_prompt(_PROBE_WORDS[0])
            response = await _try(client, at, wishes, prompt, ids)
            if response.status == 200:
                fixed, per_word = (0.0, 1.0)
                if form == "text":
                    fixed, per_word, said = await _calibrate(client, at, wishes, ids, response)
                    notes += said
                return Dialect(form, ids, fixed, per_word, tuple(notes))
            if response.status not in _UNDERSTOOD_BUT_REFUSED:
                raise refused(at, response)
            first = first or response
            last = response
        if form == "tokens":
            notes.append(f"the server refuses prompts of token ids ({complaint(last.body, 160)}): sending text")
    assert first is not None
    if not wishes.natural_end:
        plain = msgspec.structs.replace(wishes, natural_end=True)
        response = await _try(client, at, plain, prompt, False)
        if response.status == 200:
            raise PenstockError(
                f"{at.origin} refuses ignore_eos ({complaint(last.body, 160)})",
                "add --natural-end; outputs then end where the model ends them",
            )
    raise refused(at, first)


async def _try(client: HttpClient, at: Endpoint, wishes: Wishes, prompt: list[int] | str, ids: bool) -> Response:
    return await ask(client, at, "POST", at.path, common(wishes, ids) | {"max_tokens": 1} | prompt_field(at, prompt))


def prompt_field(at: Endpoint, prompt: list[int] | str) -> dict[str, Any]:
    """The prompt as the endpoint wants it."""
    if at.kind == "chat":
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


async def _calibrate(
    client: HttpClient, at: Endpoint, wishes: Wishes, ids: bool, short: Response
) -> tuple[float, float, list[str]]:
    """Prompt tokens as a line in words: where it begins, its slope, and a note if the server counts no tokens."""
    long = await _try(client, at, wishes, _text_prompt(_PROBE_WORDS[1]), ids)
    counts = [_prompt_tokens(response) for response in (short, long)]
    (w0, w1), (t0, t1) = _PROBE_WORDS, counts
    if t0 is None or t1 is None or t1 <= t0:
        return 0.0, 1.0, ["the server does not count prompt tokens: a word is taken as one token"]
    per_word = (t1 - t0) / (w1 - w0)
    return t0 - per_word * w0, per_word, []


def _prompt_tokens(response: Response) -> int | None:
    try:
        usage = msgspec.json.decode(response.body, type=_Answer).usage
    except msgspec.MsgspecError:
        return None
    return None if usage is None else usage.prompt_tokens


def _token_prompt(vocab: range) -> list[int]:
    return [vocab[0], vocab[-1]] * 4


def _text_prompt(words: int) -> str:
    return " ".join((WORDS * (1 + words // len(WORDS)))[:words])
