"""Fibonacci's rule in three digits from two given numbers, up to the first number that ends in two given digits.

``fibonacci 12 35 to 29`` → ``210 530 740 280 921``
"""

from __future__ import annotations

import random

from penstock.workload.problems.digits import round_numbers, searched

_WIDTH = 3
_END = 2
_LONGEST = 700  # numbers


def draw(source: random.Random) -> str:
    """Numbers of up to three digits; an end that is met, soon or late (evenly spread on a logarithmic scale)."""
    unit = round_numbers(source)
    first, second = (source.randrange(0, 10**_WIDTH, unit) for _ in range(2))
    earlier, found = first, second
    for _ in range(int(_LONGEST ** source.random())):
        earlier, found = found, (earlier + found) % 10**_WIDTH
    return f"fibonacci {first} {second} to {found % 10**_END:0{_END}d}"


def solve(question: str) -> str:
    """The numbers; ``ValueError`` if the end is not met."""
    numbers, _, end = question.removeprefix("fibonacci ").partition(" to ")
    first, second = (int(number) for number in numbers.split())
    found = _numbers(first, second, int(end))
    if not found or max(first, second) >= 10**_WIDTH:
        raise ValueError(f"no number ends in {end} soon enough")
    return searched(found, _WIDTH, int(end), _END)


def _numbers(first: int, second: int, end: int) -> list[int]:
    found = [first, second]
    while len(found) < 3 or found[-1] % 10**_END != end:
        found.append((found[-1] + found[-2]) % 10**_WIDTH)
        if len(found) > _LONGEST:
            return []
    return found
