"""Options of a policy as data, so that the command line, the docs and the checks read one table."""

from __future__ import annotations

import msgspec

from penstock.core.errors import PenstockError

OptionValue = float | str


class Option(msgspec.Struct, frozen=True):
    """One setting of a preset.

    ``default`` fixes the type: a number or a word. A number lies in ``[low, high]``; a word is one of ``words``.
    ``origin`` says where the default comes from: ``paper``, ``code`` (a published implementation) or ``ours``.
    """

    name: str
    default: OptionValue
    help: str
    origin: str = "ours"
    low: float = float("-inf")
    high: float = float("inf")
    words: tuple[str, ...] = ()

    def check(self, owner: str, value: OptionValue) -> OptionValue:
        """Convert a value (text from a command line included) to this option's type.

        Raises
        ------
        PenstockError
            The value is not a number, out of range, or not one of the words.
        """
        if isinstance(self.default, str):
            if value not in self.words:
                raise PenstockError(
                    f"{owner}.{self.name}={value!r} is not one of its values", "use one of " + ", ".join(self.words)
                )
            return value
        try:
            number = float(value)
        except ValueError:
            raise PenstockError(f"{owner}.{self.name}={value!r} is not a number", self.help) from None
        if not self.low <= number <= self.high:
            raise PenstockError(
                f"{owner}.{self.name}={value} is out of range", f"use a number from {self.low:g} to {self.high:g}"
            )
        return number

    def but(self, default: OptionValue) -> Option:
        """The same option with another default, for a variant of a preset."""
        return msgspec.structs.replace(self, default=default)


def number(options: dict[str, OptionValue], name: str) -> float:
    """A numeric option, already checked."""
    return float(options[name])


def word(options: dict[str, OptionValue], name: str) -> str:
    """A word option, already checked."""
    return str(options[name])
