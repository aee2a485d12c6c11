"""``--set`` texts as options of a policy."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.errors import PenstockError
from penstock.perf.lookup import unknown_name
from penstock.policy.registry import PRESETS, preset


def options_of(policies: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, float | str]]:
    """The options of each policy from ``["ares.horizon=4096", "margin=0.1"]``.

    With a policy's name in front, a setting goes to that policy; without, to every policy of the list that has the
    option.

    Raises
    ------
    PenstockError
        A setting that is not ``option=value``, names an option or policy that is not there, or has a value that the
        option does not take.
    """
    found: dict[str, dict[str, float | str]] = {name: {} for name in policies}
    for text in settings:
        left, equals, value = text.partition("=")
        owner, dot, key = left.strip().rpartition(".")
        if not (equals and key):
            raise PenstockError(f"setting {text!r} cannot be read", "write option=value, as horizon=4096")
        if dot and owner not in policies:
            if owner not in PRESETS:
                raise unknown_name("policy", owner, list(PRESETS))
            raise PenstockError(f"setting {text!r} is for a policy that does not run", f"run {owner}, or drop it")
        takers = [name for name in policies if (not dot or name == owner) and preset(name).option(key) is not None]
        if not takers:
            known = sorted({option.name for name in policies for option in preset(name).options})
            raise unknown_name("option", key, known or ["none (this policy has no options)"])
        for name in takers:
            option = preset(name).option(key)
            assert option is not None
            found[name][key] = option.check(name, value.strip())
    return found
