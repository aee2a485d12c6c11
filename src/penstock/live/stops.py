"""Stop strings, matched over the text of all engines that a request visits: an engine misses one that spans a move."""

from __future__ import annotations


class StopMatcher:
    """Feed text as it comes; text that may yet turn out to be the start of a stop string is held back.

    Parameters
    ----------
    stops : list of str
        None of them empty.
    include : bool
        Keep the stop string in the output (vLLM's ``include_stop_str_in_output``).
    """

    def __init__(self, stops: list[str], include: bool = False) -> None:
        self.stops = stops
        self.include = include
        self.held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """Return what may be shown. ``hit`` is set when a stop string is complete; nothing comes after it."""
        if not self.stops:
            return text
        held = self.held + text
        found = [(at, stop) for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:
            # The one that is complete first wins, as if tokens were characters.
            at, stop = min(found, key=lambda f: (f[0] + len(f[1]), f[0]))
            self.hit = stop
            self.held = ""
            return held[: at + len(stop)] if self.include else held[:at]
        keep = max(_overlap(held, stop) for stop in self.stops)
        self.held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The end has come without a stop string: what was held back is text after all."""
        rest, self.held = self.held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper start of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
