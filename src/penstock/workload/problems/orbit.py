"""A search in a table: follow the arrows from a letter until it comes again.

``orbit ac bd cb da from b`` → ``b d a c``
"""

from __future__ import annotations

import random
import string


def draw(source: random.Random) -> str:
    """A permutation of 3 to 26 letters, and one of them."""
    names = source.sample(string.ascii_lowercase, source.randint(3, 26))
    targets = source.sample(names, len(names))
    table = " ".join(name + target for name, target in zip(names, targets, strict=True))
    return f"orbit {table} from {source.choice(names)}"


def solve(question: str) -> str:
    """The letters met; ``ValueError`` if the table is not a permutation."""
    table, _, start = question.removeprefix("orbit ").partition(" from ")
    arrows = {pair[0]: pair[1] for pair in table.split() if len(pair) == 2}
    if start not in arrows or set(arrows) != set(arrows.values()):
        raise ValueError("the table is not a permutation, or the start is not in it")
    met = [start]
    while arrows[met[-1]] != start:
        met.append(arrows[met[-1]])
    return " ".join(met)
