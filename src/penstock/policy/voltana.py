"""VoltanaLLM (arXiv 2509.04827): clocks that follow the SLO (EcoFreq), decode placement that spares them (EcoRoute).

After the released code. The two baselines of its figures are options: ``clock=max`` and ``clock=low`` hold all engines
at one clock, with the same placements.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from penstock.core.types import Slo
from penstock.policy.ecofreq import EcoFreqKit, EcoFreqSettings, FixedClockKit
from penstock.policy.ecopred import ecopred, levels_of
from penstock.policy.ecoroute import Fadr, TileAware
from penstock.policy.engine import EngineKit
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Choice, DecodePlacement, Policy, PrefillPlacement
from penstock.policy.placement import FewestRequests, RoundRobinDecode, least_that_holds
from penstock.policy.static import PREFILL_WORDS, prefill_part
from penstock.policy.view import ClusterView, RequestRecord

DECODE_WORDS = ("fadr", "tile-aware", "fewest-requests", "round-robin")

VOLTANA_OPTIONS = (
    Option(
        "clock",
        "ecofreq",
        "who sets the clock: EcoFreq, or all engines at one",
        "code",
        words=("ecofreq", "max", "low"),
    ),
    Option(
        "margin", -0.3, "EcoFreq's targets are the SLO times 1 + margin; the code's demo has 0.35", low=-0.9, high=10.0
    ),
    Option(
        "levels", "two", "clocks that EcoFreq uses: the lowest and the highest, or all", "code", words=("two", "all")
    ),
    Option("decode", "fadr", "how a decode instance is chosen", "code", words=DECODE_WORDS),
    Option("prefill", "random", "how a prefill instance is chosen", "code", words=("random", *PREFILL_WORDS)),
    Option(
        "prefill_tps", 1_125_000.0, "prompt tokens/s of an engine above which it runs at its highest", "code", low=0.0
    ),
    Option("window", 3.0, "seconds over which they are counted", "code", low=1e-3),
    Option("steps", 16.0, "decode steps for which a choice may stand", low=1.0),
)

_ODD: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


class RandomPrefill(PrefillPlacement):
    """A prefill instance at random, drawn from the request's number, so that equal events give equal answers."""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`."""
        rows = view.prefills
        bits = (request.request + 1) * _ODD & _MASK  # splitmix64, two of its rounds
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        bits ^= bits >> 27
        turn = bits % max(len(rows), 1)
        return least_that_holds(view, rows, (np.arange(len(rows)) - turn) % max(len(rows), 1), request.context_tokens())


def voltana(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``voltana``. Without an SLO every clock is fine and the lowest is used."""
    levels = levels_of(beliefs)
    mhz = tuple(level.mhz for level in levels)
    predictor = ecopred(beliefs)
    name = word(options, "prefill")
    prefill = RandomPrefill() if name == "random" else prefill_part(name, beliefs)
    decode: DecodePlacement
    match word(options, "decode"):
        case "fadr":
            decode = Fadr(predictor, mhz, slo.tpot_s)
        case "tile-aware":
            decode = TileAware()
        case "round-robin":
            decode = RoundRobinDecode()
        case _:
            decode = FewestRequests()
    engine: EngineKit
    match word(options, "clock"):
        case "max":
            engine = FixedClockKit(len(mhz) - 1)
        case "low":
            engine = FixedClockKit(0)
        case _:
            everything = tuple(range(len(mhz)))
            used = everything if word(options, "levels") == "all" or len(mhz) == 1 else (0, len(mhz) - 1)
            engine = EcoFreqKit(
                EcoFreqSettings(
                    predictor,
                    mhz,
                    used,
                    slo.ttft_s,
                    slo.tpot_s,
                    number(options, "margin"),
                    number(options, "prefill_tps"),
                    window_s=number(options, "window"),
                    steps=int(number(options, "steps")),
                )
            )
    return Policy("voltana", prefill, decode, engine=engine)
