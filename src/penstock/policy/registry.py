"""The presets by name. Adding a policy takes its file and one line in ``PRESETS``."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Final

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.policy.ares import ARES_OPTIONS, ares
from penstock.policy.arrow import ARROW_OPTIONS, arrow
from penstock.policy.auto import AUTO_OPTIONS, auto
from penstock.policy.duet import DUET_OPTIONS, DUET_STATIC_OPTIONS, duet, duet_static
from penstock.policy.harli import HARLI_OPTIONS, harli
from penstock.policy.kairos import KAIROS_OPTIONS, kairos
from penstock.policy.length_order import ORDER_OPTIONS, ordered
from penstock.policy.llumnix import LLUMNIX_OPTIONS, llumnix
from penstock.policy.lmetric import LMETRIC_OPTIONS, lmetric
from penstock.policy.mixed import MIXED_OPTIONS, mixed
from penstock.policy.options import Option, OptionValue
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.polyserve import MIXED_OPTIONS as POLYSERVE_MIXED_OPTIONS
from penstock.policy.polyserve import POLYSERVE_OPTIONS, polyserve, polyserve_mixed
from penstock.policy.static import STATIC_OPTIONS, least_kv, round_robin, static
from penstock.policy.voltana import VOLTANA_OPTIONS, voltana
from penstock.policy.wait import WAIT_OPTIONS, wait
from penstock.policy.wait_nested import NESTED_OPTIONS, nested_wait
from penstock.policy.xllm import XLLM_OPTIONS, xllm

Builder = Callable[[Beliefs, Slo, dict[str, OptionValue]], Policy]


class Preset(msgspec.Struct, frozen=True):
    """A named policy.

    ``predictor`` names the world-side length predictor that a simulation must switch on for it: ``oracle``, ``noisy``
    or None. ``disaggregated`` is False where instances must have the role ``mixed``. ``left_out`` says why
    ``penstock league`` leaves it out, unless it is named; empty where it plays.
    """

    summary: str
    build: Builder
    options: tuple[Option, ...] = ()
    predictor: str | None = None
    disaggregated: bool = True
    left_out: str = ""

    def option(self, name: str) -> Option | None:
        """The option of that name, or None."""
        for option in self.options:
            if option.name == name:
                return option
        return None


def _with(options: tuple[Option, ...], name: str, default: OptionValue) -> tuple[Option, ...]:
    """The same options, one of them with another default."""
    return tuple(option.but(default) if option.name == name else option for option in options)


_HISTORY: Final = _with(ARES_OPTIONS, "predictor", "history")
# Without prediction: balance present loads only (decay 0), yet ask a target for room to grow over the horizon.
_NONE: Final = _with(_with(ARES_OPTIONS, "predictor", "none"), "decay", 0.0)
_STATIC: Final = STATIC_OPTIONS + ORDER_OPTIONS
_MIXED: Final = MIXED_OPTIONS + ORDER_OPTIONS
_SJF: Final = _with(_MIXED, "order", "sjf")
_TRAIL: Final = _with(_MIXED, "order", "trail")

PRESETS: Final[dict[str, Preset]] = {
    "auto": Preset(
        "one queue, both phases everywhere at the pace of the SLOs, placement by outlook, migration (ours)",
        auto,
        AUTO_OPTIONS,
        "noisy",
        disaggregated=False,
    ),
    "static": Preset("fixed roles; shortest prefill queue, fewest decodes (DistServe)", ordered(static), _STATIC),
    "round-robin": Preset("fixed roles; both phases in turn", round_robin),
    "least-kv": Preset(
        "fixed roles; least prefill work, least resident KV (FlowKV-like)", ordered(least_kv), ORDER_OPTIONS
    ),
    "mixed": Preset("no disaggregation: plain vLLM replicas", ordered(mixed), _MIXED, disaggregated=False),
    "sjf": Preset("replicas; shortest predicted output joins first", ordered(mixed), _SJF, "noisy", False),
    "trail": Preset(
        "replicas; shortest remaining output first, limited preemption", ordered(mixed), _TRAIL, "noisy", False
    ),
    "llumnix": Preset("balance decodes by freeness with live migration", llumnix, LLUMNIX_OPTIONS),
    # The paper's system includes its predictor, so plain `ares` meets the error that the paper reports for it. Where
    # the world predicts nothing (stock vLLM), it falls back to history by itself.
    "ares": Preset("balance present and predicted decode load with live migration", ares, ARES_OPTIONS, "noisy"),
    "ares-noisy": Preset(
        "ares with a predictor as wrong as the paper's", ares, ARES_OPTIONS, "noisy", left_out="the same as ares"
    ),
    "ares-oracle": Preset("ares with true remaining lengths", ares, ARES_OPTIONS, "oracle"),
    "ares-history": Preset("ares with lengths of recently finished requests", ares, _HISTORY),
    "ares-none": Preset("ares on current loads only, without prediction", ares, _NONE),
    "arrow": Preset("roles follow the load: flips by SLO, no draining", arrow, ARROW_OPTIONS),
    "harli": Preset("LoRA fine-tuning in what decodes leave of their GPU, within TPOT", harli, HARLI_OPTIONS),
    "kairos": Preset("prompts by slack, decode steps without the long requests", kairos, KAIROS_OPTIONS),
    "lmetric": Preset(
        "fullest replica that is feasible, else the least loaded", lmetric, LMETRIC_OPTIONS, disaggregated=False
    ),
    "polyserve": Preset("TPOT tiers filled to the brim, idle servers in a pool", polyserve, POLYSERVE_OPTIONS),
    "polyserve-mixed": Preset(
        "the same on replicas, with dynamic chunking", polyserve_mixed, POLYSERVE_MIXED_OPTIONS, disaggregated=False
    ),
    "duet": Preset(
        "mixed; SMs divided when a step would be too slow (DuetServe)", duet, DUET_OPTIONS, disaggregated=False
    ),
    "duet-static": Preset(
        "mixed; fixed parts of the SMs for decode and prefill", duet_static, DUET_STATIC_OPTIONS, disaggregated=False
    ),
    "voltana": Preset("clocks follow the SLO; decodes go where they raise none", voltana, VOLTANA_OPTIONS),
    "wait": Preset("replicas; batches wait for thresholds by output class", wait, WAIT_OPTIONS, "oracle", False),
    "nested-wait": Preset(
        "replicas; thresholds by segment of output, lengths unknown", nested_wait, NESTED_OPTIONS, None, False
    ),
    "xllm": Preset("first-fit decode packing, lending and flips on arrival", xllm, XLLM_OPTIONS),
}


def register(name: str, preset: Preset) -> None:
    """Add a preset from outside this package; it then works wherever a policy is named, in this process.

    Raises
    ------
    PenstockError
        The name is taken.
    """
    if name in PRESETS:
        raise PenstockError(f"there is a policy {name!r} already", "choose another name")
    PRESETS[name] = preset


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises
    ------
    PenstockError
        There is none; names close ones.
    """
    found = PRESETS.get(name)
    if found is None:
        raise PenstockError(f"no policy is called {name!r}", _suggest(name, list(PRESETS)))
    return found


def build_policy(name: str, beliefs: Beliefs, slo: Slo, **options: OptionValue) -> Policy:
    """Build a preset; ``options`` override its defaults, as numbers or as text.

    Raises
    ------
    PenstockError
        Unknown preset or option (close names are given), or a value that the option does not take.
    """
    chosen = preset(name)
    values: dict[str, OptionValue] = {option.name: option.default for option in chosen.options}
    for key, value in options.items():
        option = chosen.option(key)
        if option is None:
            raise PenstockError(f"policy {name!r} has no option {key!r}", _suggest(key, list(values)))
        values[key] = option.check(name, value)
    policy = chosen.build(beliefs, slo, values)
    policy.name = name
    return policy


def parse_settings(settings: list[str]) -> dict[str, dict[str, OptionValue]]:
    """Read ``["ares.horizon=4096", ...]`` into ``{"ares": {"horizon": 4096.0}}``, checked.

    Raises
    ------
    PenstockError
        A setting is not ``policy.option=value``, or names what does not exist.
    """
    found: dict[str, dict[str, OptionValue]] = {}
    for text in settings:
        left, equals, value = text.partition("=")
        name, dot, key = left.strip().partition(".")
        if not equals or not dot:
            raise PenstockError(f"setting {text!r} cannot be read", "write policy.option=value, as ares.horizon=4096")
        chosen = preset(name)
        option = chosen.option(key)
        if option is None:
            names = [option.name for option in chosen.options]
            raise PenstockError(f"policy {name!r} has no option {key!r}", _suggest(key, names))
        found.setdefault(name, {})[key] = option.check(name, value.strip())
    return found


def _suggest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(known) if known else "it has no options"
