"""Built-in joint distributions of prompt and output length.

A profile is a compact table of figures (``profiles/*.json``, made by ``scripts/make_length_profiles.py``), so that the
product needs no download. Prompt lengths follow a quantile function; output lengths follow one quantile function per
prompt-length bin, which keeps the correlation of the two.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Protocol

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.workload.problems import Problem, draw
from penstock.workload.trace import F64, I64

PROFILES = ("azure-conv", "azure-code", "sharegpt", "reasoning")
PROBLEMS = "problems"

_RANGE = re.compile(r"(\d+)(?:-(\d+))?/(\d+)(?:-(\d+))?$")


class Lengths(Protocol):
    """A joint distribution of prompt and output length."""

    def sample(self, n: int, rng: np.random.Generator) -> tuple[I64, I64]:
        """``n`` pairs: prompt_tokens int64[n], output_tokens int64[n], each at least 1."""
        ...


@dataclass(frozen=True)
class UniformLengths:
    """Independent whole numbers, uniform between two bounds (both included)."""

    prompt: tuple[int, int]
    output: tuple[int, int]

    def __post_init__(self) -> None:
        for low, high in (self.prompt, self.output):
            if not 1 <= low <= high:
                raise PenstockError(f"lengths {low}-{high}", "give 1 <= low <= high")

    def sample(self, n: int, rng: np.random.Generator) -> tuple[I64, I64]:
        """``n`` pairs, see ``Lengths``."""
        return (
            rng.integers(self.prompt[0], self.prompt[1], n, endpoint=True),
            rng.integers(self.output[0], self.output[1], n, endpoint=True),
        )


@dataclass(frozen=True)
class TableLengths:
    """Quantile tables.

    Attributes
    ----------
    prompt : float64[k]
        Quantiles of the prompt length at the shares ``quantile_grid(k)``.
    output : float64[b, m]
        Row j: quantiles at ``quantile_grid(m)`` of the output length of requests whose prompt-length rank is within
        ``[j / b, (j + 1) / b)``.
    """

    prompt: F64
    output: F64

    def sample(self, n: int, rng: np.random.Generator) -> tuple[I64, I64]:
        """``n`` pairs, see ``Lengths``."""
        rank = rng.random(n)
        bins, points = self.output.shape
        row = (rank * bins).astype(np.int64)
        prompt = _interpolate(self.prompt, rank, 0)
        output = _interpolate(self.output.ravel(), rng.random(n), row * points, points)
        return prompt, output


@dataclass(frozen=True)
class ReasoningLengths:
    """Prompts as another profile; outputs independent of them, by a quantile function that is linear in log length.

    Attributes
    ----------
    share, tokens : float64[k]
        Knots of the quantile function: a share ``share[i]`` of the outputs is below ``tokens[i]``.
    """

    prompts: Lengths
    share: F64
    tokens: F64

    def sample(self, n: int, rng: np.random.Generator) -> tuple[I64, I64]:
        """``n`` pairs, see ``Lengths``."""
        prompt, _ = self.prompts.sample(n, rng)
        output = np.exp(np.interp(rng.random(n), self.share, np.log(self.tokens)))
        # Floor, so that a share of exactly share[i] is below tokens[i]; the factor makes up for exp(log(x)) < x.
        whole: I64 = np.maximum(1, np.floor(output * (1 + 1e-12))).astype(np.int64)
        return prompt, whole


class ProblemLengths:
    """Problems with written-out solutions, which the bundled model answers (:mod:`penstock.workload.problems`)."""

    def problems(self, n: int, rng: np.random.Generator) -> list[Problem]:
        """``n`` problems of random families."""
        source = random.Random(int(rng.integers(2**63)))
        return [draw(source) for _ in range(n)]

    def sample(self, n: int, rng: np.random.Generator) -> tuple[I64, I64]:
        """``n`` pairs, see ``Lengths``."""
        return lengths_of(self.problems(n, rng))


def lengths_of(problems: list[Problem]) -> tuple[I64, I64]:
    """Prompt and output tokens of problems, int64[n] each; one character is one token of the bundled model."""
    prompt = np.array([len(p.prompt) for p in problems], np.int64)
    return prompt, np.array([p.output_tokens for p in problems], np.int64)


class _ProfileFile(msgspec.Struct):
    """Layout of ``profiles/*.json``."""

    name: str
    source: str
    licence: str
    requests: int | None = None
    prompt: list[float] = []
    output: list[list[float]] = []
    prompt_like: str | None = None
    output_share: list[float] = []
    output_tokens: list[float] = []


def quantile_grid(points: int) -> F64:
    """Shares at which a table of ``points`` quantiles stands, float64[points] from 0 to 1, denser towards 1.

    Long requests are few and carry much of the load, so that the upper tail needs the finer grid. The square makes the
    inverse one square root.
    """
    return 1 - (1 - np.linspace(0, 1, points)) ** 2


@cache
def length_profile(name: str) -> Lengths:
    """A built-in profile (``PROFILES``), or lengths written as ``PROMPT/OUTPUT`` or ``LOW-HIGH/LOW-HIGH``.

    ``azure-conv`` and ``azure-code`` are the Azure LLM inference traces of 2023 (CC-BY-4.0); ``sharegpt`` the length
    table published with Vidur (MIT). ``reasoning`` is a *reconstruction from the two shares* that the STAR paper (arXiv
    2510.13668 v2) reports for the outputs of DeepSeek-R1-Distill-Qwen-7B on ShareGPT prompts: 29.2 % below 1,000
    tokens, 17.3 % above 30,000, cut at 32,768; in between log-uniform, and most of the 17.3 % at the cap itself, as
    outputs of that length are mostly ones that ran into it. No joint distribution is published: outputs are independent
    of prompts. ``problems`` are puzzles that the bundled model can solve, prompts included.

    Raises
    ------
    PenstockError
        For an unknown name.
    """
    if match := _RANGE.match(name):
        low_p, high_p, low_o, high_o = match.groups()
        return UniformLengths((int(low_p), int(high_p or low_p)), (int(low_o), int(high_o or low_o)))
    if name == PROBLEMS:
        return ProblemLengths()
    if name not in PROFILES:
        known = ", ".join((*PROFILES, PROBLEMS))
        raise PenstockError(f'length profile "{name}" is unknown', f"give {known}, or lengths such as 512/128")
    text = files("penstock.workload").joinpath("profiles", f"{name}.json").read_bytes()
    file = msgspec.json.decode(text, type=_ProfileFile)
    if file.prompt_like is not None:
        prompts = length_profile(file.prompt_like)
        return ReasoningLengths(prompts, np.array(file.output_share), np.array(file.output_tokens))
    return TableLengths(np.array(file.prompt), np.array(file.output))


def _interpolate(table: F64, rank: F64, offset: I64 | int, points: int | None = None) -> I64:
    """Quantiles at ``rank``, of the ``points`` entries of ``table`` that start at ``offset``, as whole tokens."""
    last = (len(table) if points is None else points) - 1
    position = (1 - np.sqrt(1 - rank)) * last
    cell = np.minimum(position.astype(np.int64), last - 1)
    at = cell + offset
    low = table[at]
    value = low + (table[at + 1] - low) * (position - cell)
    whole: I64 = np.maximum(1, np.rint(value)).astype(np.int64)
    return whole
