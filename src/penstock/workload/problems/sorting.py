"""Gnome sort of letters: compare the two at the bar; in order, step right; else swap them and step left.

``sort cab`` → ``c|ab........... a|cb........... ac|b........... a|bc........... ab|c........... abc|...........``
"""

from __future__ import annotations

import random
import string

_WIDTH = 14


def draw(source: random.Random) -> str:
    """2 to 14 different letters."""
    return "sort " + "".join(source.sample(string.ascii_lowercase, source.randint(2, _WIDTH)))


def solve(question: str) -> str:
    """Every state of the list; ``ValueError`` if it is not 2 to 14 different letters."""
    letters = list(question.removeprefix("sort "))
    if (
        not 2 <= len(letters) <= _WIDTH
        or len(set(letters)) < len(letters)
        or not set(letters) <= set(string.ascii_lowercase)
    ):
        raise ValueError("a list is 2 to 14 different letters")
    size, at = len(letters), 1
    states = [_state(letters, at)]
    while at < size:
        if letters[at - 1] < letters[at]:
            at += 1
        else:
            letters[at - 1], letters[at] = letters[at], letters[at - 1]
            at = max(at - 1, 1)
        states.append(_state(letters, at))
    return " ".join(states)


def _state(letters: list[str], at: int) -> str:
    return "".join(letters[:at]) + "|" + "".join(letters[at:]) + "." * (_WIDTH - len(letters))
