"""What the model is asked: puzzles, or a user's own prompts."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from penstock.core.errors import PenstockError
from penstock.workload.problems import Problem, draw


class Ask(NamedTuple):
    """``key`` names the question: equal keys, equal questions. ``guess`` is what the greedy output may be, end of text
    included; empty if nobody knows.
    """

    key: str
    family: str
    text: str
    ids: list[int]
    guess: list[int]


def puzzles(tokenizer: Any, end: int, requests: int, seed: int, chat_share: float) -> list[Ask]:
    """Random puzzles, no two the same, some of them in the chat template, with their right solutions as guesses.

    A few small puzzles would else come again and again, and whichever part of the requests they fall to would be unlike
    the others.

    Parameters
    ----------
    tokenizer : a tokenizer of transformers, or None
        None: a token is a byte.
    end : int
        The id that ends an output.
    requests, seed : int
        How many, and which.
    chat_share : float
        Share in the chat template, where the tokenizer has one.
    """
    source = random.Random(seed)
    chats = tokenizer is not None and bool(getattr(tokenizer, "chat_template", None))
    found: list[Ask] = []
    asked: set[str] = set()
    while len(found) < requests:
        problem = draw(source)
        if problem.prompt in asked:
            continue
        asked.add(problem.prompt)
        chat = source.random() < chat_share
        guess = [*_ids(tokenizer, problem.solution, False), end]
        if chat and chats:
            text = _in_template(tokenizer, problem)
            ids = _ids(tokenizer, text, False)
        else:
            text, ids = problem.prompt, _ids(tokenizer, problem.prompt)
        found.append(Ask(problem.prompt, problem.family, text, ids, guess))
    return found


def read_prompts(path: str, tokenizer: Any, most: int) -> list[Ask]:
    """The first prompts of a JSONL file, an object a line with ``prompt`` or ``prompt_token_ids``.

    Raises
    ------
    PenstockError
        The file cannot be read, or a line is none such.
    """
    remedy = 'each line is an object with "prompt": text, or "prompt_token_ids": [ids]'
    found: list[Ask] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(found) == most:
                    break
                if not line.strip():
                    continue
                try:
                    found.append(_ask(json.loads(line), tokenizer))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise PenstockError(f"{path}:{number} has no prompt ({error!r})", remedy) from None
    except OSError as error:
        raise PenstockError(f"cannot read {path} ({error.strerror})", "give --prompts a JSONL file") from None
    if not found:
        raise PenstockError(f"{path} has no prompts", remedy)
    return found


def _ask(line: Any, tokenizer: Any) -> Ask:
    family = str(line.get("family", ""))
    if "prompt_token_ids" in line:
        ids = [int(i) for i in line["prompt_token_ids"]]
        text = bytes(i for i in ids if i < 256).decode(errors="replace") if tokenizer is None else tokenizer.decode(ids)
    else:
        text = line["prompt"]
        if not isinstance(text, str):
            raise TypeError("prompt is no text")
        ids = _ids(tokenizer, text)
    if not ids:
        raise ValueError("the prompt is empty")
    return Ask(str(text), family, str(text), ids, [])


def _ids(tokenizer: Any, text: str, specials: bool = True) -> list[int]:
    if tokenizer is None:
        return list(text.encode())
    return list(tokenizer(text, add_special_tokens=specials)["input_ids"])


def _in_template(tokenizer: Any, problem: Problem) -> str:
    message = {"role": "user", "content": problem.prompt.rstrip("\n")}
    return str(tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
