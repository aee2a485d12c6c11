"""The families by name, and drawing problems from all of them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

from penstock.core.errors import PenstockError
from penstock.workload.problems import collatz, fibonacci, multiples, orbit, sorting


class Problem(NamedTuple):
    """A prompt, which ends with a line break, and its solution; the model ends that with its end-of-text token."""

    family: str
    prompt: str
    solution: str

    @property
    def output_tokens(self) -> int:
        """Tokens of the right answer from the bundled model, end of text included."""
        return len(self.solution) + 1


class Family(Protocol):
    """A module with these two functions; :func:`draw` takes one at random, :func:`solve` is the oracle."""

    def draw(self, source: random.Random) -> str:
        """A random question, without the line break."""

    def solve(self, question: str) -> str:
        """The written-out solution; ``ValueError`` for what is no question of this family."""


FAMILIES: Final[Mapping[str, Family]] = {
    "collatz": collatz,
    "sort": sorting,
    "multiples": multiples,
    "fibonacci": fibonacci,
    "orbit": orbit,
}


def draw(source: random.Random, family: str | None = None) -> Problem:
    """One random problem, of a random family where none is given.

    Raises
    ------
    PenstockError
        If there is no such family.
    """
    name = family if family is not None else source.choice(tuple(FAMILIES))
    if name not in FAMILIES:
        raise PenstockError(f"no family of problems is called {name!r}", f"one of {', '.join(FAMILIES)}")
    question = FAMILIES[name].draw(source)
    return Problem(name, question + "\n", FAMILIES[name].solve(question))


def problem_of(prompt: str) -> Problem:
    """The problem that a prompt asks; ``ValueError`` if it is none of ours."""
    question = prompt.removesuffix("\n")
    name = question.partition(" ")[0]
    if name not in FAMILIES:
        raise ValueError(f"no problem begins with {name!r}")
    return Problem(name, question + "\n", FAMILIES[name].solve(question))
