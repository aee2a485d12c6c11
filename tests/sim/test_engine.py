"""What the engine promises, one behaviour a test. Numbers are small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.core.types import MigrationLevel, Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.parts import Beliefs, Policy
from penstock.sim.cluster import ClusterSpec, Fault, FaultKind, ForcedMove, InstanceSpec, Scenario
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.trace import PrefixHashes, Trace
from tests.sim.support import Turns, trace_of

STEP = LinearStepModel(0.01, per_prefill_s=0.001)
"""10 ms a step, and 1 ms for each prompt token."""


def run(
    trace: Trace,
    prefill: int = 1,
    decode: int = 1,
    mixed: int = 0,
    blocks: int = 1000,
    block_size: int = 4,
    seqs: int = 16,
    budget: int = 64,
    link: float = 1e9,
    level: MigrationLevel = MigrationLevel.PRECOPY,
    scenario: Scenario | None = None,
    latency_s: float = 0.0,
    step: LinearStepModel = STEP,
) -> SimResult:
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode if not mixed else [Role.MIXED] * mixed
    specs = tuple(InstanceSpec(r, step, blocks, block_size, min(seqs, budget), budget, link) for r in roles)
    cluster = ClusterSpec(specs, kv_bytes_per_token=1000.0, link_latency_s=latency_s, migration_level=level)
    policy = Policy("test", Turns(Role.MIXED if mixed else Role.PREFILL), None if mixed else Turns(Role.DECODE))
    return simulate(trace, cluster, policy, Beliefs(step, 1000.0, link), Slo(), scenario)


def test_one_request_by_hand() -> None:
    """Prefill 10 + 20 ms; 20 kB over 1 MB/s take 20 ms; then three decode steps of 10 ms."""
    result = run(trace_of([0.0], [20], [4]), link=1e6)
    r = result.requests
    assert r.first_token_s[0] == pytest.approx(0.030)
    assert r.decode_start_s[0] == pytest.approx(0.050)
    assert r.finish_s[0] == pytest.approx(0.080)
    gaps = np.repeat(result.gaps.first_s, result.gaps.count)
    np.testing.assert_allclose(sorted(gaps), [0.010, 0.010, 0.030])  # the first gap spans the transfer


def test_long_prompt_is_computed_in_chunks() -> None:
    """100 tokens in chunks of 64 and 36: two steps, 10 ms each, beside 100 ms of prompt."""
    assert run(trace_of([0.0], [100], [1]), budget=64).requests.first_token_s[0] == pytest.approx(0.120)


def test_mixed_batch_decodes_while_it_prefills() -> None:
    """A running decode gets a token in every step, also in those that carry someone else's prompt."""
    result = run(trace_of([0.0, 0.015], [4, 30], [6, 2]), mixed=1)
    r = result.requests
    # Steps end at 14 ms (first prompt), 24 (decode), then 24 + 10 + 30 = 64 (decode and the whole second prompt).
    assert r.first_token_s[1] == pytest.approx(0.064)
    assert r.finish_s[0] == pytest.approx(0.064 + 3 * 0.010)


def test_prompt_waits_until_all_of_it_fits() -> None:
    """Eleven blocks of 4; the first request holds 5 and grows. A prompt of 7 blocks must wait for its end."""
    result = run(trace_of([0.0, 0.001], [20, 28], [3, 1]), mixed=1, blocks=11)
    r = result.requests
    assert r.prefill_start_s[1] == pytest.approx(r.finish_s[0])
    assert result.instances.preemptions[0] == 0


def test_preemption_takes_the_last_and_recomputes_it() -> None:
    """Two decodes outgrow the cache: the later one loses its KV and still ends with all its tokens."""
    result = run(trace_of([0.0, 0.0], [8, 8], [20, 20]), mixed=1, blocks=8)
    r = result.requests
    assert r.preemptions.tolist() == [0, 1]
    assert r.finish_s[0] < r.finish_s[1]
    assert r.emitted.tolist() == [20, 20]


def test_source_keeps_its_blocks_until_the_pull_ends() -> None:
    """The prefill instance has room for one prompt: the second starts when the first has been pulled."""
    result = run(trace_of([0.0, 0.0], [16, 16], [2, 2]), blocks=5, link=1e5)
    r = result.requests
    pulled = r.first_token_s[0] + 16 * 1000 / 1e5
    assert r.prefill_start_s[1] == pytest.approx(pulled)


def test_decode_admits_only_when_the_whole_transfer_fits() -> None:
    """The decode instance holds one request: the second pull starts only after the first has ended."""
    result = run(trace_of([0.0, 0.0], [16, 16], [4, 4]), blocks=6, seqs=2, link=1e5, prefill=2)
    r = result.requests
    first, second = np.argsort(r.finish_s)
    assert r.decode_start_s[second] == pytest.approx(r.finish_s[first] + 16 * 1000 / 1e5)


def test_links_are_shared_fairly() -> None:
    """Two pulls into one instance at the same time take twice as long as one."""
    alone = run(trace_of([0.0], [20], [2]), link=1e5)
    both = run(trace_of([0.0, 0.0], [20, 20], [2, 2]), prefill=2, link=1e5)
    one = alone.requests.decode_start_s[0] - alone.requests.first_token_s[0]
    two = both.requests.decode_start_s - both.requests.first_token_s
    np.testing.assert_allclose(two, 2 * one)


def test_prefix_hits_are_not_computed_again() -> None:
    """Two prompts share two hash blocks of 8; the second computes only its tail, and at least its last token."""
    hashes = PrefixHashes(np.array([1, 2, 1, 2]), np.array([0, 2, 4]), 8)
    result = run(trace_of([0.0, 1.0], [20, 16], [1, 1], hashes))
    ttft = result.requests.first_token_s - np.array([0.0, 1.0])
    assert ttft[0] == pytest.approx(0.030)
    assert ttft[1] == pytest.approx(0.010 + 0.008)  # one block hit, one computed: a hit never covers the last token
    assert result.instances.prefill_tokens[0] == 28


LONG = trace_of([0.0], [40], [400])
MOVE = Scenario(forced_moves=[ForcedMove(1.0, 0, 1)])  # with two decode instances it starts on 2


@pytest.mark.parametrize("level", list(MigrationLevel))
def test_migration_by_level(level: MigrationLevel) -> None:
    """A forced move arrives, loses no token, and its pause is that of its level."""
    result = run(LONG, decode=2, level=level, scenario=MOVE, link=1e6)
    assert result.migrations.target.tolist() == [1]
    assert result.requests.emitted[0] == 400
    tokens = int(result.migrations.tokens[0])
    whole_copy_s = tokens * 1000 / 1e6
    pause = float(result.migrations.pause_s[0])
    if level is MigrationLevel.HANDOFF:
        assert pause == pytest.approx(0.010 + whole_copy_s, abs=0.003)
    elif level is MigrationLevel.PRECOPY:
        # Only what was decoded during the first copy (and a partial block) is copied while the client waits.
        assert pause < 0.5 * whole_copy_s
    elif level is MigrationLevel.REPLAY:
        assert pause == pytest.approx(0.001 * tokens + 0.010 * -(-tokens // 64), abs=0.012)
    else:
        assert pause <= 0.030  # make before break: the source goes on


def test_a_dead_target_leaves_the_request_where_it_was() -> None:
    """The target dies during the copy: the source takes the request back."""
    scenario = Scenario(forced_moves=MOVE.forced_moves, faults=[Fault(1.05, 1, FaultKind.DOWN)])
    result = run(LONG, decode=2, scenario=scenario, link=1e6)
    assert result.failed_migrations == {"target went down": 1}
    assert result.requests.emitted[0] == 400
    assert result.requests.decode_instance[0] == 2


def test_a_dead_decode_instance_loses_no_token() -> None:
    """Its requests are computed again elsewhere, from the prompt and what the client has."""
    result = run(LONG, decode=2, scenario=Scenario(faults=[Fault(1.0, 2, FaultKind.DOWN)]))
    assert result.requests.outcome.tolist() == [1]
    assert result.requests.emitted.tolist() == [400]
    assert result.requests.decode_instance[0] == 1


def test_a_slow_instance_is_slower_from_its_next_step() -> None:
    fast = run(LONG)
    slow = run(LONG, scenario=Scenario(faults=[Fault(1.0, 1, FaultKind.SLOW, 2.0)]))
    remaining = fast.requests.finish_s[0] - 1.0
    assert slow.requests.finish_s[0] == pytest.approx(1.0 + 2 * remaining, abs=0.011)


def test_nothing_is_lost_when_all_instances_of_a_phase_die() -> None:
    """Requests that find no decode instance are refused with a reason, not forgotten."""
    faults = [Fault(0.001, i, FaultKind.DOWN) for i in range(2)]
    result = run(trace_of([0.0, 0.5], [4, 4], [3, 3]), scenario=Scenario(faults=faults))
    assert result.requests.outcome.tolist() == [2, 2]
    assert result.reject_reasons == {"no instance with a fitting role is up": 2}


def test_a_request_longer_than_the_cache_is_refused() -> None:
    result = run(trace_of([0.0, 0.0], [30, 4], [20, 2]), blocks=12)
    assert result.requests.outcome.tolist() == [2, 1]


def test_bad_instance_is_refused() -> None:
    with pytest.raises(PenstockError, match="max_num_seqs"):
        InstanceSpec(Role.MIXED, STEP, 10, max_num_seqs=100, max_num_batched_tokens=10)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_prefill_is_first_come_first_served(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 40
    trace = trace_of(np.cumsum(rng.exponential(0.02, n)).tolist(), rng.integers(1, 90, n).tolist(), [2] * n)
    start = run(trace, budget=int(rng.integers(16, 100)), seqs=int(rng.integers(1, 16))).requests.prefill_start_s
    assert (np.diff(start) >= 0).all()


def test_lengths_do_not_cost_events() -> None:
    """Ten times the output, the same number of changes: the same number of events."""
    short = run(trace_of([0.0, 1.0, 2.0], [20] * 3, [100] * 3))
    long = run(trace_of([0.0, 10.0, 20.0], [20] * 3, [1000] * 3))
    assert long.events == short.events


def test_the_same_seed_gives_the_same_run() -> None:
    trace = trace_of(np.linspace(0, 3, 50).tolist(), [30] * 50, [60] * 50)
    runs = [run(trace, decode=2, scenario=Scenario(seed=s, noise=0.2)).requests.finish_s for s in (1, 1, 2)]
    assert (runs[0] == runs[1]).all()
    assert (runs[0] != runs[2]).any()
