"""xLLM: first fit, reservations, lending and flips."""

from __future__ import annotations

from penstock.core.events import Aborted, Finished
from penstock.core.types import Role, Slo
from penstock.policy.latency import BatchFit
from penstock.policy.xllm import Reservations, XllmDecode, XllmPrefill, XllmRoles
from tests.policy.cluster import BELIEFS, cluster, load, request

P, D = Role.PREFILL, Role.DECODE
STEP = BatchFit(BELIEFS)


def parts() -> tuple[XllmPrefill, XllmDecode, XllmRoles]:
    held = Reservations()
    prefill = XllmPrefill(STEP, held)
    return prefill, XllmDecode(STEP, held), XllmRoles(prefill, held)


def test_first_fit_packs() -> None:
    prefill, decode, _ = parts()
    view = cluster([P, D, D], [0, 50_000, 0])
    record = request()
    choice = prefill.place(record, view, 0.0)
    assert (choice.instance, choice.fits, record.planned_decode) == (0, True, 1)
    assert decode.place(record, view, 0.0).instance == 1


def test_reservations_count_until_the_decode_is_placed() -> None:
    prefill, decode, _ = parts()
    view = cluster([P, D, D], capacity_tokens=1000)
    first, second, third = (request(prompt=600, number=k) for k in range(3))
    prefill.place(first, view, 0.0)
    prefill.place(second, view, 0.0)
    assert (first.planned_decode, second.planned_decode) == (1, 2)
    decode.place(first, view, 0.0)
    prefill.place(third, view, 0.0)
    assert third.planned_decode == 1


def test_an_aborted_request_gives_its_slot_back() -> None:
    prefill, _, _ = parts()
    view = cluster([P, D])
    prefill.place(request(), view, 0.0)
    assert prefill.held.tokens[1] == 100
    prefill.observe(Aborted(1), view, 0.0)
    assert (prefill.held.tokens[1], prefill.held.count[1], prefill.held.requests) == (0, 0, {})


def test_a_prompt_too_long_for_all_holds_nothing() -> None:
    prefill, _, _ = parts()
    assert not prefill.place(request(prompt=10**6), cluster([P, D]), 0.0).fits
    assert prefill.held.requests == {}


def test_an_underused_decode_is_lent_when_prefill_is_late() -> None:
    prefill, _, _ = parts()
    view = cluster([P, D, D], [0, 1000, 0])
    view.prefill_estimate_s[0] = 5.0
    assert prefill.place(request(), view, 0.0).instance == 2
    view.prefill_estimate_s[0] = 0.5
    assert prefill.place(request(), view, 0.0).instance == 0


def test_decode_shortage_flips_the_chosen_prefill_which_keeps_the_prefill() -> None:
    prefill, _, roles = parts()
    view = cluster([P, P, D], [0, 0, 1000])
    record = request(slo=Slo(1.0, 0.0101))
    choice = prefill.place(record, view, 0.0)
    assert (choice.fits, record.planned_decode) == (False, 2)
    change = roles.relieve(P, record, view, 0.0)
    assert change is not None
    assert (change.instance, change.role) == (choice.instance, D)
    assert roles.relieve(P, record, view, 0.0) is None


def test_the_last_prefill_is_not_flipped() -> None:
    prefill, _, roles = parts()
    view = cluster([P, D], [0, 1000])
    record = request(slo=Slo(1.0, 0.0101))
    prefill.place(record, view, 0.0)
    assert roles.relieve(P, record, view, 0.0) is None


def test_an_empty_decode_instance_becomes_prefill_but_not_the_last() -> None:
    prefill, _, roles = parts()
    view = cluster([P, D, D], [0, 1000, 0])
    done = Finished(7, 2, 10, load())
    changes = roles.after(done, view, 0.0)
    assert [(c.instance, c.role) for c in changes] == [(2, P)]
    view.relabel(2, P)
    assert roles.after(Finished(7, 1, 10, load()), view, 0.0) == []
    view.relabel(2, D)
    record = request(prompt=99_500)
    prefill.place(record, view, 0.0)
    assert record.planned_decode == 2
    assert roles.after(done, view, 0.0) == []


def test_a_dead_plan_is_replaced() -> None:
    prefill, decode, _ = parts()
    view = cluster([P, D, D])
    record = request()
    prefill.place(record, view, 0.0)
    view.remove(1)
    assert decode.place(record, view, 0.0).instance == 2
