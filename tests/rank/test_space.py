"""The arrangements of a budget, against counting by hand and by brute force."""

from __future__ import annotations

import itertools

import pytest

from penstock.core.errors import PenstockError
from penstock.experiment.build import build_cluster
from penstock.experiment.setup import ClusterSetup, Setup, WorkloadSetup
from penstock.rank.arrangement import setup_of, title, usd_per_hour
from penstock.rank.space import Space, arrangements, check_space, parse_gpus, whole_numbers


def test_eight_gpus_of_one_kind() -> None:
    found = list(arrangements(Space({"a100-80g": 8})))
    tps = (1, 2, 4, 8)
    splits = sum(
        1
        for p_tp, d_tp in itertools.product(tps, tps)
        for p, d in itertools.product(range(1, 9), range(1, 9))
        if p * p_tp + d * d_tp <= 8
    )
    mixed = (8 + 4 + 2 + 1) * 4  # whole prompts and three budgets of chunks
    assert len(found) == splits + mixed == 131
    assert len(set(found)) == len(found)
    assert len({title(a) for a in found}) == len(found)
    assert all(1 <= a.total_gpus() <= 8 for a in found)


def test_two_kinds_mix_by_role_and_keep_to_what_there_is() -> None:
    found = list(arrangements(Space({"a100-80g": 2, "h100": 1}, tps=(1,), chunks=())))
    names = {title(a, True) for a in found}
    assert names == {
        "1M(a100-80g) whole prompts",
        "2M(a100-80g) whole prompts",
        "1M(h100) whole prompts",
        "1P(a100-80g)+1D(a100-80g)",
        "1P(a100-80g)+1D(h100)",
        "2P(a100-80g)+1D(h100)",
        "1P(h100)+1D(a100-80g)",
        "1P(h100)+2D(a100-80g)",
    }
    two = next(a for a in found if title(a, True) == "2P(a100-80g)+1D(h100)")
    assert two.gpus() == {"a100-80g": 2, "h100": 1}
    assert usd_per_hour(two, {"a100-80g": 1.5, "h100": 3.0}) == 6.0
    assert usd_per_hour(two, {"a100-80g": 1.5}) is None


def test_number_types_multiply() -> None:
    one = list(arrangements(Space({"h100": 2})))
    four = list(arrangements(Space({"h100": 2}, weight_dtypes=(None, "fp8"), kv_dtypes=("bf16", "fp8"))))
    assert len(four) == 4 * len(one)
    assert sum("w-fp8" in title(a) for a in four) == 2 * len(one) == sum("kv-fp8" in title(a) for a in four)


def test_an_arrangement_is_what_the_simulator_gets() -> None:
    base = Setup(policy="ares", workload=WorkloadSetup(requests=10), options={"horizon": 512.0})
    space = Space({"a100-80g": 4, "h100": 1}, tps=(1, 2), weight_dtypes=("fp8",), kv_dtypes=("fp8",))
    a = next(a for a in arrangements(space) if a.prefill == 2 and a.prefill_tp == 2 and a.decode_hardware == "h100")
    setup = setup_of(base, a, 5000)
    assert setup.policy == "ares" and setup.options == {"horizon": 512.0}
    cluster = build_cluster(setup)
    assert len(cluster.instances) == 3
    plain = build_cluster(Setup(cluster=ClusterSetup(prefill=2, decode=1, prefill_tp=2)))
    assert cluster.kv_bytes_per_token == plain.kv_bytes_per_token / 2
    prefill, _, decode = cluster.instances
    # Half the bytes of KV, and half those of weights.
    assert prefill.capacity_blocks > 2 * plain.instances[0].capacity_blocks
    on_a100_in_bf16 = plain.instances[2].step_model.step_s(1, 500, [], [])
    assert decode.step_model.step_s(1, 500, [], []) < 0.45 * on_a100_in_bf16


def test_whole_prompts_get_a_budget_that_holds_the_longest() -> None:
    base = Setup(cluster=ClusterSetup(max_num_batched_tokens=2048))
    whole, chunked = (
        setup_of(base, next(a for a in arrangements(Space({"h100": 1}, (1,), (128,))) if a.step_tokens == n), 9000)
        for n in (None, 128)
    )
    assert whole.cluster.max_num_batched_tokens == 9216 and not whole.cluster.chunked_prefill
    assert chunked.cluster.max_num_batched_tokens == 128 == chunked.cluster.max_num_seqs
    assert whole.policy == chunked.policy == "mixed"
    assert not build_cluster(whole).instances[0].chunked_prefill


def test_budgets_read() -> None:
    assert parse_gpus("8", "A100") == {"a100-80g": 8}
    assert parse_gpus("a100=8, h100=4", "l40s") == {"a100-80g": 8, "h100": 4}
    assert whole_numbers("1, 2,2", "--tps") == (1, 2)


@pytest.mark.parametrize("text", ["0", "-1", "", "many", "h100=", "h1000=3", "h100=2.5"])
def test_budgets_refused(text: str) -> None:
    with pytest.raises(PenstockError):
        parse_gpus(text, "h100")


def test_spaces_refused() -> None:
    with pytest.raises(PenstockError, match="stored in fp8 already"):
        check_space(Space({"h200": 8}, weight_dtypes=("int4",)), "deepseek-v3", None)
    with pytest.raises(PenstockError, match="unknown number type"):
        check_space(Space({"h200": 8}, kv_dtypes=("fp9",)), "llama-3.1-8b", None)
    with pytest.raises(PenstockError, match="describes one kind"):
        check_space(Space({"rtx-4090": 8}), "llama-3.1-8b", "rtx-4090/llama-3.1-8b")
