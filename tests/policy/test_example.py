"""The example of docs/policies.md runs, in a simulation, by one file and one registration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.experiment.build import run
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup
from penstock.policy.registry import PRESETS, register

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


def example() -> tuple[str, dict[str, Any]]:
    """The source of the page's first block, and what it defines."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(compile(found[1], str(PAGE), "exec"), names)
    return found[1], names


@pytest.fixture
def lanes() -> Iterator[str]:
    _, names = example()
    register("lanes", names["PRESET"])
    yield "lanes"
    del PRESETS["lanes"]


def test_it_is_about_thirty_lines() -> None:
    source, _ = example()
    code = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith(('"""', "#"))]
    assert len(code) <= 30


def test_it_serves_a_workload_and_keeps_its_lanes(lanes: str) -> None:
    workload = WorkloadSetup(synthetic="200-400/5-20", requests=200, rate_rps=30, classes={"chat": 0.7, "batch": 0.3})
    cluster = ClusterSetup(prefill=0, decode=0, mixed=3)
    targets = {"chat": Target(1.0, 0.1), "batch": Target(30.0, None)}
    result = run(Setup(policy=lanes, workload=workload, cluster=cluster, slo_classes=targets))
    assert (result.requests.outcome == 1).all()
    where, batch = result.requests.prefill_instance, result.trace.slo_class == 1
    assert set(where[batch].tolist()) == {2}
    assert set(where[~batch].tolist()) == {0, 1}
    options = Setup(policy=lanes, options={"patience": 60.0}, workload=workload, cluster=cluster, slo_classes=targets)
    assert not np.isin(run(options).requests.prefill_instance, [2]).any()


def test_a_name_is_given_once(lanes: str) -> None:
    with pytest.raises(PenstockError, match="there is a policy 'lanes' already"):
        register("lanes", PRESETS["mixed"])
