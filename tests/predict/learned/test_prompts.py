"""What the model is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import PenstockError
from penstock.predict.learned.worker.prompts import puzzles, read_prompts
from penstock.workload.problems import problem_of


class Template:
    """As much of a tokenizer as is asked for: a byte is a token, special tokens come first where they are wanted."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [*([999] if add_special_tokens else []), *text.encode()]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<{messages[0]['content']}>"


def test_puzzles_are_all_different_and_know_their_answers() -> None:
    asks = puzzles(None, 258, 400, 1, 0.5)
    assert len({ask.key for ask in asks}) == 400
    assert len({ask.family for ask in asks}) == 5
    for ask in asks:
        assert bytes(ask.ids).decode() == ask.text == ask.key
        assert ask.guess == [*problem_of(ask.key).solution.encode(), 258]
    assert puzzles(None, 258, 400, 1, 0.5) == asks
    assert puzzles(None, 258, 400, 2, 0.5) != asks


def test_some_are_in_the_chat_template() -> None:
    asks = puzzles(Template(), 258, 400, 1, 0.3)
    chats = [ask for ask in asks if ask.text.startswith("<")]
    assert 80 < len(chats) < 160
    assert all(ask.ids == list(ask.text.encode()) and ask.text == f"<{ask.key[:-1]}>" for ask in chats)
    plain = [ask for ask in asks if not ask.text.startswith("<")]
    assert all(ask.ids == [999, *ask.key.encode()] for ask in plain)
    assert all(999 not in ask.guess for ask in asks)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [{"prompt": "hé", "family": "x"}, {"prompt_token_ids": [104, 105]}, {"prompt": "third"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    first, second = read_prompts(str(path), None, 2)
    assert (first.ids, first.text, first.family, first.guess) == (list("hé".encode()), "hé", "x", [])
    assert (second.ids, second.text, second.key) == ([104, 105], "hi", "hi")


@pytest.mark.parametrize("line", ['{"text": 1}', "[1]", "nonsense", '{"prompt": ""}', '{"prompt_token_ids": ["a"]}'])
def test_lines_that_are_no_prompts(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(PenstockError, match=r"p\.jsonl:2 has no prompt.*prompt_token_ids"):
        read_prompts(str(path), None, 9)


def test_no_prompts_at_all(tmp_path: Path) -> None:
    with pytest.raises(PenstockError, match="cannot read"):
        read_prompts(str(tmp_path / "none"), None, 9)
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(PenstockError, match="has no prompts"):
        read_prompts(str(tmp_path / "empty"), None, 9)
