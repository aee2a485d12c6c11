"""Time one ARES decision at scale, against a plain Python loop over the same pairs in the same run.

Usage: python benchmarks/ares_tick.py [--instances 256] [--requests 100] [--repeat 9]

Requests have heavy-tailed lengths (log-normal, cut at 32K tokens), predictions are right. Prints medians:
``moves(...)`` alone, the whole ``controller.handle(Tick)`` that contains it, and the loop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from penstock.control.controller import Controller
from penstock.core.actions import Migrate
from penstock.core.events import DecodeStarted, InstanceUp, Load, MigrationFailed, PrefillDone, RequestArrived, Tick
from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.ares import AresRescheduler
from penstock.policy.parts import Beliefs, Running
from penstock.policy.registry import build_policy
from penstock.policy.view import ClusterView

BELIEFS = Beliefs(
    step=LinearStepModel(0.012, per_decode_s=2e-5, per_context_s=3e-8, per_prefill_s=6e-5, per_pair_s=2e-9),
    kv_bytes_per_token=57_344.0,
    link_bytes_per_s=12.5e9,
    link_latency_s=0.005,
)
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
CAPACITY_TOKENS = 2_000_000


def build(instances: int, requests: int, seed: int = 0) -> tuple[Controller, Tick]:
    """A controller whose instances decode ``requests`` requests each (one prefill instance besides), and a tick."""
    random = np.random.default_rng(seed)
    controller = Controller(build_policy("ares-oracle", BELIEFS, SLO, most_moves=16), BELIEFS)
    controller.handle(InstanceUp(instances, Role.PREFILL, CAPACITY_TOKENS // 16, 16, 1024), 0.0)
    for i in range(instances):
        controller.handle(InstanceUp(i, Role.DECODE, CAPACITY_TOKENS // 16, 16, 1024), 0.0)
    n = instances * requests
    length = np.minimum(random.lognormal(8.0, 1.4, n), 32_768).astype(int) + 1
    done = (length * random.random(n)).astype(int) + 1
    prompt = random.integers(50, 2000, n)
    empty = Load(0, 0, 0, CAPACITY_TOKENS // 16, 0.0)
    for r in range(n):
        controller.handle(RequestArrived(r, int(prompt[r]), SLO), 0.0)
        controller.handle(PrefillDone(r, instances, empty, float(length[r])), 0.0)
        controller.handle(DecodeStarted(r, r % instances, empty), 0.0)
    # The policy placed the requests but they are reported elsewhere, in turn, as round robin would have left them.
    controller.view.pending_tokens[:] = 0.0
    controller.view.pending_requests[:] = 0.0
    tokens = np.bincount(np.arange(n) % instances, weights=prompt + done)
    loads = tuple(Load(requests, 0, int(t), int(CAPACITY_TOKENS - t) // 16, 0.03) for t in tokens)
    rows = range(n)
    left = tuple(float(length[r] - done[r]) for r in rows)
    tick = Tick(tuple(range(instances)), loads, tuple(rows), tuple(int(x) for x in done), left)
    return controller, tick


def naive(part: AresRescheduler, running: Running, view: ClusterView) -> tuple[int, int, int]:
    """The best single move by a loop over (request, target) pairs; returns request, target and pairs looked at.

    Like the vectorised form it updates the variance incrementally: it is slow for being Python, not for being foolish.
    """
    points, weight = part.horizon.points.tolist(), part.horizon.weight.tolist()
    pool = [int(i) for i in view.decodes]
    load = {i: [float(view.pending_tokens[i])] * len(points) for i in pool}
    rows: list[tuple[int, int, float, list[float]]] = []
    columns = (running.requests, running.instances, running.prompt + running.generated, running.predicted)
    for r, i, context, left in zip(*(c.tolist() for c in columns), strict=True):
        tokens = [context + t if t < max(left, 1.0) else 0.0 for t in points]
        rows.append((r, i, left, tokens))
        load[i] = [a + b for a, b in zip(load[i], tokens, strict=True)]
    overall = {i: sum(w * x for w, x in zip(weight, load[i], strict=True)) for i in pool}
    mean = sum(overall.values()) / len(pool)
    under = [i for i in pool if overall[i] < (1.0 - part.margin) * mean]
    best, pairs = (0.0, -1, -1), 0
    for r, source, left, tokens in rows:
        if overall[source] <= (1.0 + part.margin) * mean:
            continue
        mine = load[source]
        cost_s = part.amortise * BELIEFS.transfer_s(int(tokens[0]))
        for target in under:
            pairs += 1
            there = load[target]
            if left * part.step.seconds(there[0] + tokens[0]) <= cost_s:
                continue
            limit = float(view.capacity_tokens[target]) * (1.0 - part.reserve)
            gain = 0.0
            for p in range(len(points)):
                t = tokens[p]
                if there[p] + t > limit:
                    break
                gain += weight[p] * t * (mine[p] - there[p] - t)
            else:
                if gain > best[0]:
                    best = (gain, r, target)
    return best[1], best[2], pairs


def median_ms(run: Callable[[], object], repeat: int) -> float:
    """Median milliseconds of ``repeat`` runs."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def main() -> None:
    """Build, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=256)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    controller, tick = build(arguments.instances, arguments.requests)
    part = controller.policy.rescheduler
    assert isinstance(part, AresRescheduler)
    running, view = placed(tick, controller, arguments.instances), controller.view

    moves = part.moves(running, view, 1.0)
    alone = median_ms(lambda: part.moves(running, view, 1.0), arguments.repeat)
    start = time.perf_counter()
    request, target, pairs = naive(part, running, view)
    loop = (time.perf_counter() - start) * 1e3
    assert not moves or (moves[0].request, moves[0].target) == (request, target), "the two disagree"

    whole = []
    for turn in range(arguments.repeat):
        start = time.perf_counter()
        actions = controller.handle(tick, 1.0 + turn)
        whole.append((time.perf_counter() - start) * 1e3)
        for action in actions:  # every move fails, so that each turn finds the same cluster
            assert isinstance(action, Migrate)
            controller.handle(MigrationFailed(action.request, action.source, action.target, "benchmark"), 1.0 + turn)
        assert len(actions) == len(moves)

    print(f"{arguments.instances} decode instances x {arguments.requests} requests, {len(moves)} moves")
    print(f"moves(...)                {alone:9.2f} ms")
    print(f"controller.handle(Tick)   {median(whole):9.2f} ms")
    print(f"Python loop, {pairs:>8} pairs {loop:9.0f} ms  ({loop / alone:.0f} times moves, for one move)")


def placed(tick: Tick, controller: Controller, instances: int) -> Running:
    """The tick's rows as the columns that the controller hands to a rescheduler."""
    ids = np.array(tick.requests, np.int64)
    prompt = np.array([controller.requests[r].prompt_tokens for r in tick.requests], np.int64)
    generated = np.array(tick.generated, np.int64)
    for i, load in zip(tick.instances, tick.loads, strict=True):
        controller.view.sync(i, load, 1.0)
    return Running(ids, ids % instances, prompt, generated, np.array(tick.predicted_remaining))


if __name__ == "__main__":
    main()
