"""Collatz chains: halve what is even, else triple and add one, down to one.

``collatz 6`` → ``600000 300000 010000 500000 610000 800000 400000 200000 100000``
"""

from __future__ import annotations

import math
import random

from penstock.workload.problems.digits import backwards

_WIDTH = 6
_LONGEST = 440  # numbers in a chain


def draw(source: random.Random) -> str:
    """Start numbers spread evenly over the orders of magnitude, up to a million."""
    while True:
        start = int(math.exp(source.uniform(0.0, math.log(10**_WIDTH))))
        if _chain(start):
            return f"collatz {start}"


def solve(question: str) -> str:
    """The chain; ``ValueError`` if it leaves six digits."""
    start = int(question.removeprefix("collatz "))
    chain = _chain(start) if start > 0 else []
    if not chain:
        raise ValueError(f"the chain of {start} is not in range")
    return " ".join(backwards(number, _WIDTH) for number in chain)


def _chain(start: int) -> list[int]:
    chain = [start]
    while chain[-1] != 1:
        last = chain[-1]
        chain.append(last // 2 if last % 2 == 0 else 3 * last + 1)
        if chain[-1] >= 10**_WIDTH or len(chain) > _LONGEST:
            return []
    return chain
