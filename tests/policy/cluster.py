"""Small hand-made clusters for the policy tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.core.events import NO_PREDICTION, InstanceUp, Load
from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.parts import Beliefs, Running
from penstock.policy.view import ClusterView, RequestRecord

BELIEFS = Beliefs(
    step=LinearStepModel(0.010, per_decode_s=1e-5, per_context_s=2e-7, per_prefill_s=1e-4, per_pair_s=1e-9),
    kv_bytes_per_token=57_344.0,
    link_bytes_per_s=12.5e9,
    link_latency_s=0.001,
)
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
BLOCK = 16


def up(instance: int, role: Role, capacity_tokens: int = 100_000, max_running: int = 256) -> InstanceUp:
    """An instance that has just come up."""
    return InstanceUp(instance, role, capacity_tokens // BLOCK, BLOCK, max_running)


def load(tokens: int = 0, running: int = 0, step_s: float = 0.02, waiting: int = 0, free: int = 5000) -> Load:
    """What an engine says of itself."""
    return Load(running, waiting, tokens, free, step_s)


def cluster(
    roles: Sequence[Role],
    tokens: Sequence[int] | None = None,
    running: Sequence[int] | None = None,
    capacity_tokens: int = 100_000,
    step_s: float = float("inf"),
) -> ClusterView:
    """Instances 0.. with the given roles; tokens and running decodes each; nothing grows unless ``step_s`` is given."""
    view = ClusterView()
    for i, role in enumerate(roles):
        view.add(up(i, role, capacity_tokens), 0.0)
        held = tokens[i] if tokens else 0
        count = running[i] if running else int(held > 0)
        view.sync(i, load(held, count, step_s), 0.0)
    return view


def request(prompt: int = 100, number: int = 1, slo: Slo = SLO, predicted: float = NO_PREDICTION) -> RequestRecord:
    """A request that has just arrived, at time 0."""
    record = RequestRecord(number, prompt, slo, 0, (), 0.0)
    record.predicted_remaining = predicted
    return record


def running_of(rows: Sequence[tuple[int, int, int, int, float]]) -> Running:
    """Running decodes from rows of (request, instance, prompt, generated, predicted remaining)."""
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), (), ()]
    ids, where, prompt, generated, predicted = columns
    return Running(
        np.array(ids, np.int64),
        np.array(where, np.int64),
        np.array(prompt, np.int64),
        np.array(generated, np.int64),
        np.array(predicted, np.float64),
    )
