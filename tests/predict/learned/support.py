"""Samples made up for tests, and running code where torch is."""

from __future__ import annotations

import json
import subprocess
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.predict.learned.mlp import Mlp
from penstock.predict.learned.run import torch_python
from penstock.predict.learned.samples import About, Part, Samples, positions

ROOT = Path(__file__).resolve().parents[3]
WIDTH = 4


def about(**changed: Any) -> About:
    values: dict[str, Any] = {"model": "abcd", "name": "toy", "every": 20, "seed": 0, "temperature": 0.0}
    return About(**(values | {"longest": 4096, "requests": 0, "verified": 0, "cut": 0} | changed))


def toy(lengths: list[int], part: Part = Part.TEST, every: int = 20) -> Samples:
    """Requests of these output lengths. The first number of a hidden state is log1p of what remains."""
    generated = [positions(length, every) for length in lengths]
    request = np.repeat(np.arange(len(lengths), dtype=np.int32), [len(g) for g in generated])
    flat = np.array([g for row in generated for g in row], np.int32)
    totals = np.array(lengths, np.int32)
    hidden = np.zeros((len(flat), WIDTH), np.float16)
    hidden[:, 0] = np.log1p(totals[request] - flat)
    pooled = np.zeros((len(lengths), WIDTH), np.float16)
    pooled[:, 0] = totals
    n = len(lengths)
    return Samples(
        about=about(every=every, requests=n),
        families=("even", "odd"),
        prompt_tokens=np.full(n, 3, np.int32),
        output_tokens=totals,
        part=np.full(n, part, np.int32),
        family=(totals % 2).astype(np.int32),
        pooled=pooled,
        texts=tuple(f"q{i}".encode() for i in range(n)),
        request=request,
        generated=flat,
        entropy=np.zeros(len(flat), np.float32),
        hidden=hidden,
    )


def linear(rows: list[list[float]], bias: list[float]) -> Mlp:
    """A network of one layer, on inputs as they are."""
    w = np.array(rows, np.float32)
    into = w.shape[1]
    return Mlp(np.zeros(into, np.float32), np.ones(into, np.float32), (w,), (np.array(bias, np.float32),))


def random_mlp(sizes: tuple[int, ...], seed: int = 0) -> Mlp:
    source = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return source.normal(size=shape).astype(np.float32)

    pairs = list(pairwise(sizes))
    return Mlp(
        draw(sizes[0]),
        np.abs(draw(sizes[0])) + np.float32(0.1),
        tuple(draw(after, before) / np.float32(before**0.5) for before, after in pairs),
        tuple(draw(after) for _, after in pairs),
    )


@lru_cache
def _python() -> str | None:
    try:
        python = torch_python()
    except PenstockError:
        return None
    probe = "import torch, transformers"
    return python if subprocess.run([python, "-c", probe], capture_output=True).returncode == 0 else None


def python_with_torch() -> str:
    """Its path; skips the test where there is none."""
    python = _python()
    if python is None:
        pytest.skip("no Python with torch and transformers on this machine (`make engine-cpu` brings one)")
    return python


def in_torch(function: str, *arguments: Any) -> Any:
    """What a function of ``torch_side.py`` returns, called in a Python that has torch."""
    start = "import sys; sys.path += sys.argv[1:3]; import torch_side; torch_side.main()"
    paths = [str(ROOT / "src"), str(Path(__file__).parent)]
    done = subprocess.run(
        [python_with_torch(), "-c", start, *paths, function, json.dumps(arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
