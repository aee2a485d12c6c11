"""Logs of a gateway: one JSON object a line, or short text. Neither holds prompts, outputs or keys.

What is logged is an allow-list: the message and those ``extra`` fields that are named here. An engine's complaint about
a request may quote the request, so of a 4xx only its kind is kept.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable
from logging.handlers import WatchedFileHandler
from typing import Any

import msgspec

from penstock.core.errors import PenstockError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FIELDS = (
    "request",
    "instance",
    "source",
    "target",
    "role",
    "url",
    "status",
    "reason",
    "level",
    "policy",
    "outcome",
    "seconds",
    "pid",
    "port",
    "method",
    "path",
    "order",
    "count",
)
"""The ``extra`` fields that are written, in this order."""
LONGEST = 300
"""Characters of a field; more is no help in a log."""
_BEARER = re.compile(r"(?i)(bearer\s+)[^\s\"',;]+")
_USERINFO = re.compile(r"(?i)\b(https?://)[^/\s@]+@")
_KIND = re.compile(r'"type"\s*:\s*"([A-Za-z_ ]{1,40})"')


class _Formatter(logging.Formatter):
    """What both formats share: which fields there are, and what must not be in them."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        # The longest first, lest one secret be the beginning of another.
        self._secrets = sorted({s for s in secrets if s}, key=len, reverse=True)

    def clean(self, text: str) -> str:
        """Without keys, on one line."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _USERINFO.sub(r"\1***@", _BEARER.sub(r"\1***", text))

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """The record's own fields, as plain JSON types."""
        found: dict[str, Any] = {}
        for name in FIELDS:
            value = record.__dict__.get(name)
            if value is None:
                continue
            if name == "reason":
                value = _reason(str(value), record.__dict__.get("status"))
            found[name] = value if isinstance(value, bool | int | float) else self.clean(str(value)[:LONGEST])
        return found

    def trace(self, record: logging.LogRecord) -> str:
        """The traceback, if there is one."""
        return self.clean(self.formatException(record.exc_info)) if record.exc_info else ""


class JsonFormatter(_Formatter):
    """``{"time":"2026-01-31T12:00:00.123Z","level":"warning","logger":"penstock.live","message":...,...}``."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.clean(record.getMessage()),
        }
        for name, value in self.fields(record).items():
            line[name if name not in line else f"{name}_"] = value
        trace = self.trace(record)
        if trace:
            line["traceback"] = trace
        return msgspec.json.encode(line).decode()


class TextFormatter(_Formatter):
    """``12:00:00 warning fence instance=2 reason="it hangs"``, in local time."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        parts = [time.strftime("%H:%M:%S", time.localtime(record.created)), record.levelname.lower()]
        parts.append(" ".join(self.clean(record.getMessage()).splitlines()))
        parts += [f"{name}={_word(value)}" for name, value in self.fields(record).items()]
        trace = self.trace(record)
        return " ".join(parts) + (f"\n{trace}" if trace else "")


def setup_logging(
    json: bool = False, level: str = "info", file: str | None = None, secrets: Iterable[str] = ()
) -> logging.Handler:
    """Send the logs of this process to ``file`` (appended to, and opened again if it is rotated) or to stderr.

    Parameters
    ----------
    json : bool
        JSON lines instead of short text.
    level : str
        Least level of Penstock's own logs: debug, info, warning or error. Libraries log warnings and errors.
    file : str, optional
    secrets : iterable of str
        Keys that must not be in a log, wherever they come from.

    Returns
    -------
    logging.Handler
        The only handler; another call replaces it.

    Raises
    ------
    PenstockError
        There is no such level, or the file cannot be opened.
    """
    least = LEVELS.get(level.lower())
    if least is None:
        raise PenstockError(f"log level {level!r} is unknown", "use " + ", ".join(LEVELS))
    handler: logging.Handler
    try:
        handler = logging.StreamHandler(sys.stderr) if file is None else WatchedFileHandler(file, encoding="utf-8")
    except OSError as error:
        raise PenstockError(f"cannot write {file} ({error.strerror})", "give a path you may write") from None
    handler.setFormatter((JsonFormatter if json else TextFormatter)(secrets))
    root, own = logging.getLogger(), logging.getLogger("penstock")
    for old in [h for h in root.handlers if isinstance(h.formatter, _Formatter)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    own.setLevel(least)
    return handler


def _reason(text: str, status: Any) -> str:
    """An engine's complaint without what it may quote: of a 4xx only the kind of error that it names."""
    if not (isinstance(status, int) and 400 <= status < 500):
        return text
    kind = _KIND.search(text)
    return kind.group(1) if kind else "the engine refused it"


def _word(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return (
        text
        if text and text.isprintable() and not any(c in ' "=' for c in text)
        else msgspec.json.encode(text).decode()
    )
