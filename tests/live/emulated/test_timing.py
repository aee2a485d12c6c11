"""Engine time is the simulator's: the same trace, one request after the other to the microsecond."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Any, cast

import numpy as np
import pytest

from penstock.core.types import Role, Slo
from penstock.live.emulated.answer import Answer
from penstock.live.emulated.choice import Choice
from penstock.live.emulated.clock import Clock
from penstock.live.emulated.driver import Driver
from penstock.live.emulated.metrics import Counters
from penstock.live.emulated.requests import CompletionBody, TransferParams, options_of
from penstock.live.emulated.settings import EmulatedSettings, plan
from penstock.live.emulated.shapes import CompletionShape
from penstock.live.emulated.vocabulary import Prompt
from penstock.live.http.server import Reply
from penstock.perf.step import LinearStepModel
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.run import simulate
from penstock.workload.trace import Trace

from .support import bench, run


class ManualClock(Clock):
    """Time that the test moves."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.time_s = 0.0
        self.due: list[tuple[float, int, asyncio.Handle, Callable[[], None]]] = []
        self.calls = 0
        self.loop = asyncio.new_event_loop()

    def now(self) -> float:
        return self.time_s

    def call_at(self, when_s: float, what: Callable[[], None]) -> asyncio.Handle:
        handle = asyncio.Handle(what, [], self.loop)
        self.calls += 1
        heappush(self.due, (when_s, self.calls, handle, what))
        return handle

    def move(self, until_s: float) -> None:
        """Do what is due before a time, and set the clock to it."""
        while self.due and self.due[0][0] < until_s:
            when_s, _, handle, what = heappop(self.due)
            if not handle.cancelled():
                self.time_s = when_s
                what()
        self.time_s = max(self.time_s, until_s) if until_s < inf else self.time_s


class Watched:
    """Stands in for a reply; notes when chunks come."""

    closed = False
    started = False

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.times: list[float] = []

    def start(self) -> None:
        self.started = True

    def write(self, data: bytes) -> None:
        if b'"choices"' in data:
            self.times.append(self.clock.now())

    def end(self) -> None:
        self.closed = True


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("blocks", [60, 1000])
def test_tokens_come_when_the_simulator_says(overlapped: bool, blocks: int) -> None:
    rnd = np.random.default_rng(7)
    n = 60
    arrival = np.cumsum(rnd.exponential(0.02, n))
    prompt, output = rnd.integers(1, 200, n), rnd.integers(1, 60, n)
    model = LinearStepModel(0.004, 1e-4, 1e-6, 5e-5, 1e-7)
    instance = InstanceSpec(Role.MIXED, model, blocks, 8, 16, 256, async_scheduling=overlapped, prefix_caching=False)
    trace = Trace(arrival, prompt.astype(np.int64), output.astype(np.int64), np.zeros(n, np.int16))
    beliefs = Beliefs(model, 1.0, 1e9)
    result = simulate(trace, ClusterSpec((instance,), 1.0), build_policy("mixed", beliefs, Slo()), beliefs, Slo())

    found = _driven(instance, arrival, prompt, output, pin=False)
    assert [len(w.times) for w in found] == output.tolist()
    first = np.array([w.times[0] for w in found])
    last = np.array([w.times[-1] for w in found])
    np.testing.assert_allclose(first, result.requests.first_token_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(last, result.requests.finish_s, rtol=0, atol=1e-9)
    if blocks == 60:
        assert result.requests.preemptions.sum() > 0


class Forgetful:
    """Stands in for the connector: frees pinned KV after a while."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.pinned: list[Choice] = []

    def arrive(self, choice: Choice) -> None:
        raise AssertionError

    pull = give_up = arrive

    def pin(self, choice: Choice) -> None:
        self.pinned.append(choice)
        clock = self.driver.clock
        clock.call_at(clock.now() + 0.05, lambda: self.driver.release(choice.request))
        choice.answer.ended(choice, None)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_who_is_to_be_pinned_is_pinned_once_however_often_it_was_preempted(overlapped: bool, seed: int) -> None:
    rnd = np.random.default_rng(seed)
    n = 80
    arrival = np.cumsum(rnd.exponential(0.005, n))
    prompt, output = rnd.integers(1, 40, n), rnd.integers(1, 30, n)
    model = LinearStepModel(0.004, 1e-4, 1e-6, 5e-5, 1e-7)
    instance = InstanceSpec(Role.MIXED, model, 40, 2, 16, 256, async_scheduling=overlapped)
    found = _driven(instance, arrival, prompt, output, pin=True)
    assert [len(w.times) for w in found] == output.tolist()


def _driven(instance: InstanceSpec, arrival: Any, prompt: Any, output: Any, pin: bool) -> list[Watched]:
    """Put a trace through a driver; the times of each request's chunks."""
    clock = ManualClock()
    the_plan = plan(EmulatedSettings(instance=instance))
    driver = Driver(0, the_plan, clock, Counters())
    forgetful = Forgetful(driver)
    driver.transfers = forgetful
    replies = []
    for i in range(len(arrival)):
        clock.move(float(arrival[i]))
        ids = np.random.default_rng(i).integers(0, 256, int(prompt[i])).astype(np.uint16)
        body = CompletionBody(stream=True, kv_transfer_params=TransferParams(do_remote_decode=pin))
        reply = Watched(clock)
        replies.append(reply)
        shape = CompletionShape(str(i), 0, the_plan.model)
        options = options_of(body, the_plan, None)
        one = Prompt(ids, instance.block_size)
        answer = Answer(cast(Reply, reply), shape, False, options, [one], instance.block_size)
        answer.choices.append(Choice(answer, 0, one, int(output[i]), options, i + 1))
        driver.submit(answer.choices[0])
    clock.move(inf)
    assert all(r.closed for r in replies)
    assert driver.engine.free == instance.capacity_blocks
    assert not driver.choices
    assert len(forgetful.pinned) == len(replies) * pin
    if pin:
        assert driver.engine.preemptions > 10
    clock.loop.close()
    return replies


def test_nothing_comes_before_its_time() -> None:
    async def main() -> None:
        model = LinearStepModel(0.02, 0.0, 0.0, 1e-3)
        async with bench(instance=InstanceSpec(Role.MIXED, model, 400)) as b:
            loop = asyncio.get_running_loop()
            began = loop.time()
            s = b.stream(0, "x" * 100, 5)
            await s.reached(1)
            assert loop.time() - began >= 0.115  # 20 ms and 100 tokens of 1 ms, less the timers' rounding
            await s.over()
            assert loop.time() - began >= 0.195

    run(main())


def test_speed_is_a_factor_of_time() -> None:
    async def main() -> None:
        model = LinearStepModel(10.0)
        async with bench(instance=InstanceSpec(Role.MIXED, model, 400), speed=10_000.0) as b:
            s = await b.stream(0, "x", 20).over()  # 200 s of engine time
            assert len(s.ids) == 20

    run(main())
