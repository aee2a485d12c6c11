"""Record, replay, and another policy on the record."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from penstock.policy.registry import PRESETS
from tests.cli.support import document, ok, penstock


@pytest.mark.parametrize("policy", PRESETS)
def test_a_recorded_run_replays_to_identical_actions(policy: str, tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    args = ("simulate", "-n", "1000", "--rate", "24", "--policy", policy, "--noise", "0.05", "-q")
    ok(*args, "--record", log, "--fault", "slow:2x2@5s,down:3@15s,up:3@25s")
    found = document("replay", log)
    assert found["identical"] and found["difference"] is None
    assert found["events"] == len(log.read_text().splitlines()) - 1 and found["actions"] >= 1000


def test_recording_does_not_change_the_run_and_is_deterministic(tmp_path: Path) -> None:
    args = ("simulate", "-n", "200", "--rate", "24", "--policy", "ares", "-q")
    one, two = tmp_path / "one.jsonl.gz", tmp_path / "two.jsonl.gz"
    recorded, plain = document(*args, "--record", one), document(*args, "--record", two)
    assert one.read_bytes() == two.read_bytes()
    assert recorded["e2e_s"] == plain["e2e_s"] == document(*args)["e2e_s"]
    assert document("replay", one)["identical"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    ok("simulate", "-n", "120", "--rate", "20", "--policy", "least-kv", "--record", path, "-q")
    return path


def test_a_tampered_action_is_found_and_shown(log: Path, tmp_path: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"Decode"' in line)
    lines[at] = lines[at].replace(b'"instance":2}]', b'"instance":9}]').replace(b'"instance":3}]', b'"instance":9}]')
    other = tmp_path / "tampered.jsonl"
    other.write_bytes(b"".join(lines))
    result = penstock("replay", other)
    assert result.exit_code == 1
    assert f"tampered.jsonl:{at + 1}: PrefillDone" in result.stdout.replace("\n", "")
    assert '"instance":9' in result.stdout


def test_a_tampered_event_or_a_lost_line_is_found(log: Path, tmp_path: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"PrefillDone"' in line)
    other = tmp_path / "lost.jsonl"
    other.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
    assert penstock("replay", other).exit_code == 1
    other.write_bytes(b"".join(lines[:1] + lines[2:]))
    assert penstock("replay", other).exit_code == 1


def test_a_cut_last_line_is_left_out_and_said(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "cut.jsonl"
    other.write_bytes(log.read_bytes()[:-20])
    result = ok("replay", other)
    assert "cut short" in result.stderr


def test_a_changed_setup_or_version_or_row_is_refused(log: Path, tmp_path: Path) -> None:
    head, _, rest = log.read_bytes().partition(b"\n")
    other = tmp_path / "other.jsonl"
    for change, said in (
        ({"version": 99}, "version 99"),
        ({"format": "else"}, "other.jsonl:1"),
        ({"setup": {"policy": 3}}, "setup cannot be read"),
        ({"files": {"/nowhere/p.json": "0"}}, "recorded with another /nowhere/p.json"),
    ):
        other.write_bytes(json.dumps(json.loads(head) | change).encode() + b"\n" + rest)
        result = penstock("replay", other)
        assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    other.write_bytes(head + b'\n{"t":0,"event":{"type":"Nope"},"actions":[]}\n')
    assert "other.jsonl:2" in penstock("replay", other).stderr
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(log.read_bytes())[:-2000])
    assert penstock("replay", damaged).exit_code == 2


def test_another_policy_on_the_recorded_requests(log: Path, tmp_path: Path) -> None:
    found = document("replay", log, "--policy", "ares", "--set", "horizon=100", "--report", tmp_path / "r.html")
    recorded, other = found["runs"]
    assert (recorded["policy"], other["policy"], found["left_out"]) == ("least-kv", "ares", 0)
    again = document("simulate", "-n", "120", "--rate", "20", "--policy", "least-kv")
    assert recorded["result"]["e2e_s"] == again["e2e_s"]
    assert other["result"]["finished"] == 120
    assert document("replay", log, "--policy", "mixed")["runs"][1]["result"]["finished"] == 120
    assert penstock("replay", log, "--set", "horizon=3").exit_code == 2


def test_a_profile_that_changed_since_is_refused(tmp_path: Path) -> None:
    profile, log = tmp_path / "p.json", tmp_path / "run.jsonl"
    costs = {"base_s": 0.01, "per_decode_s": 1e-5, "per_context_s": 0.0, "per_prefill_s": 1e-4, "per_pair_s": 0.0}
    profile.write_text(json.dumps({"schema": "penstock.profile/1", "kind": "linear", "linear": costs}))
    ok("simulate", "-n", "20", "--profile", profile, "--record", log, "-q")
    assert document("replay", log)["identical"]
    profile.write_text(profile.read_text().replace("0.01", "0.02"))
    result = penstock("replay", log)
    assert result.exit_code == 2 and "was recorded with another" in result.stderr
