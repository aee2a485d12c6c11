"""Names, options and their errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.policy.length_order import ORDER_OPTIONS
from penstock.policy.registry import PRESETS, build_policy, parse_settings, preset
from tests.policy.cluster import BELIEFS, SLO


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_builds_under_its_name(name: str) -> None:
    policy = build_policy(name, BELIEFS, SLO)
    assert policy.name == name
    assert (policy.decode is not None) == PRESETS[name].disaggregated
    for option in PRESETS[name].options:
        assert option.check(name, option.default) == option.default


def test_options_reach_the_parts() -> None:
    policy = build_policy("ares", BELIEFS, SLO, interval="0.25")
    assert policy.rescheduler is not None
    assert policy.rescheduler.interval_s == 0.25
    assert policy.tick_s() == 0.25


def test_predictors_the_world_must_have() -> None:
    wanted = {name: p.predictor for name, p in PRESETS.items() if p.predictor is not None}
    assert wanted == {
        "auto": "noisy",
        "ares": "noisy",
        "ares-noisy": "noisy",
        "ares-oracle": "oracle",
        "sjf": "noisy",
        "trail": "noisy",
        "wait": "oracle",
    }


def test_settings_are_read() -> None:
    assert parse_settings(["ares.horizon=4096", "ares.predictor=none", "arrow.cooldown=2"]) == {
        "ares": {"horizon": 4096.0, "predictor": "none"},
        "arrow": {"cooldown": 2.0},
    }


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("ares.horizon", "policy.option=value"),
        ("horizon=1", "policy.option=value"),
        ("arse.horizon=1", "did you mean ares"),
        ("ares.horizont=1", "did you mean horizon"),
        ("ares.horizon=far", "not a number"),
        ("ares.horizon=-1", "from 0 to inf"),
        ("ares.predictor=magic", "use one of observed, history, none"),
        ("round-robin.depth=1", "it has no options"),
        ("ares.horizon=nan", "out of range"),
    ],
)
def test_bad_settings_say_what_to_write(setting: str, words: str) -> None:
    with pytest.raises(PenstockError, match=words):
        parse_settings([setting])


def test_unknown_names() -> None:
    with pytest.raises(PenstockError, match="did you mean llumnix"):
        preset("lumnix")
    with pytest.raises(PenstockError, match=r"has no option 'horizn'.*horizon"):
        build_policy("ares", BELIEFS, SLO, horizn=1.0)


PAGES = Path(__file__).resolve().parents[2] / "docs" / "policies"


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_docs_name_every_preset_and_option(name: str) -> None:
    assert f"`{name}`" in (PAGES / "README.md").read_text()
    pages = ["ares" if name.startswith("ares") else SHARED.get(name, name)]
    if set(ORDER_OPTIONS) & set(preset(name).options):
        pages.append("length-order")
    page = "".join((PAGES / f"{p}.md").read_text() for p in pages)
    for option in preset(name).options:
        assert f"\n| `{option.name}` |" in page
        for word in option.words:
            assert f"`{word}`" in page


SHARED = {
    "duet-static": "duet",
    "round-robin": "static",
    "least-kv": "static",
    "lmetric": "polyserve",
    "polyserve-mixed": "polyserve",
    "sjf": "length-order",
    "trail": "length-order",
}
