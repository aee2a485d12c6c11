"""PolyServe: its tests one by one, the future of a server, the ladder, chunks, and a simulated cluster under it."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.core.events import Finished, RequestArrived
from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.chunking import Credit, TierKit
from penstock.policy.engine import Job, Situation
from penstock.policy.feasible import Admissibility, AverageLength, Prospect, Residents, due_s
from penstock.policy.latency import PrefillFit
from penstock.policy.lmetric import PackedReplica
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.polyserve import PolyServeDecode, PolyServeMixed, Router
from penstock.policy.profile_table import ProfileTable
from penstock.policy.registry import build_policy
from penstock.policy.tiers import POOL, Demand, Tiers
from penstock.policy.view import ClusterView, RequestRecord
from penstock.report.metrics import Verdicts
from penstock.sim.cluster import ClusterSpec, InstanceSpec, Scenario
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.synthetic import synthesize
from tests.policy.cluster import BELIEFS, SLO, cluster, load, request
from tests.policy.world import World

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
TABLE = ProfileTable(BELIEFS)
CLASSES = (Slo(1.0, 0.02), Slo(1.0, 0.03), Slo(1.0, 0.1))


def decode_part(policy: Policy) -> PolyServeDecode:
    """The router of a ``polyserve``."""
    assert isinstance(policy.decode, PolyServeDecode)
    return policy.decode


def prefilled(number: int, prompt: int, slo: Slo, first_token_s: float = 0.1) -> RequestRecord:
    """A request with its first token."""
    record = request(prompt, number, slo)
    record.generated, record.first_token_s = 1, first_token_s
    return record


# -- the tests --------------------------------------------------------------------------------------------------------

DUE, BUDGET, CAPACITY = (1.0, 1.03), 0.03, 1000.0
GOOD = Prospect(1.0, 1.03, 0.03, 1000.0)


@pytest.mark.parametrize(
    ("prospect", "cause"),
    [
        (GOOD, None),
        (Prospect(1.001, 1.03, 0.03, 1000.0), "ttft"),
        (Prospect(1.0, 1.031, 0.03, 1000.0), "second"),
        (Prospect(1.0, 1.03, 0.031, 1000.0), "steady"),
        (Prospect(1.0, 1.03, 0.03, 1001.0), "kv"),
    ],
)
def test_each_admission_test_alone(prospect: Prospect, cause: str | None) -> None:
    assert Admissibility().admit(prospect, DUE, BUDGET, CAPACITY) == (cause is None)
    for off in ("ttft", "second", "steady"):
        tests = Admissibility(**{off: False})
        assert tests.admit(prospect, DUE, BUDGET, CAPACITY) == (cause is None or cause == off)
        counted = {} if cause in (None, off) else {cause: 1}
        assert {name: n for name, n in tests.refusals.items() if n} == counted


def test_a_lost_request_still_meets_what_protects_others() -> None:
    tests = Admissibility()
    assert tests.admit(Prospect(9.0, 9.1, 0.03, 1000.0), DUE, BUDGET, CAPACITY, lost=True)
    assert not tests.admit(Prospect(9.0, 9.1, 0.04, 1000.0), DUE, BUDGET, CAPACITY, lost=True)
    assert not tests.admit(Prospect(9.0, 9.1, 0.03, 1001.0), DUE, BUDGET, CAPACITY, lost=True)


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "index", "due"),
    [(1.0, 0.1, 0, (1.0, 1.1)), (1.0, 0.1, 5, (1.5, 1.6)), (1.0, inf, 0, (1.0, inf)), (inf, 0.1, 3, (inf, inf))],
)
def test_when_tokens_are_due(ttft_s: float, tpot_s: float, index: int, due: tuple[float, float]) -> None:
    assert due_s(ttft_s, tpot_s, index) == pytest.approx(due)


@pytest.mark.parametrize(
    ("option", "where"), [("ttft-test", "first"), ("second-test", "second"), ("steady-test", "steady")]
)
def test_the_options_switch_the_tests(option: str, where: str) -> None:
    tests = decode_part(build_policy("polyserve", BELIEFS, SLO, **{option: "off"})).tests
    on = {"first": tests.ttft, "second": tests.second, "steady": tests.steady}
    assert not on.pop(where) and all(on.values())


# -- the future of a server -------------------------------------------------------------------------------------------

COMERS = st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 300)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(COMERS, st.tuples(st.integers(1, 4000), st.integers(0, 50)), st.integers(20, 200))
def test_the_future_is_that_of_stepping_through_it(
    there: list[tuple[int, int]], new: tuple[int, int], mean: int
) -> None:
    residents = Residents()
    for number, (prompt, generated) in enumerate(there):
        residents.put(number, prompt, generated, 0.0)
    steady_s, peak = residents.future(TABLE, mean, 0.0, new)
    alive = [(prompt + generated, mean - generated) for prompt, generated in [*there, new]]
    seconds, kv = [], []
    for step in range(mean + 1):
        batch = [context + step for context, left in alive if max(left, 0) >= step]
        if batch:
            seconds.append(float(TABLE.iteration_s(len(batch), sum(batch))))
            kv.append(sum(batch))
    assert steady_s == pytest.approx(max(seconds))
    assert peak == pytest.approx(max(kv))


def test_progress_is_counted_in_iterations() -> None:
    residents = Residents()
    residents.carry(0.0, 0.01)
    residents.put(7, 100, 1, 0.0)
    assert residents.future(TABLE, 50.0, 1.0)[1] == pytest.approx(100 + 101), "beyond the average: it ends at once"
    residents.carry(1.0, inf)  # 100 iterations later the server stalls
    assert residents.now(9.0) == pytest.approx(100.0)
    other = Residents()
    residents.hand_over(7, other, 9.0)
    assert 7 not in residents and len(other) == 1
    assert other.future(TABLE, 150.0, 9.0)[1] == pytest.approx(100 + 150)


def test_the_average_length_counts_what_still_runs() -> None:
    average = AverageLength(prior=100.0, weight=10.0)
    assert average.tokens() == 100.0
    average.finished(10, running_tokens=2000.0)  # the first to end are short
    assert average.tokens() == pytest.approx((1000 + 10 + 2000) / 11)
    for _ in range(5000):
        average.finished(500, running_tokens=2000.0)
    assert average.tokens() == pytest.approx(500, rel=0.01)


# -- tiers and the ladder ---------------------------------------------------------------------------------------------


def test_a_tier_for_each_tpot_or_for_several() -> None:
    tiers = Tiers()
    assert [tiers.tier_of(t) for t in (0.1, 0.02, 0.05, 0.02)] == [0.1, 0.02, 0.05, 0.02]
    assert tiers.known == [0.02, 0.05, 0.1]
    assert tiers.tighter(0.1) == [0.05, 0.02]
    merged = Tiers(merge=2.5)
    assert [merged.tier_of(t) for t in (0.02, 0.05, 0.1, 0.051)] == [0.02, 0.02, 0.1, 0.051]
    assert Tiers().tier_of(inf) == inf


def ladder() -> tuple[PolyServeDecode, ClusterView]:
    """Four decode servers, all in the pool."""
    return decode_part(build_policy("polyserve", BELIEFS, SLO)), cluster([D, D, D, D], [0] * 4, [0] * 4)


def fill(router: PolyServeDecode, view: ClusterView, i: int, tier: float, tokens: int, running: int) -> None:
    """Give server ``i`` to a tier, with requests on it."""
    router._cover(view)
    router.tiers.tier_of(tier)
    if router.tiers.budget_s[i] == POOL:
        router.tiers.take(i, tier)
    for k in range(running):
        router.residents[i].put(1000 * (i + 1) + k, tokens // running, 1, 0.0, tier)
    view.sync(i, load(tokens, running, 0.02), 0.0)


def test_up_the_ladder() -> None:
    router, view = ladder()
    fill(router, view, 1, 0.03, 10_000, 10)
    fill(router, view, 2, 0.03, 30_000, 30)
    fill(router, view, 0, 0.02, 5_000, 5)
    loose, tight = CLASSES[1], CLASSES[0]
    assert router.place(prefilled(1, 500, loose), view, 0.1).instance == 2, "the highest load that is feasible"
    fill(router, view, 2, 0.03, 96_000, 40)
    assert router.place(prefilled(2, 500, loose), view, 0.1).instance == 1, "the next one, if that one refuses"
    fill(router, view, 1, 0.03, 96_500, 40)
    assert router.guests == 0
    assert router.place(prefilled(3, 500, loose), view, 0.1).instance == 0, "only then a tighter tier's"
    assert router.guests == 1
    fill(router, view, 0, 0.02, 48_000, 40)
    assert router.place(prefilled(4, 500, loose), view, 0.1).instance == 3, "then one more from the pool"
    assert router.tiers.budget_s[3] == loose.tpot_s
    fill(router, view, 3, 0.03, 96_000, 40)
    assert router.place(prefilled(5, 500, loose), view, 0.1).waits, "or it waits"
    assert router.place(prefilled(6, 500, tight), view, 0.1).waits, "a tight one is no guest of a looser tier"


def test_an_idle_server_refuses_nobody_and_goes_back_when_empty() -> None:
    router, view = ladder()
    hopeless = Slo(0.001, 0.001)
    assert router.place(prefilled(1, 500, hopeless), view, 5.0).instance == 0
    assert router.tiers.budget_s[0] == 0.001
    view.sync(0, load(0, 0), 6.0)
    router.observe(Finished(1, 0, 77, load()), view, 6.0)
    assert router.tiers.budget_s[0] == POOL
    assert router.tiers.given == router.tiers.taken == 1


def test_a_tier_without_a_server_takes_over_one_that_meets_its_budget() -> None:
    router, view = ladder()
    for i in range(4):
        fill(router, view, i, 0.1, 20_000 + 1000 * i, 20)
    choice = router.place(prefilled(1, 500, CLASSES[0]), view, 0.1)
    assert choice.instance == 0, "the least loaded"
    assert router.tiers.budget_s[0] == CLASSES[0].tpot_s
    router.reclaim = False
    router.tiers.give_back(0)
    router.tiers.take(0, 0.1)
    assert router.place(prefilled(2, 500, CLASSES[0]), view, 0.1).waits


def test_guests_get_only_what_their_hosts_do_not_need() -> None:
    router, view = ladder()
    tight, loose = CLASSES[0], CLASSES[1]
    fill(router, view, 0, tight.tpot_s, 5_000, 5)
    fill(router, view, 1, loose.tpot_s, 96_000, 40)
    for number in range(100):  # that many need a tight server, wherever they are
        router.observe(RequestArrived(number, 100, tight), view, 0.0)
        router.demand.begin(number)
    assert router.place(prefilled(500, 500, loose), view, 0.1).instance == 2, "from the pool"
    for number in range(100):
        router.demand.end(number)
    fill(router, view, 2, loose.tpot_s, 96_000, 40)
    assert router.place(prefilled(501, 500, loose), view, 0.1).instance == 0, "a guest"
    assert router.guests == 1


def test_a_server_with_only_guests_left_is_theirs() -> None:
    router, view = ladder()
    fill(router, view, 0, 0.02, 5_000, 5)
    for number, slo in ((7, CLASSES[1]), (8, CLASSES[2])):
        router.tiers.tier_of(slo.tpot_s)
        router.residents[0].put(number, 500, 1, 0.0, slo.tpot_s)
        router._where[number] = (0, 0.0)
    for k in range(5):
        assert router.tiers.budget_s[0] == 0.02
        router._where[1000 + k] = (0, 0.0)
        router.observe(Finished(1000 + k, 0, 9, load(4_000, 5)), view, 1.0)
    assert router.tiers.budget_s[0] == CLASSES[1].tpot_s, "that of the tightest guest"


def test_a_tier_in_need_gets_a_server_drained() -> None:
    router, view = ladder()
    tight, loose = CLASSES[0], CLASSES[1]
    for i in range(4):
        fill(router, view, i, loose.tpot_s, 60_000 + 1000 * i, 30)
    for number in range(100):
        router.observe(RequestArrived(number, 100, tight), view, 0.0)
        router.demand.begin(number)
    assert router.place(prefilled(500, 500, tight), view, 0.1).waits
    assert router.promised_to(tight.tpot_s, view.decodes) == [0], "the least loaded"
    assert router.place(prefilled(501, 500, loose), view, 0.1).instance == 3
    for i in (1, 2, 3):
        view.sync(i, load(96_000, 40, 0.02), 0.1)
        for k in range(30, 70):
            router.residents[i].put(1000 * (i + 1) + k, 2_000, 1, 0.1, loose.tpot_s)
    assert router.place(prefilled(502, 500, loose), view, 1.0).waits, (
        "none of its own, though the promised one has room"
    )
    for k in range(29):
        router._where[1000 + k] = (0, 0.0)
        router.observe(Finished(1000 + k, 0, 9, load(2_000, 1)), view, 1.0)
    view.sync(0, load(2_000, 1, 0.02), 1.0)
    assert router.place(prefilled(503, 500, tight), view, 1.1).instance == 0
    assert router.tiers.budget_s[0] == tight.tpot_s and not router.promises


def test_demand_counts_from_the_beginning_of_a_need_to_the_end() -> None:
    demand = Demand()
    demand.begin(1)
    assert demand.of(0.02) == 0, "of unknown tier"
    demand.expect(2, 0.02)
    assert demand.of(0.02) == 0
    demand.begin(2)
    demand.begin(2)
    assert demand.of(0.02) == 1
    demand.end(2)
    demand.end(2)
    assert demand.of(0.02) == 0


class Classy(World):
    """A random world with several SLO classes, which looks at the router after each event."""

    def __init__(self, policy: Policy, roles: list[Role], seed: int) -> None:
        self.router = policy.decode if isinstance(policy.decode, Router) else policy.prefill
        assert isinstance(self.router, Router)
        super().__init__(policy, roles, seed)

    def arrive(self, prompt: int | None = None) -> None:
        """A new request of a random class."""
        self.prompt[self.next] = self.random.choice([50, 400, 3000])
        number, self.next = self.next, self.next + 1
        self.generated[number] = 0
        self.tell(RequestArrived(number, self.prompt[number], self.random.choice(CLASSES)))
        self.check()

    def check(self) -> None:
        """What must hold at any time."""
        router, view = self.router, self.controller.view
        assert isinstance(router, Router)
        rows = view.decodes if self.disaggregated else view.mixed
        for i in rows.tolist():
            tier, there = router.tiers.budget_s[i], router.residents[i]
            assert (tier == POOL) == (len(there) == 0), "a server has a tier as long as it has requests"
            for number in there.requests():
                assert self.controller.requests[number].slo.tpot_s >= tier, "nobody sits in a looser tier than its own"
        if self.controller.pending() and not self.orders:
            assert len(router.tiers.pool(rows)) == 0, "nobody waits while a server idles"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.booleans(), st.booleans(), st.sampled_from(["on", "off"]))
def test_the_ladder_keeps_its_books(seed: int, mixed: bool, failures: bool, reclaim: str) -> None:
    name, roles = ("polyserve-mixed", [M] * 4) if mixed else ("polyserve", [P, P, D, D, D])
    there = Classy(build_policy(name, BELIEFS, SLO, reclaim=reclaim), roles, seed)
    for _ in range(120):
        there.step(failures)
        there.check()
    there.drain()
    there.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(50, 6000), st.sampled_from(CLASSES)), min_size=5, max_size=60))
def test_whoever_joins_leaves_every_server_within_its_budget(comers: list[tuple[int, Slo]]) -> None:
    """A guest included: by what is believed, it never makes a request of the host tier late."""
    router, view = ladder()
    for number, (prompt, slo) in enumerate(comers):
        choice = router.place(prefilled(number, prompt, slo), view, 0.1)
        if choice.waits:
            continue
        i = choice.instance
        view.sync(i, load(int(view.running_tokens[i]) + prompt + 1, int(view.running[i]) + 1, 0.02), 0.1)
        if view.running[i] > 1:
            steady_s, _ = router.residents[i].future(TABLE, router.average.tokens(), 0.1)
            assert steady_s <= router.tiers.budget_s[i]


# -- mixed mode -------------------------------------------------------------------------------------------------------


def job(prompt: int, left: int) -> Job:
    """A prompt in progress."""
    found = Job(1, prompt, SLO, 0, 0.0)
    found.left = left
    return found


def situation(decodes: int, context: int, last_step_s: float = 0.0, waiting: int = 1) -> Situation:
    """An engine with decodes and a prompt that waits."""
    found = Situation(0, M, 16, 10_000)
    found.max_batched_tokens = 8192
    found.decodes, found.context, found.last_step_s, found.waiting = decodes, context, last_step_s, waiting
    return found


def kit(tier: float, stretch: float = 2.0) -> TierKit:
    """One server, of a tier."""
    tiers = Tiers()
    tiers.cover(1)
    tiers.take(0, tiers.tier_of(tier))
    return TierKit(TABLE, tiers, Credit(), stretch=stretch, attention_tokens=10_000)


def test_the_chunk_fills_what_the_decodes_leave() -> None:
    part = kit(0.03).parts(0, M).chunking
    assert part is not None
    chunk = part.budget(situation(20, 20_000), None)
    assert TABLE.with_chunk_s(20, 20_000, chunk) <= 0.03 < TABLE.with_chunk_s(20, 20_000, chunk + 1)
    assert part.budget(situation(0, 0), None) == 8192, "nobody to hold back for"
    assert part.budget(situation(500, 400_000), None) == 0


def test_credit_stretches_an_iteration_and_is_paid_back() -> None:
    shared = kit(0.03)
    part = shared.parts(0, M).chunking
    assert part is not None
    plain = part.budget(situation(20, 20_000, waiting=0), None)
    shared.credit.join(0, 0.02, True)
    more = part.budget(situation(20, 20_000), None)
    assert TABLE.with_chunk_s(20, 20_000, more) == pytest.approx(0.05, rel=0.01)
    assert part.budget(situation(20, 20_000, last_step_s=0.05), None) == plain, "that iteration spent it"
    less = part.budget(situation(20, 20_000, last_step_s=0.035), None)
    assert TABLE.with_chunk_s(20, 20_000, less) == pytest.approx(0.025, rel=0.01), "one ran over the budget"
    shared.credit.join(0, 99.0, True)
    most = part.budget(situation(20, 20_000), None)
    assert TABLE.with_chunk_s(20, 20_000, most) == pytest.approx(0.06, rel=0.01), "stretched twice at most"


def test_the_least_slack_counts() -> None:
    credit = Credit()
    credit.join(0, 0.5, True)
    credit.join(0, 0.7, False)
    assert credit.of(0) == 0.5
    credit.join(0, 0.1, False)
    assert credit.of(0) == 0.1
    credit.join(0, 0.4, True)
    assert credit.of(0) == 0.4, "a batch of its own"


def test_attention_counts_for_long_prompts() -> None:
    shared = kit(0.03)
    short, long = shared.chunk(10, 0, 9_999, 0.03), shared.chunk(10, 0, 60_000, 0.03)
    assert short == shared.chunk(10, 0, 0, 0.03)
    spent_s = TABLE.with_chunk_s(10, 0, long) + TABLE.attention_s(long, 60_000)
    assert 0 < long < short and spent_s <= 0.03


def mixed_router() -> PolyServeMixed:
    """The router of a ``polyserve-mixed``."""
    part = build_policy("polyserve-mixed", BELIEFS, SLO).prefill
    assert isinstance(part, PolyServeMixed)
    return part


def test_a_request_that_no_server_holds_is_no_demand() -> None:
    router = mixed_router()
    view = cluster([M, M])
    record = request(10**9, 1, SLO)
    router.observe(RequestArrived(1, 10**9, SLO), view, 0.0)
    tier = router.tiers.tier_of(SLO.tpot_s)
    assert router.demand.of(tier) == 1
    assert not router.place(record, view, 0.0).fits
    assert router.demand.of(tier) == 0


def test_prefill_is_predicted_by_the_chunk_that_can_be_kept() -> None:
    router = mixed_router()
    alone = router.prefill_s(0, 0, 0, 0, 1000, 0.03)
    assert alone == pytest.approx(BELIEFS.prefill_s(1000), rel=0.01)
    beside = router.prefill_s(20, 20_000, 0, 0, 1000, 0.03)
    chunk = TABLE.most_chunk(20, 20_000, 0.03)
    assert beside >= 1000 / chunk * 0.028
    assert router.prefill_s(20, 20_000, 3, 3000, 1000, 0.03) > 3 * beside, "prompts before it come first"
    assert router.prefill_s(300, 90_000, 0, 0, 1000, 0.03) == inf, "no room for any chunk"


def test_a_prompt_goes_to_a_less_loaded_server_if_its_chunk_cannot_be_kept() -> None:
    router, view = mixed_router(), cluster([M, M], [50_000, 10_000], [30, 10], step_s=0.02)
    router._cover(view)
    for i, count in ((0, 30), (1, 10)):
        router.tiers.take(i, router.tiers.tier_of(0.025))
        for k in range(count):
            router.residents[i].put(100 * (i + 1) + k, int(view.running_tokens[i]) // count, 1, 0.0)
    assert router.place(request(20, 1, Slo(1.0, 0.025)), view, 0.0).instance == 0, "the fuller one, for a short prompt"
    assert router.place(request(3000, 2, Slo(1.0, 0.025)), view, 0.0).instance == 1
    assert router.tests.refusals["ttft"] == 1


# -- LMetric ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "slo", "where"),
    [
        ([10_000, 40_000, 80_000], Slo(1.0, 0.05), 2),
        ([10_000, 40_000, 80_000], Slo(1.0, 0.02), 1),
        ([10_000, 40_000, 80_000], Slo(1.0, 0.011), 0),
        ([10_000, 40_000, 80_000], Slo(0.001, 0.05), 0),
        ([10_000, 40_000, 99_950], Slo(1.0, 0.05), 1),
    ],
)
def test_lmetric_takes_the_slowest_feasible_else_the_fastest(tokens: list[int], slo: Slo, where: int) -> None:
    view = cluster([M] * 3, tokens, [10] * 3)
    choice = PackedReplica(TABLE, PrefillFit(BELIEFS)).place(request(100, 1, slo), view, 0.0)
    assert choice.instance == where


# -- simulated --------------------------------------------------------------------------------------------------------

STEP = LinearStepModel(0.010, per_decode_s=1e-5, per_context_s=1e-6, per_prefill_s=1e-5)
"""16 requests of 600 tokens take 20 ms, 32 take 30 ms."""
SIMULATED = {"tight": Slo(0.5, 0.02), "loose": Slo(0.5, 0.03)}


def simulated(
    name: str, rate_rps: float, seconds: float, servers: int, tight: float, **options: float | str
) -> tuple[SimResult, Policy]:
    """Requests of 500 tokens with 200 of output, a share ``tight`` of them with the tighter TPOT."""
    beliefs = Beliefs(STEP, 57_344.0, 50e9, 1e-4)
    if name.startswith("polyserve"):
        options = {"prior": 200.0, **options}
    policy = build_policy(name, beliefs, SLO, **options)
    roles = [M] * servers if name == "polyserve-mixed" else [P] + [D] * servers
    specs = tuple(InstanceSpec(role, STEP, 6250, link_bytes_per_s=50e9) for role in roles)
    n = round(rate_rps * seconds)
    trace = synthesize("500/200", n, rate_rps, seed=3, classes={"tight": tight, "loose": 1.0 - tight})
    scenario = Scenario(sample_s=0.5)
    return simulate(trace, ClusterSpec(specs, 57_344.0, 1e-4), policy, beliefs, [*SIMULATED.values()], scenario), policy


def sorted_load(result: SimResult, servers: int) -> NDArray[np.int64]:
    """Decodes of each server at each sample once the start is over, fullest first."""
    t = result.timeline
    assert t is not None
    steady = (t.time_s > 10.0) & (t.time_s < result.trace.duration_s)
    return -np.sort(-t.running[steady][:, -servers:].astype(np.int64), axis=1)


def test_half_load_leaves_servers_idle_where_least_load_leaves_none() -> None:
    packed, policy = simulated("polyserve", 12.0, 40.0, 6, tight=1.0)
    spread, _ = simulated("static", 12.0, 40.0, 6, tight=1.0)
    loads, even = sorted_load(packed, 6), sorted_load(spread, 6)
    assert loads.mean(axis=0)[0] > 4 * (loads.mean(axis=0)[4] + 1.0), "steep"
    assert (loads == 0).sum(axis=1).mean() > 1.0
    assert even.mean(axis=0)[0] < 2 * even.mean(axis=0)[5]
    assert (even == 0).sum(axis=1).mean() < 0.05
    tiers = decode_part(policy).tiers
    assert tiers.given > 0
    assert Verdicts(packed, SIMULATED).met.mean() > 0.95


def test_guests_make_no_request_of_their_host_late() -> None:
    result, policy = simulated("polyserve", 14.0, 40.0, 3, tight=0.3)
    assert decode_part(policy).guests > 20
    v = Verdicts(result, SIMULATED)
    tight = result.trace.slo_class == 0
    assert v.finished.all()
    assert longest_step(result) <= 0.03 + 1e-9
    # A request that waited for its server is late by its own class's queue, not by a guest.
    waited = result.requests.decode_start_s - result.requests.first_token_s > 0.1
    assert v.tpot_met[tight & ~waited].all()


def longest_step(result: SimResult) -> float:
    """Longest iteration of a batch of more than one. The first gap after a transfer is a row of one, and is out."""
    g = result.gaps
    several = g.batch > 1
    return float((g.first_s + np.maximum(g.rise_s, 0.0) * (g.count - 1))[several].max())


def test_waiting_keeps_iterations_within_the_budget_in_overload() -> None:
    packed, _ = simulated("polyserve", 14.0, 20.0, 2, tight=1.0)
    spread, _ = simulated("static", 14.0, 20.0, 2, tight=1.0)
    assert longest_step(packed) <= 0.02 + 1e-9 < 0.025 < longest_step(spread)


def test_dynamic_chunks_keep_decodes_on_their_pace() -> None:
    result, _ = simulated("polyserve-mixed", 6.0, 30.0, 3, tight=1.0, stretch=1.0)
    assert longest_step(result) <= 0.02 + 1e-3
    assert Verdicts(result, SIMULATED).met.mean() > 0.9
