"""Heads of messages as bytes: status lines, headers without injection, the cached ``Date``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus

import msgspec

_PHRASES = {int(status): status.phrase for status in HTTPStatus}
_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_BODILESS = frozenset((204, 304))

_date_second = -1
_date_line = ""


def bodiless(status: int) -> bool:
    """Whether a response of this status never has a body (RFC 9110, section 6.4.1)."""
    return status in _BODILESS or status < 200


def header_lines(headers: Mapping[str, str]) -> str:
    """Write headers as lines.

    Raises
    ------
    ValueError
        A name is no token, or a value has a control character: such a header could smuggle in another.
    """
    lines = []
    for name, value in headers.items():
        if not name or not _TOKEN.issuperset(name.encode("latin-1", "replace")):
            raise ValueError(f"not a header name: {name!r}")
        if any((char < " " and char != "\t") or char == "\x7f" or char > "\xff" for char in value):
            raise ValueError(f"header {name} has a character that HTTP does not allow")
        lines.append(f"{name}: {value}\r\n")
    return "".join(lines)


def status_head(status: int, lines: str) -> bytes:
    """Write a response's head: status line, ``Date``, the given lines, the empty line."""
    return f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n{_date()}{lines}\r\n".encode("latin-1")


def error_body(status: int, message: str) -> bytes:
    """Write an error of the HTTP layer in the shape of OpenAI's API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": status}})


def _date() -> str:
    global _date_second, _date_line
    second = int(time.time())
    if second != _date_second:
        _date_second, _date_line = second, f"Date: {formatdate(second, usegmt=True)}\r\n"
    return _date_line
