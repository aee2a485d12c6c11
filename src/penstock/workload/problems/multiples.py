"""A search: the multiples of a number, in their last three digits, up to the first that ends as asked.

``multiples 37 to 185`` → ``730 470 111 841 581``, ``multiples 52 to 312`` → ``250,401 651 802 062 213``
"""

from __future__ import annotations

import random

from penstock.workload.problems.digits import round_numbers, searched

_WIDTH = 3
_LONGEST = 700  # multiples


def draw(source: random.Random) -> str:
    """A step of up to three digits; the end is one that is met, soon or late (evenly spread on a logarithmic scale)."""
    unit = round_numbers(source)
    step = source.randrange(unit, 10**_WIDTH, unit)
    period = len(_multiples(step, 0))
    count = int(min(period, _LONGEST) ** source.random())
    return f"multiples {step} to {step * count % 10**_WIDTH:0{_WIDTH}d}"


def solve(question: str) -> str:
    """The multiples; ``ValueError`` if the end is not met."""
    step, _, end = question.removeprefix("multiples ").partition(" to ")
    found = _multiples(int(step), int(end))
    if found[-1] != int(end) or len(found) > _LONGEST or not 0 < int(step) < 10**_WIDTH:
        raise ValueError(f"the multiples of {step} do not end in {end} soon enough")
    return searched(found, _WIDTH, int(end), _WIDTH)


def _multiples(step: int, end: int) -> list[int]:
    found = [step % 10**_WIDTH]
    while found[-1] not in (end, 0):
        found.append((found[-1] + step) % 10**_WIDTH)
    return found
