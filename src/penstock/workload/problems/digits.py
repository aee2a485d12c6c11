"""Numbers as the solutions write them."""

from __future__ import annotations


def backwards(number: int, width: int) -> str:
    """``number`` in ``width`` decimal digits, the last one first: carries then run in the direction of writing."""
    return f"{number:0{width}d}"[::-1]
