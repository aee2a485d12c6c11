"""Prefill here, decode there: token identity, leases, and every trap of stock vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.core.custody import SAFE_SHARE_OF_LEASE

from .support import PD, Bench, bench, expected, run, settings, spec

PROMPT = "a prompt that is a little longer than two of the blocks"


def test_the_answer_says_how_to_pull() -> None:
    async def main() -> None:
        async with bench(2) as b:
            params = await b.prefill(0, "p" * 300)
            assert {k: params[k] for k in ("do_remote_prefill", "do_remote_decode", "remote_num_tokens")} == {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_num_tokens": 300,
            }
            assert [len(g) for g in params["remote_block_ids"]] == [19]
            assert await b.metric(0, "vllm:kv_cache_usage_perc") == 19 / 400
            assert b.fleet.integrity() == [
                "instance 0: 1 requests pinned",
                "instance 0: 19 blocks in use",
                "instance 0: 18 cached blocks still referenced",
            ]
            assert await b.ids(1, "p" * 300, 20, kv_transfer_params=params) == expected("p" * 300, 20)

    run(main())


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 160])
@pytest.mark.parametrize("caching", [True, False])
def test_prefill_and_decode_on_two_instances_give_the_same_tokens(length: int, caching: bool) -> None:
    async def main() -> None:
        async with bench(2, instance=spec(prefix_caching=caching)) as b:
            prompt = [i * 7 % 251 for i in range(length)]
            for source, target in ((0, 1), (1, 0), (0, 0)):
                params = await b.prefill(source, prompt)
                s = await b.stream(target, prompt, 40, kv_transfer_params=params).over()
                assert s.ids == expected(prompt, 40)
            assert b.fleet.poisoned == 0
            assert await b.metric(1, "vllm:nixl_num_notifications_after_expiry_total") == 0

    run(main())


def test_a_claim_used_twice_gives_wrong_text_and_poisons_the_cache_until_it_is_reset() -> None:
    async def main() -> None:
        async with bench(3) as b:
            params = await b.prefill(0, PROMPT)
            right = expected(PROMPT, 20)
            assert await b.ids(1, PROMPT, 20, kv_transfer_params=params) == right
            assert await b.ids(2, PROMPT, 20, kv_transfer_params=params) != right
            assert b.fleet.poisoned == 1
            assert await b.metric(0, "vllm:nixl_num_notifications_after_expiry_total") == 1
            assert await b.ids(2, PROMPT, 20) != right  # a plain request finds the wrong blocks
            assert await b.ids(1, PROMPT, 20) == right
            await b.post(2, "/reset_prefix_cache")
            assert await b.ids(2, PROMPT, 20) == right

    run(main())


def test_a_lease_that_runs_out_frees_the_blocks_and_makes_the_claim_wrong() -> None:
    async def main() -> None:
        async with bench(2, lease_s=0.05) as b:
            params = await b.prefill(0, PROMPT)
            await b.fleet.idle()  # the lease is all that can end it
            assert await b.metric(0, "vllm:nixl_num_kv_expired_reqs_total") == 1
            assert await b.metric(0, "vllm:kv_cache_usage_perc") == 0
            assert await b.ids(1, PROMPT, 20, kv_transfer_params=params) != expected(PROMPT, 20)
            assert await b.metric(0, "vllm:nixl_num_notifications_after_expiry_total") == 1

    run(main())


def test_heartbeats_of_a_waiting_puller_keep_the_lease() -> None:
    async def main() -> None:
        # The target runs one request at a time, and is busy for thrice the lease.
        async with bench(2, instance=spec(max_num_seqs=1), lease_s=0.5) as b:
            b[1].slow(5.0)
            busy = b.stream(1, "x" * 300, 300)
            await busy.reached(1)
            params = await b.prefill(0, PROMPT * 4)
            found = await b.ids(1, PROMPT * 4, 20, kv_transfer_params=params)
            assert found == expected(PROMPT * 4, 20)
            assert await b.metric(0, "vllm:nixl_num_kv_expired_reqs_total") == 0
            assert busy.ended

    run(main())


def test_a_list_that_is_one_block_short_kills_the_target() -> None:
    async def main() -> None:
        async with bench(2, lease_s=1.0) as b:  # the source is never told
            other = b.stream(1, "other", 5000)
            await other.reached(3)
            params = await b.prefill(0, "p" * 32)
            params["remote_block_ids"][0].pop()
            assert await _fault(b, params, "p" * 32)
            assert (await other.over()).fault is not None
            assert not other.ended
            assert b[1].down_reason
            assert await _fault(b, None, "x")  # the port is closed
            await b[1].revive()
            assert await b.ids(1, "x", 5) == expected("x", 5)

    run(main())


async def _fault(b: Bench, params: Any, prompt: str) -> str:
    s = await b.stream(1, prompt, 5, kv_transfer_params=params).over()
    assert s.fault is not None
    assert not s.ended
    return s.fault.reason


def test_at_a_block_boundary_a_padded_list_is_right_and_a_longer_one_is_wrong() -> None:
    async def main() -> None:
        async with bench(2) as b:
            # 32 tokens and one generated: 33 need three blocks, but KV exists for two.
            prompt = "p" * 31
            found = await b.complete(0, prompt, 2, kv_transfer_params=PD)
            params = found["kv_transfer_params"]
            assert (params["remote_num_tokens"], len(params["remote_block_ids"][0])) == (32, 2)
            longer = [*prompt.encode(), *found["choices"][0]["token_ids"]]
            params["remote_block_ids"][0] *= 2
            params["remote_block_ids"][0] = params["remote_block_ids"][0][:2] + params["remote_block_ids"][0][1:2]
            assert await b.ids(1, longer, 20, kv_transfer_params=params) == expected(longer, 20)

            params = await b.prefill(0, "q" * 40)
            params["remote_block_ids"][0].append(params["remote_block_ids"][0][-1])
            assert await b.ids(1, "q" * 40, 20, kv_transfer_params=params) != expected("q" * 40, 20)
            assert b.fleet.poisoned == 1

    run(main())


def test_kv_of_another_prompt_is_wrong() -> None:
    async def main() -> None:
        async with bench(2) as b:
            params = await b.prefill(0, PROMPT)
            other = "A" + PROMPT[1:]
            assert await b.ids(1, other, 20, kv_transfer_params=params) != expected(other, 20)

    run(main())


def test_segments_continue_on_another_instance() -> None:
    async def main() -> None:
        async with bench(2) as b:
            tokens = list(b"segments")
            for i in range(6):
                quantum = 7 + 3 * i
                found = await b.complete(i % 2, tokens, quantum, kv_transfer_params=PD)
                tokens += found["choices"][0]["token_ids"]
                params = found["kv_transfer_params"]
                assert params["remote_num_tokens"] == len(tokens) - 1
                wanted = -(-len(tokens) // 16)
                blocks = params["remote_block_ids"][0]
                params["remote_block_ids"] = [(blocks + blocks[-1:])[:wanted]]
                more = await b.complete((i + 1) % 2, tokens, 5, kv_transfer_params=params)
                tokens += more["choices"][0]["token_ids"]
            assert tokens[8:] == expected("segments", len(tokens) - 8)
            assert b.fleet.poisoned == 0

    run(main())


def test_a_request_that_stops_by_itself_is_pinned_too() -> None:
    async def main() -> None:
        async with bench(2, mean_output=10) as b:
            found = await b.complete(0, PROMPT, 300, kv_transfer_params=PD)
            assert found["choices"][0]["finish_reason"] == "stop"
            assert found["kv_transfer_params"]["do_remote_prefill"]
            s = b.stream(0, PROMPT, 300, kv_transfer_params=PD)
            last = (await s.over()).chunks[-1]
            assert last["choices"][0]["finish_reason"] == "stop"
            for params in (found["kv_transfer_params"], last["kv_transfer_params"]):
                await b.complete(1, PROMPT, 1, kv_transfer_params=params)  # any pull spends it

    run(main())


def test_an_abort_pins_nothing() -> None:
    async def main() -> None:
        async with bench(1) as b:
            s = b.stream(0, PROMPT, 3000, kv_transfer_params=PD)
            await s.reached(10)
            s.call.abort()
            await b.fleet.idle()
            assert not b[0].transfers.pins

    run(main())


def test_parameters_forwarded_with_do_remote_decode_hang_and_leak() -> None:
    async def main() -> None:
        async with bench(2, clean=False) as b:
            params = await b.prefill(0, PROMPT)
            params |= {"do_remote_decode": True, "do_remote_prefill": False}
            s = b.stream(1, PROMPT, 20, kv_transfer_params=params)
            assert await b.ids(1, "others are served", 30) == expected("others are served", 30)
            assert await b.metric(1, "vllm:num_requests_waiting") == 1
            s.call.abort()
            assert await b.ids(1, "others are served", 30) == expected("others are served", 30)
            assert b[1].integrity() == ["instance 1: 4 blocks in use"]
            await b[1].kill()
            await b[1].revive()
            assert b[1].integrity() == []

    run(main())


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_source_that_is_dead(policy: str) -> None:
    async def main() -> None:
        async with bench(2, kv_load_failure_policy=policy) as b:
            params = await b.prefill(0, PROMPT)
            await b[0].kill()
            status, found = await b.post(
                1, "/v1/completions", prompt=PROMPT, max_tokens=20, return_token_ids=True, kv_transfer_params=params
            )
            if policy == "fail":
                assert status == 500
                s = await b.stream(1, PROMPT, 20, kv_transfer_params=params).over()
                assert s.chunks[0]["error"]["code"] == 500
            else:
                assert status == 200
                assert found["choices"][0]["token_ids"] == expected(PROMPT, 20)
            assert await b.metric(1, "vllm:nixl_num_failed_transfers_total") == (2 if policy == "fail" else 1)
            assert await b.ids(1, PROMPT, 20) == expected(PROMPT, 20)

    run(main())


def test_a_source_that_dies_during_the_transfer() -> None:
    async def main() -> None:
        async with bench(2, handshake_s=1000.0) as b:
            params = await b.prefill(0, PROMPT)
            s = b.stream(1, PROMPT, 20, kv_transfer_params=params)
            while not any(p.flow for p in b[1].transfers.pulls.values()):
                await asyncio.sleep(0)
            await b[0].kill()
            assert (await s.over()).ids == expected(PROMPT, 20)

    run(main())


def test_a_source_that_hangs_before_the_first_handshake_is_given_up() -> None:
    async def main() -> None:
        async with bench(2, handshake_timeout_s=0.01, lease_s=0.5) as b:
            params = await b.prefill(0, PROMPT)
            b[0].hang()
            assert await b.ids(1, PROMPT, 20, kv_transfer_params=params) == expected(PROMPT, 20)
            b[0].resume()
            await b.fleet.idle()
            assert await b.metric(0, "vllm:nixl_num_kv_expired_reqs_total") == 1

    run(main())


def test_a_client_that_leaves_before_its_pull_frees_both_sides() -> None:
    async def main() -> None:
        async with bench(2, handshake_s=1000.0) as b:
            params = await b.prefill(0, PROMPT)
            s = b.stream(1, PROMPT, 20, kv_transfer_params=params)
            while not b[1].transfers.pulls:
                await asyncio.sleep(0)
            s.call.abort()
            await b.fleet.idle()
            assert await b.metric(0, "vllm:nixl_num_kv_expired_reqs_total") == 0

    run(main())


def test_invalid_parameters_are_computed_here() -> None:
    async def main() -> None:
        async with bench(1) as b:
            found = await b.ids(0, PROMPT, 9, kv_transfer_params={"do_remote_prefill": True})
            assert found == expected(PROMPT, 9)

    run(main())


@pytest.mark.parametrize("cut", range(16))
def test_re_prompt_migration_at_every_offset_of_a_block(cut: int) -> None:
    """Make before break: A goes on while B pulls a re-sent prompt; B's tokens are what A's would have been."""

    async def main() -> None:
        async with bench(2) as b:
            right = expected(PROMPT, 200)
            old = b.stream(0, PROMPT, 200)
            k = 32 + cut
            await old.reached(k)
            tokens = [*PROMPT.encode(), *right[:k]]
            handover = await b.complete(0, tokens, 1, kv_transfer_params=PD)
            assert handover["choices"][0]["token_ids"] == right[k : k + 1]
            params = handover["kv_transfer_params"]
            assert params["remote_num_tokens"] == len(tokens)
            # All full blocks were found: prompt and output, of a request that still runs.
            assert params["remote_prefill_cached_tokens"] == (len(tokens) - 1) // 16 * 16
            new = b.stream(1, tokens, 200 - k, kv_transfer_params=params)
            await new.reached(1)
            old.call.abort()
            await new.over()
            assert new.ids == right[k:]
            assert old.ids == right[: len(old.ids)]
            back = await b.complete(1, [*tokens, *new.ids[:10]], 1, kv_transfer_params=PD)
            assert back["kv_transfer_params"]["remote_prefill_cached_tokens"] == (len(tokens) + 9) // 16 * 16
            await b.complete(0, [*tokens, *new.ids[:10]], 1, kv_transfer_params=back["kv_transfer_params"])
            assert b.fleet.poisoned == 0

    run(main())


def test_custody_and_leases_speak_of_the_same_seconds() -> None:
    assert settings().lease_s * SAFE_SHARE_OF_LEASE == 18.0
