"""Kill, hang, slow, errors, clients that leave: and nothing stays behind."""

from __future__ import annotations

import asyncio

from .support import bench, expected, run, spec


def test_a_client_that_leaves_frees_its_blocks_at_the_next_step() -> None:
    async def main() -> None:
        async with bench() as b:
            streams = [b.stream(0, f"prompt {i}", 5000) for i in range(10)]
            for s in streams:
                await s.reached(20)
            for s in streams[1:]:
                s.call.abort()
            while len(b[0].driver.choices) > 1:
                await asyncio.sleep(0)
            await streams[0].reached(len(streams[0].ids) + 2)
            assert len(b[0].driver.engine.seqs) == 1
            streams[0].call.abort()

    run(main())


def test_whole_answers_are_aborted_too() -> None:
    async def main() -> None:
        async with bench() as b:
            s = b.stream(0, "x", 5000, stream=False)
            while not b[0].driver.running:
                await asyncio.sleep(0)
            s.call.abort()
            await b.fleet.idle()
            assert b'finished_reason="abort"} 1.0' in await b.get(0, "/metrics")

    run(main())


def test_kill_breaks_streams_and_closes_the_port_and_revive_starts_empty() -> None:
    async def main() -> None:
        async with bench(2) as b:
            doomed = [b.stream(0, f"doomed {i}", 5000) for i in range(5)]
            other = b.stream(1, "other", 200)
            for s in doomed:
                await s.reached(5)
            await b[0].kill()
            for s in doomed:
                await s.over()
                assert s.fault is not None
                assert not s.ended
                assert s.ids == expected(f"doomed {doomed.index(s)}", len(s.ids))
            refused = await b.stream(0, "x", 5).over()
            assert refused.status == 0
            assert refused.fault is not None
            assert b[0].integrity() == []
            old = b[0].transfers.engine_id
            await b[0].revive()
            await b[0].revive()
            assert b[0].transfers.engine_id != old
            assert await b.ids(0, "x", 5) == expected("x", 5)
            assert await b.metric(0, "vllm:generation_tokens_total") == 5
            assert (await other.over()).ids == expected("other", 200)

    run(main())


def test_an_instance_that_hangs_sends_nothing_and_goes_on_where_it_was() -> None:
    async def main() -> None:
        async with bench(2) as b:
            s = b.stream(0, "hangs", 300)
            gone = b.stream(0, "gone", 5000)
            await s.reached(10)
            await gone.reached(10)
            b[0].hang()
            b[0].hang()
            step = b[0].driver.engine.step
            late = b.stream(0, "late", 20)
            gone.call.abort()
            # Another instance works for a while: time passes, and the first one does not notice.
            assert await b.ids(1, "x", 100) == expected("x", 100)
            assert (late.status, late.ids, b[0].driver.engine.step) == (0, [], step)
            assert len(b[0].driver.choices) == 2
            b[0].resume()
            assert (await late.over()).ids == expected("late", 20)
            assert (await s.over()).ids == expected("hangs", 300)

    run(main())


def test_an_instance_that_is_killed_while_it_hangs() -> None:
    async def main() -> None:
        async with bench() as b:
            b[0].hang()
            late = b.stream(0, "late", 20)
            while not b[0]._asleep:
                await asyncio.sleep(0)
            await b[0].kill()
            assert (await late.over()).fault is not None
            b[0].resume()
            await b[0].revive()
            assert await b.ids(0, "late", 20) == expected("late", 20)

    run(main())


def test_slow_steps_take_longer() -> None:
    async def main() -> None:
        async with bench() as b:
            s = b.stream(0, "slow", 3000)
            await s.reached(3)
            before = b[0].driver.engine.last_step_s
            b[0].slow(5.0)
            await s.reached(len(s.ids) + 3)
            after = b[0].driver.engine.last_step_s
            assert 4.9 < after / before < 5.1
            s.call.abort()

    run(main())


def test_errors_on_request() -> None:
    async def main() -> None:
        async with bench() as b:
            b[0].fail_next(2)
            for _ in range(2):
                status, found = await b.post(0, "/v1/completions", prompt="x")
                assert status == found["error"]["code"] == 500
            assert (await b.post(0, "/v1/completions", prompt="x"))[0] == 200

            stream = b.stream(0, "stream", 5000)
            whole = b.stream(0, "whole", 5000, stream=False)
            await stream.reached(5)
            while len(b[0].driver.running) < 2:
                await asyncio.sleep(0)
            b[0].fail_running("out of luck")
            assert (await stream.over()).chunks[-1]["error"]["message"] == "out of luck"
            assert (await whole.over()).status == 500

    run(main())


def test_more_than_fits_waits_is_preempted_and_comes_out_right() -> None:
    async def main() -> None:
        async with bench(instance=spec(30, 4, max_num_seqs=8), max_model_len=100) as b:
            streams = [b.stream(0, f"a prompt, number {i}", 60) for i in range(12)]
            for i, s in enumerate(streams):
                assert (await s.over()).ids == expected(f"a prompt, number {i}", 60)
            assert await b.metric(0, "vllm:num_preemptions_total") > 0

    run(main())
