"""The league: everybody plays, on equal terms, beside a bound."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from penstock.core.errors import PenstockError
from penstock.experiment.setup import ClusterSetup, Setup, Target
from penstock.league import play as league_play
from penstock.league.entries import ENTRIES, MOONCAKE, QUICK, Entry, base_setup, chosen_entries, chosen_policies
from penstock.league.play import FRACTIONS, League, Row, play
from penstock.league.tables import BOUND, DETAILS, details, markdown, standing, standing_titles
from penstock.policy.registry import PRESETS
from tests.cli.support import document, ok, penstock

SMALL = Entry("512/32", Target(1.0, 0.05), requests=150)
BASE = Setup(cluster=ClusterSetup(prefill=2, decode=2))


@pytest.fixture(scope="module")
def small() -> League:
    return play(BASE, [SMALL], ["mixed", "least-kv", "arrow"], tolerance=0.1, jobs=1)


def test_rows_hold_together(small: League) -> None:
    assert small.policies == ["mixed", "least-kv", "arrow"]
    ground = small.grounds[0]
    for row in small.rows:
        assert not row.problem
        assert row.share == pytest.approx(row.goodput_rps / ground.bound.any_rps)
        finite = ground.bound.finite_rps
        assert row.goodput_rps > 0 and (finite is None or row.goodput_rps <= finite)
        rates = [row.attainment[f"{x:g}"] for x in FRACTIONS]
        assert all(0 <= x <= 1 for x in rates)
        # What the goodput says about the fixed rates, the fixed rates say themselves.
        for x in FRACTIONS:
            if row.share >= x:
                assert any(row.attainment[f"{y:g}"] >= small.goal for y in FRACTIONS if y <= x)
    mixed = next(row for row in small.rows if row.policy == "mixed")
    assert mixed.flips == 0 and mixed.migrations == 0
    assert mixed.ttft_p99_s is not None and mixed.ttft_p99_s > 0


def test_the_split_is_the_best_of_those_tried(small: League) -> None:
    ground = small.grounds[0]
    assert len(ground.split_rps) >= 2
    assert max(ground.split_rps, key=lambda p: ground.split_rps[p]) == str(ground.setup.cluster.prefill)
    assert ground.setup.cluster.prefill + ground.setup.cluster.decode == 4


def test_tables_agree_with_rows(small: League) -> None:
    table = standing(small)
    assert table[0][0] == BOUND and {len(row) for row in table} == {len(standing_titles(small))}
    assert [row[0] for row in table[3:]] == [name for name, _, _ in small.standing()]
    rows = details(small, "512/32")
    assert {len(row) for row in rows} == {len(DETAILS)}
    assert [row[0] for row in rows[1:]] == [row.policy for row in small.of("512/32")]
    text = markdown(small)
    assert text.count("| arrow |") == 2 and "### 512/32" in text
    json.loads(msgspec.json.encode(small))


def test_broken_off_it_shows_what_was_played_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "league.jsonl"
    other = Entry("1024/128", Target(1.0, 0.04), requests=150)
    play_one = league_play.play_one
    played: list[tuple[str, float | None]] = []

    def impatient(setup: Setup, policy: str, *rest: object) -> Row:
        played.append((policy, setup.slo.tpot_s))
        if len(played) == 2:
            raise KeyboardInterrupt
        return play_one(setup, policy, *rest)  # type: ignore[arg-type]

    impatient.__name__ = play_one.__name__
    monkeypatch.setattr(league_play, "play_one", impatient)

    def again() -> League:
        return play(BASE, [SMALL, other], ["mixed", "least-kv"], split=2, tolerance=0.2, jobs=1, keep=str(kept))

    first = again()
    assert [row.policy for row in first.rows] == ["mixed"] and first.missing == 3
    assert len(first.grounds) == 1
    assert [row[1] for row in standing(first)[3:]] != ["not played"] and "mixed" in markdown(first)
    with kept.open("a") as file:
        file.write('{"key": "half a li')  # as a kill leaves it
    whole = again()
    assert whole.missing == 0 and len(whole.rows) == 4 and whole.rows[0] == first.rows[0]
    assert played == [("mixed", 0.05), *[("least-kv", 0.05)] * 2, ("mixed", 0.04), ("least-kv", 0.04)]
    for text in ("a diary\nof mine\n", "a diary\nof mine", '{"a": "setup"}'):
        kept.write_text(text)
        with pytest.raises(PenstockError, match="--keep"):
            again()
        assert kept.read_text() == text  # nobody's file is cut


def test_whoever_cannot_play_says_why() -> None:
    from penstock.policy.registry import Preset, register

    def broken(*_: object) -> object:
        raise PenstockError("it needs a GPU of its own", "give it one")

    register("broken", Preset("cannot run", broken))  # type: ignore[arg-type]
    try:
        row = play(BASE, [SMALL], ["broken"], split=2, jobs=1).rows[0]
    finally:
        del PRESETS["broken"]
    assert row.problem == "it needs a GPU of its own" and row.goodput_rps == 0


def test_every_preset_plays_or_is_left_out_with_a_reason() -> None:
    playing, out = chosen_policies(None)
    assert set(playing) | set(out) == set(PRESETS) and not set(playing) & set(out)
    assert all(out.values())
    assert chosen_policies(["ares-noisy"]) == (["ares-noisy"], {})


def test_workloads() -> None:
    assert [e.name for e in chosen_entries(None, None, False)] == [e.name for e in ENTRIES]
    assert [e.name for e in chosen_entries(None, None, True)] == list(QUICK)
    assert chosen_entries(["mooncake"], "some.jsonl", False)[0].trace == "some.jsonl"
    with pytest.raises(PenstockError, match="--mooncake"):
        chosen_entries([MOONCAKE.name], None, False)
    with pytest.raises(PenstockError, match="azure-conv"):
        chosen_entries(["azure-con"], None, False)
    with pytest.raises(PenstockError, match="--gpus"):
        base_setup(1)


def test_the_command(tmp_path: Path) -> None:
    page, table = tmp_path / "league.html", tmp_path / "league.md"
    args = ("league", "--policies", "mixed,least-kv", "--workloads", "azure-code", "--quick", "--gpus", "2", "-j", "1")
    found = document(*args, "--tolerance", "0.2", "--report", page, "--markdown", table)
    assert found["schema"] == "penstock.league/1"
    assert {row["policy"] for row in found["rows"]} == {"mixed", "least-kv"}
    assert all(row["goodput_rps"] > 0 for row in found["rows"])
    assert "clairvoyant bound" in table.read_text() and "Plotly.newPlot" in page.read_text()
    assert penstock("league", "--policies", "nobody").exit_code == 2
    assert "--mooncake" in ok("league", "--help").output
