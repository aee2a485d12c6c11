"""Numbers as the solutions write them."""

from __future__ import annotations

import random


def backwards(number: int, width: int) -> str:
    """``number`` in ``width`` decimal digits, the last one first: carries then run in the direction of writing."""
    return f"{number:0{width}d}"[::-1]


def round_numbers(source: random.Random) -> int:
    """What the numbers of a problem are to be multiples of: 1, or for one problem in three 10.

    All numbers of a search among round ones agree with the end in their last digit, so how the second digit decides is
    seen ten times as often.
    """
    return 10 if source.random() < 1 / 3 else 1


def searched(numbers: list[int], width: int, end: int, end_width: int) -> str:
    """The numbers of a search for one whose last ``end_width`` digits are ``end``.

    The character after each says how many of its last digits agree with what is asked for: a space none, a comma one,
    a semicolon two. The last number agrees in all, and nothing follows it.
    """
    words = [backwards(number, width) for number in numbers]
    wanted = backwards(end, end_width)
    marks = [_MARKS[_agreeing(word, wanted)] for word in words[:-1]]
    return "".join(word + mark for word, mark in zip(words, marks, strict=False)) + words[-1]


_MARKS = " ,;"


def _agreeing(word: str, wanted: str) -> int:
    for count, (found, asked) in enumerate(zip(word, wanted, strict=False)):
        if found != asked:
            return count
    return len(wanted)
