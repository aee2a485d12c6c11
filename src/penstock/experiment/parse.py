"""Short texts of the command line as values: durations, SLO classes, faults, policy options."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.sim.cluster import Fault, FaultKind

_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?P<number>[-+]?[\d.]+(?:e[-+]?\d+)?)\s*(?P<unit>us|µs|ms|s|min|h|)$", re.IGNORECASE)
_FAULT = re.compile(r"(?P<kind>[a-z]+):(?P<instance>\d+)(?:x(?P<factor>[\d.]+))?@(?P<time>.+)$", re.IGNORECASE)


def duration(text: str, what: str = "duration") -> float:
    """``50ms``, ``1.5s``, ``2min``, ``1h`` or plain seconds, in seconds; ``none`` and ``inf`` are infinite.

    Raises
    ------
    PenstockError
        It is none of these, or negative.
    """
    text = text.strip()
    if text.lower() in ("none", "inf"):
        return math.inf
    match = _DURATION.match(text)
    try:
        seconds = float(match["number"]) * _UNITS[match["unit"].lower()] if match else -1.0
    except ValueError:
        seconds = -1.0
    if match is None or not (math.isfinite(seconds) and seconds >= 0):
        raise PenstockError(f"{what} {text!r} is not a time", "give seconds, or a number with ms, s, min or h")
    return seconds


def target(text: str, what: str) -> float:
    """An SLO target in seconds, above 0; ``none`` is no target (inf)."""
    seconds = duration(text, what)
    if seconds <= 0:
        raise PenstockError(f"{what} {text!r} is no target", "give a time above 0, as 50ms, or none")
    return seconds


def slo_classes(texts: Sequence[str]) -> dict[str, Slo]:
    """``["chat=500ms/40ms", "batch=none/200ms"]`` (TTFT, then TPOT) as an SLO per class.

    Raises
    ------
    PenstockError
        A text of another form, or a class given twice.
    """
    found: dict[str, Slo] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        ttft, slash, tpot = rest.partition("/")
        if not (name.strip() and equals and slash):
            raise PenstockError(f"SLO {text!r} cannot be read", "write CLASS=TTFT/TPOT, as chat=500ms/40ms")
        if name.strip() in found:
            raise PenstockError(f"SLO class {name.strip()!r} is given twice", "give each class once")
        found[name.strip()] = Slo(target(ttft, "TTFT"), target(tpot, "TPOT"))
    return found


ROUNDING = 1e-6
"""Shares that add up to 1 but for this much leave nothing."""


def class_shares(texts: Sequence[str]) -> dict[str, float]:
    """``["chat=0.8", "batch=0.2"]`` as shares; what they leave of 1 is of class ``default``.

    Raises
    ------
    PenstockError
        A text of another form, or more than 1 together. Other ranges are checked where the classes are drawn.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            raise PenstockError(f"class {text!r} cannot be read", "write CLASS=SHARE, as chat=0.8") from None
    total = sum(found.values())
    if total > 1 + ROUNDING:
        raise PenstockError(f"the shares of the classes add up to {total:g}", "give shares of at most 1 together")
    if found and total < 1 - ROUNDING:
        found.setdefault("default", 1 - total)
    return found


def faults(text: str) -> tuple[Fault, ...]:
    """``down:3@120s,up:3@180s,slow:2x1.5@60s`` as faults: KIND:INSTANCE@TIME, and for ``slow`` a factor after x.

    Raises
    ------
    PenstockError
        A part of another form, or a factor that is not above 0 or missing.
    """
    found: list[Fault] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _FAULT.match(part)
        kinds = [kind.value for kind in FaultKind]
        if match is None or match["kind"].lower() not in kinds:
            raise PenstockError(f"fault {part!r} cannot be read", "write down:3@120s, up:3@180s or slow:2x1.5@60s")
        kind = FaultKind(match["kind"].lower())
        try:
            factor = float(match["factor"] or (0 if kind is FaultKind.SLOW else 1))
        except ValueError:
            factor = 0.0
        if factor <= 0:
            raise PenstockError(f"fault {part!r} needs a factor above 0", "write slow:2x1.5@60s for 1.5 times slower")
        found.append(Fault(duration(match["time"], "fault time"), int(match["instance"]), kind, factor))
    return tuple(sorted(found, key=lambda fault: fault.time_s))


def names(text: str, what: str) -> list[str]:
    """A comma-separated list without blanks and repetitions; raises PenstockError where nothing is left."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise PenstockError(f"no {what} in {text!r}", "give one or more, with commas between")
    return found


def rates(text: str) -> list[float]:
    """``4,6,8`` as requests/s; raises PenstockError for what is not a number above 0."""
    found = []
    for part in names(text, "rate"):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            raise PenstockError(f"rate {part!r} is not a positive number", "give requests per second, as 4,6,8")
        found.append(rate)
    return found


def predictor(text: str) -> dict[str, Any]:
    """``auto``, ``noisy`` or ``noisy:0.4,800`` as fields of ``TruthSetup``: the kind, and how wrong it is.

    Raises
    ------
    PenstockError
        What follows the colon is not two numbers, 0 or more and above 0. The kind is checked where it is used.
    """
    kind, colon, error = text.partition(":")
    if not colon:
        return {"predictor": kind}
    try:
        sigma, halving = (float(part) for part in error.split(","))
    except ValueError:
        sigma = halving = math.nan
    if kind != "noisy" or not (0.0 <= sigma < math.inf and 0.0 < halving < math.inf):
        raise PenstockError(
            f"predictor {text!r} cannot be read", "write noisy:0.6,2600: error at the first token, tokens that halve it"
        )
    return {"predictor": kind, "predictor_sigma": sigma, "predictor_halving": halving}
