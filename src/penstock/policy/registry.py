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
from penstock.policy.llumnix import LLUMNIX_OPTIONS, llumnix
from penstock.policy.mixed import MIXED_OPTIONS, mixed
from penstock.policy.options import Option, OptionValue
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.static import STATIC_OPTIONS, least_kv, round_robin, static
from penstock.policy.xllm import XLLM_OPTIONS, xllm

Builder = Callable[[Beliefs, Slo, dict[str, OptionValue]], Policy]


class Preset(msgspec.Struct, frozen=True):
    """A named policy.

    ``predictor`` names the world-side length predictor that a simulation must switch on for it: ``oracle``, ``noisy``
    or None. ``disaggregated`` is False where instances must have the role ``mixed``.
    """

    summary: str
    build: Builder
    options: tuple[Option, ...] = ()
    predictor: str | None = None
    disaggregated: bool = True

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

PRESETS: Final[dict[str, Preset]] = {
    "static": Preset("fixed roles; shortest prefill queue, fewest decodes (DistServe)", static, STATIC_OPTIONS),
    "round-robin": Preset("fixed roles; both phases in turn", round_robin),
    "least-kv": Preset("fixed roles; least prefill work, least resident KV (FlowKV-like)", least_kv),
    "mixed": Preset("no disaggregation: plain vLLM replicas", mixed, MIXED_OPTIONS, disaggregated=False),
    "llumnix": Preset("balance decodes by freeness with live migration", llumnix, LLUMNIX_OPTIONS),
    # The paper's system includes its predictor, so plain `ares` meets the error that the paper reports for it. Where
    # the world predicts nothing (stock vLLM), it falls back to history by itself.
    "ares": Preset("balance present and predicted decode load with live migration", ares, ARES_OPTIONS, "noisy"),
    "ares-noisy": Preset("ares with a predictor as wrong as the paper's", ares, ARES_OPTIONS, "noisy"),
    "ares-oracle": Preset("ares with true remaining lengths", ares, ARES_OPTIONS, "oracle"),
    "ares-history": Preset("ares with lengths of recently finished requests", ares, _HISTORY),
    "ares-none": Preset("ares on current loads only, without prediction", ares, _NONE),
    "arrow": Preset("roles follow the load: flips by SLO, no draining", arrow, ARROW_OPTIONS),
    "xllm": Preset("first-fit decode packing, lending and flips on arrival", xllm, XLLM_OPTIONS),
}


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
