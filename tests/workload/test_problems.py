"""Problems: solutions hold by rules written down a second time, and traces carry the prompts."""

from __future__ import annotations

import itertools
import random
import re

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.live.load.bodies import CHAT_TEMPLATE_TOKENS, Bodies
from penstock.live.load.dialect import Dialect, Wishes
from penstock.live.load.endpoint import endpoint
from penstock.live.load.prompts import Prompts
from penstock.workload.problems import FAMILIES, draw, problem_of
from penstock.workload.synthetic import synthesize

CONTEXT = 4096
seeds = st.integers(0, 2**40)


def numbers(solution: str) -> list[int]:
    """Numbers written last digit first."""
    return [int(word[::-1]) for word in re.split("[ ,;]", solution)]


def check_marks(solution: str, wanted: str) -> None:
    """After each number of a search: how many of its last digits agree with the wanted ones, last digit first."""
    for number, mark in re.findall(r"(\d+)([ ,;])", solution):
        agree = next((i for i, (a, b) in enumerate(zip(number, wanted, strict=False)) if a != b), len(wanted))
        assert mark == " ,;"[agree], (number, wanted)


@given(seeds, st.sampled_from(sorted(FAMILIES)))
def test_a_prompt_determines_its_problem_and_fits_the_context(seed: int, family: str) -> None:
    problem = draw(random.Random(seed), family)
    assert problem == draw(random.Random(seed), family) == problem_of(problem.prompt)
    assert problem.family == family and problem.prompt.isascii() and problem.prompt.count("\n") == 1
    assert len(problem.prompt) + problem.output_tokens + CHAT_TEMPLATE_TOKENS <= CONTEXT


@given(seeds)
def test_collatz(seed: int) -> None:
    problem = draw(random.Random(seed), "collatz")
    chain = numbers(problem.solution)
    assert chain[0] == int(problem.prompt.split()[1]) and chain.index(1) == len(chain) - 1
    assert all((2 * b == a) if a % 2 == 0 else (b == 3 * a + 1) for a, b in itertools.pairwise(chain))


@given(seeds)
def test_sort(seed: int) -> None:
    problem = draw(random.Random(seed), "sort")
    letters = problem.prompt.split()[1]
    states = [state.rstrip(".") for state in problem.solution.split()]
    assert states[-1] == "".join(sorted(letters)) + "|"
    assert len({len(word) for word in problem.solution.split()}) == 1
    for before, after in itertools.pairwise(states):
        at = before.index("|")
        left, right = before[at - 1], before[at + 1]
        swapped = before[: at - 1] + right + left + before[at + 2 :]
        plain = before.replace("|", "")
        assert after.replace("|", "") == (plain if left < right else swapped)
        assert after.index("|") == (at + 1 if left < right else max(at - 1, 1))


@given(seeds)
def test_multiples(seed: int) -> None:
    problem = draw(random.Random(seed), "multiples")
    _, step, _, end = problem.prompt.split()
    found = numbers(problem.solution)
    assert found == [int(step) * k % 1000 for k in range(1, len(found) + 1)]
    assert found.index(int(end)) == len(found) - 1
    check_marks(problem.solution, end[::-1])


@given(seeds)
def test_fibonacci(seed: int) -> None:
    problem = draw(random.Random(seed), "fibonacci")
    _, first, second, _, end = problem.prompt.split()
    found = numbers(problem.solution)
    assert found[:2] == [int(first), int(second)]
    assert all(c == (a + b) % 1000 for a, b, c in zip(found, found[1:], found[2:], strict=False))
    assert [n % 100 == int(end) for n in found[2:]] == [False] * (len(found) - 3) + [True]
    check_marks(problem.solution, end[::-1])


@given(seeds)
def test_orbit(seed: int) -> None:
    problem = draw(random.Random(seed), "orbit")
    *table, _, start = problem.prompt.split()[1:]
    arrows = {pair[0]: pair[1] for pair in table}
    met = problem.solution.split()
    assert met[0] == start and len(set(met)) == len(met)
    assert [arrows[letter] for letter in met] == [*met[1:], start]


@pytest.mark.parametrize(
    "prompt", ["collatz 0", "collatz 999999", "sort aab", "multiples 10 to 7", "orbit ab from c", "guess 3"]
)
def test_what_is_no_problem_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"range|letters|do not end|permutation|no problem"):
        problem_of(prompt)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(PenstockError, match="'chess'"):
        draw(random.Random(0), "chess")


def test_lengths_have_a_heavy_tail() -> None:
    lengths = synthesize("problems", 3000, seed=1).output_tokens
    p50, p99 = np.quantile(lengths, [0.5, 0.99])
    assert lengths.min() < 10 and lengths.max() > 2000 and p99 > 8 * p50


def test_traces_carry_prompts_and_bodies_send_them() -> None:
    trace = synthesize("problems", 20, seed=2).select(np.array([3, 7, 11]))
    assert trace.prompts is not None and synthesize("problems@10,512/8@10", 20, seed=2).prompts is None
    problems = [problem_of(prompt) for prompt in trace.prompts]
    assert trace.prompt_tokens.tolist() == [len(p.prompt) for p in problems]
    assert trace.output_tokens.tolist() == [p.output_tokens for p in problems]
    for natural_end in (False, True):
        for kind in ("completions", "chat"):
            wishes = Wishes("m", natural_end=natural_end)
            at = endpoint("http://127.0.0.1:1", None, kind)
            bodies = Bodies(at, Dialect("text", False), wishes, trace, Prompts(trace, range(9)), longest=CONTEXT)
            body = msgspec.json.decode(bodies.body(1))
            text = body["prompt"] if kind == "completions" else body["messages"][0]["content"]
            assert text == (problems[1].prompt if kind == "completions" else problems[1].prompt[:-1])
            room = CONTEXT - len(problems[1].prompt) - CHAT_TEMPLATE_TOKENS
            assert body["max_tokens"] == (room if natural_end else problems[1].output_tokens)
