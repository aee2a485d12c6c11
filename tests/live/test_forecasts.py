"""Predictions from engines: how they reach the policy, what it makes of them, and what the metrics say afterwards."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.core.events import NO_PREDICTION, Event, InstanceHeld, Load, PrefillDone, Tick
from penstock.core.types import MigrationLevel, Role
from penstock.live.benefit import Benefit
from penstock.live.emulated.foresight import LEVELS
from penstock.live.forecast import KEPT, Forecast, Forecasts
from penstock.live.instance import Abilities, Instance
from penstock.live.moves import handoff
from penstock.live.world import LiveWorld
from tests.live.answers import more, order, quick, until
from tests.live.support import PDD, Bench, Stream, bench, ids, run


def body_of(prompt: list[int], count: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}


def heard(b: Bench, kind: type[Event]) -> list[Any]:
    """The events of a kind that the controller will be told from now on."""
    found: list[Any] = []
    tell = b.world.tell

    def telling(event: Event) -> None:
        if isinstance(event, kind):
            found.append(event)
        tell(event)

    b.world.tell = telling  # type: ignore[method-assign]
    return found


# -- from the stream to the policy ------------------------------------------------------------------------------------


def test_ticks_carry_what_engines_predict() -> None:
    """Exact predictions: what a tick says is the truth of that moment, on all engines and after a move."""

    async def work() -> None:
        engine = quick(0.004, sigma_first=0.0, stream_s=0.01)
        async with bench(engine=engine, roles=PDD) as b:
            b.world.controller.migration_level = MigrationLevel.HANDOFF
            streams = {300 + i: b.stream(body_of(ids(40 + i, i), 300 + i)) for i in range(4)}
            for stream in streams.values():
                await stream.tokens(30)
            assert await order(b, streams[300])
            await more(streams[300], 10)
            tick = b.world.tick()
            lengths = {b.session(s).request: n for n, s in streams.items()}
            assert len(tick.requests) == 4
            for request, generated, left in zip(tick.requests, tick.generated, tick.predicted_remaining, strict=True):
                assert left == lengths[request] - generated
            await asyncio.gather(*(s.over.wait() for s in streams.values()))
            await b.settled()
            assert b.world.metrics.forecasts.received > 0

    run(work)


@pytest.mark.parametrize("predict", [True, False])
def test_a_prefill_engine_predicts_before_the_decode_is_placed(predict: bool) -> None:
    """Its first token comes with a prediction as soon as the stream is quicker than the answer; else the next best."""

    async def work() -> None:
        engine = quick(0.004, sigma_first=0.0, stream_s=0.001, mean_output=100, predict=predict)
        async with bench(engine=engine, roles=(Role.MIXED,) * 2, policy="mixed") as b:
            ticks: list[float] = []
            done = heard(b, PrefillDone)
            stream = b.stream(body_of(ids(30), 300))
            while not stream.over.is_set():
                await more(stream)
                ticks += b.world.tick().predicted_remaining
            assert len(done) == 1
            if predict:
                assert ticks and ticks[-1] >= 1.0 and ticks[len(ticks) // 2] > 0.0
            else:
                assert set(ticks) == {NO_PREDICTION}
                assert done[0].predicted_remaining == NO_PREDICTION

    run(work)


async def on(b: Bench, instance: int, count: int, tokens: int) -> list[Stream]:
    """As many streams of that length, all on one decode instance."""
    for other in (1, 2):
        b.world.tell(InstanceHeld(other, other != instance))
    streams = [b.stream(body_of(ids(100, 7 * instance + i), tokens)) for i in range(count)]
    for stream in streams:
        await stream.tokens(2)
    return streams


@pytest.mark.parametrize("predict", [True, False])
def test_ares_moves_what_only_a_prediction_tells_to_be_long(predict: bool) -> None:
    """Two instances with as many requests of one size; those of one will run long. ARES moves one of these, long before
    the short ones have ended; without predictions there is nothing to be seen.
    """

    async def work() -> None:
        options: dict[str, Any] = {"interval": 0.05, "margin": 0.25, "amortise": 0.0, "least_gain": 0.0, "decay": 1.0}
        options |= {"horizon": 1000, "points": 8}
        engine = quick(0.01, predict=predict, sigma_first=0.0, stream_s=0.02)
        async with bench(engine=engine, roles=PDD, policy="ares", **options) as b:
            long = await on(b, 1, 4, 1200)
            short = await on(b, 2, 4, 200)
            b.world.tell(InstanceHeld(1, False))
            await asyncio.gather(*(s.tokens(130) for s in short))
            moved = [b.session(s).moves for s in long]
            assert all(b.session(s).moves == 0 for s in short)
            assert (sum(moved) > 0) == predict, b.world.metrics.migrations
            for stream in long + short:
                assert stream.call is not None
                stream.call.abort()
            await b.settled()

    run(work)


# -- loads ------------------------------------------------------------------------------------------------------------


def test_loads_are_the_engines_own_while_they_are_fresh() -> None:
    async def work() -> None:
        engine = quick(0.004, blocks=300, stream_s=0.01)
        async with bench(engine=engine, roles=PDD) as b:
            stream = b.stream(body_of(ids(160), 300))
            await stream.tokens(20)
            where = b.session(stream).where
            instance, driver = b.world.instances[where], b.fleet.engines[where].driver
            link = instance.link
            assert link is not None
            # Something that the gateway did not put there.
            address = b.fleet.engines[where].url
            foreign = b.client.fetch(
                address, "POST", "/v1/completions", b'{"prompt": [1, 2, 3], "max_tokens": 600}', {}, 60
            )
            alien = asyncio.create_task(foreign)
            await until(lambda: link.step is not None and len(link.step.running) == 2)
            load = instance.load()
            assert load.running == 1 and load.decode_tokens == instance.tokens
            assert abs(load.free_blocks - driver.engine.load(driver.clock.now()).free_blocks) <= 2
            assert load.free_blocks < 300 - instance.tokens // 16
            assert load.step_s == link.step_s and 0.003 < load.step_s < 0.02
            link.heard_s -= 10.0
            assert instance.load().free_blocks == 300 - instance.tokens // 16 - 1
            await stream.over.wait()
            await alien
            await b.settled()

    run(work)


def test_preempted_streams_do_not_count_as_running() -> None:
    async def work() -> None:
        engine = quick(0.003, blocks=30, stream_s=0.005)
        async with bench(engine=engine, roles=(Role.PREFILL, Role.DECODE)) as b:
            streams = [b.stream(body_of(ids(40, i), 200)) for i in range(4)]
            least: list[Load] = []
            instance = b.world.instances[1]
            while not all(s.over.is_set() for s in streams):
                await asyncio.sleep(0.005)
                least.append(instance.load())
            link = instance.link
            assert link is not None and link.step is not None and link.step.preemptions > 0
            assert any(0 < load.running < 4 and load.waiting > 0 for load in least)
            text = b.world.metrics.text(b.world, "m").decode()
            lines = [line for line in text.splitlines() if line.startswith("penstock:engine_preemptions_total")]
            assert len(lines) == 2 and float(lines[1].split()[-1]) == link.step.preemptions
            for stream, i in zip(streams, range(4), strict=True):
                assert len(stream.ids) == 200, i
            await b.settled()

    run(work)


# -- one request's forecast -------------------------------------------------------------------------------------------


def test_a_forecast_grows_shorter_with_every_token_and_never_empty() -> None:
    forecast = Forecast()
    assert forecast.remaining(5, 100) == NO_PREDICTION
    forecast.take(20, (10.0, 30.0, 90.0), 1, (0.1, 0.5, 0.9))
    assert [forecast.remaining(n, 1000) for n in (20, 21, 49, 50, 70)] == [30.0, 29.0, 1.0, 1.0, 1.0]
    assert forecast.remaining(20, 25) == 5.0  # what the client allows
    assert forecast.remaining(25, 25) == 1.0
    forecast.take(10, (1.0, 1.0, 1.0), 1, (0.1, 0.5, 0.9))  # overtaken on its way
    assert forecast.remaining(20, 1000) == 30.0
    forecast.take(40, (1.0, 7.0), 1, (0.1, 0.5))  # another predictor: what the first one said is not judged with it
    assert forecast.remaining(40, 1000) == 7.0 and forecast.rows == [(40, (1.0, 7.0))]
    forecast.take(50, (1.0,), -1, ())
    assert forecast.rows == [(40, (1.0, 7.0))]
    for at in range(60, 60 + 2 * KEPT):
        forecast.take(at, (1.0, 5.0), 1, (0.1, 0.5))
    assert len(forecast.rows) == KEPT and forecast.remaining(59 + 2 * KEPT, 10**6) == 5.0


def test_errors_and_coverage_are_counted_when_the_truth_is_known() -> None:
    forecasts, forecast = Forecasts(), Forecast()
    levels = (0.25, 0.5, 0.75)
    forecast.take(10, (50.0, 100.0, 150.0), 1, levels)  # 90 remain
    forecast.take(40, (20.0, 50.0, 59.0), 1, levels)  # 60 remain
    forecasts.finished(forecast, 100, "stop")
    assert forecasts.coverage("stop") == {0.25: 0.0, 0.5: 0.5, 0.75: 0.5}
    assert forecasts.coverage("length") == {}
    assert {k: h.total for k, h in forecasts.errors.items()} == {("stop", 0): 10.0, ("stop", 32): 10.0}
    names = {metric.name for metric in forecasts.collect()}
    assert names == {
        "penstock:predictions",
        "penstock:prediction_error_tokens",
        "penstock:predictions_judged",
        "penstock:predictions_covered",
    }


def test_quantiles_of_emulated_engines_cover_as_they_say() -> None:
    """Over a few hundred requests, with as much error as the paper's predictor has at the first token."""

    async def work() -> None:
        engine = quick(0.002, stream_s=0.004, mean_output=30)
        async with bench(engine=engine, roles=(Role.MIXED,) * 2, policy="mixed") as b:
            for turn in range(6):
                bodies = [body_of(ids(20 + i, 50 * turn + i), 400) for i in range(50)]
                await asyncio.gather(*(b.whole(body) for body in bodies))
            found = b.world.metrics.forecasts.coverage("stop")
            assert set(found) == set(LEVELS)
            for level, share in found.items():
                assert abs(share - level) < 0.12, found
            text = b.world.metrics.text(b.world, "m").decode()
            assert 'penstock:predictions_covered_total{finish="stop",quantile="0.5"}' in text
            assert 'penstock:prediction_error_tokens_bucket{finish="stop",generated_from="0",le="+Inf"}' in text

    run(work)


# -- what a move was good for -----------------------------------------------------------------------------------------


def test_the_benefit_is_the_difference_in_pace_less_the_pause() -> None:
    able = Abilities("m", 100, 16, 10, True, True)
    source, target = (Instance(i, f"http://x{i}", Role.DECODE, able) for i in range(2))
    source.heard(100, 5.0, 1.0)  # before the move: not counted
    benefit = Benefit(source, target, MigrationLevel.HANDOFF, "balance", 40)
    benefit.pause_s = 0.25
    assert benefit.realised_s(140) == -0.25  # nobody has decoded since: nothing can be said
    target.heard(100, 2.0, 2.0)
    assert benefit.realised_s(140) == -0.25
    source.heard(10, 0.5, 2.0)
    assert benefit.realised_s(140) == pytest.approx((0.05 - 0.02) * 100 - 0.25)
    source.heard(10, 0.1, 2.0)
    assert benefit.realised_s(140) == pytest.approx((0.03 - 0.02) * 100 - 0.25)


def test_a_move_away_from_a_slow_engine_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff.Handoff, "_gather", lambda self: None)

    async def work() -> None:
        async with bench(engine=quick(0.002), roles=PDD) as b:
            first = await on(b, 1, 2, 600)
            b.fleet.engines[1].slow(5.0)
            b.world.tell(InstanceHeld(2, False))
            assert await order(b, first[0], 2, MigrationLevel.HANDOFF)
            await first[0].over.wait()
            (histogram,) = b.world.metrics.benefits.seconds.values()
            assert sum(histogram.counts) == 1 and 1.0 < histogram.total < 10.0
            assert b.world.metrics.benefits.better == {("handoff", "ordered"): 1}
            text = b.world.metrics.text(b.world, "m").decode()
            assert 'penstock:migration_benefit_net_seconds{level="handoff",reason="ordered"}' in text
            assert first[1].call is not None
            first[1].call.abort()
            await b.settled()

    run(work)


def test_worlds_without_links_have_no_predictions() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.003, plugin=False), roles=PDD) as b:
            done = heard(b, PrefillDone)
            stream = b.stream(body_of(ids(20), 60))
            await stream.tokens(20)
            tick = b.world.tick()
            assert isinstance(tick, Tick) and tick.predicted_remaining == (NO_PREDICTION,)
            assert done[0].predicted_remaining == NO_PREDICTION
            await stream.over.wait()
            assert isinstance(b.world, LiveWorld) and b.world.metrics.forecasts.received == 0
            await b.settled()

    run(work)
