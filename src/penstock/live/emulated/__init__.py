"""Emulated vLLM engines: stock vLLM's HTTP surface, timed in real time by the simulator's engine model."""

from penstock.live.emulated.fleet import EmulatedFleet
from penstock.live.emulated.instance import EmulatedEngine
from penstock.live.emulated.settings import EmulatedSettings

__all__ = ["EmulatedEngine", "EmulatedFleet", "EmulatedSettings"]
