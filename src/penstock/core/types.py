"""Roles, SLOs and migration levels: the words of the field, as types."""

from enum import IntEnum

import msgspec


class Role(IntEnum):
    """What an instance does. A flip changes this label and nothing else (Arrow v2, section 5.2)."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2


class MigrationLevel(IntEnum):
    """How a running decode moves, from "always possible" to "least pause".

    REPLAY recomputes prompt and output on the target. REPROMPT pulls the KV of a re-sent prompt while the source
    goes on decoding (make before break). HANDOFF stops the request, then pulls. PRECOPY pulls the full blocks while
    the source goes on decoding and stops it only for the rest (Llumnix, section 4.2).
    """

    REPLAY = 0
    REPROMPT = 1
    HANDOFF = 2
    PRECOPY = 3


class Slo(msgspec.Struct, frozen=True, gc=False):
    """Targets of one request, in seconds; ``inf`` means no target.

    TTFT counts queueing. TPOT is the mean over tokens 2..m and counts the KV transfer (Arrow v2, section 4.2).
    """

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")
