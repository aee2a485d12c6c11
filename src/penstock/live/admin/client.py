"""The other end of the admin API, for ``penstock ctl``: plain calls that wait, errors as one line with a remedy."""

from __future__ import annotations

import http.client
import ssl
from typing import TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.admin.answers import Problem
from penstock.live.admin.state import key_of, the_one

T = TypeVar("T")
ANSWER_S = 15.0
"""How long an order that does not wait for anything may take; attaching probes a server."""


class AdminClient:
    """Calls the admin API at ``url`` with ``key``.

    Raises
    ------
    PenstockError
        From every method: it cannot be reached, the key is wrong, or the order was refused.
    """

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise PenstockError(f"{url!r} is no address of an admin API", "give --admin http://HOST:PORT")
        self.url = url.rstrip("/")
        self._parts = parts
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def get(self, kind: type[T], *path: str | int, **query: str | int | None) -> T:
        """Read something."""
        return self._call("GET", _path(path, query), kind, None, ANSWER_S)

    def post(self, kind: type[T], order: object, *path: str | int, wait_s: float = 0.0) -> T:
        """Order something; ``wait_s`` is how long the answer is held back at most."""
        return self._call("POST", _path(path, {}), kind, msgspec.json.encode(order), ANSWER_S + wait_s)

    def delete(self, kind: type[T], *path: str | int, **query: str | int | None) -> T:
        """Remove something."""
        return self._call("DELETE", _path(path, query), kind, None, ANSWER_S)

    def _call(self, method: str, path: str, kind: type[T], body: bytes | None, timeout_s: float) -> T:
        try:
            status, content = self._exchange(method, path, body, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
            raise PenstockError(
                f"cannot reach {self.url} ({reason})", "is penstock serve running? give --admin URL"
            ) from None
        try:
            if status == 200:
                return msgspec.json.decode(content, type=kind)
            problem = msgspec.json.decode(content, type=Problem)
        except msgspec.MsgspecError:
            raise PenstockError(
                f"{self.url} is no admin API of this release (it answers {status})",
                "give --admin the admin URL that penstock serve printed, not the gateway's",
            ) from None
        raise PenstockError(problem.error, problem.remedy)

    def _exchange(self, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        host, port = self._parts.hostname or "", self._parts.port
        connection: http.client.HTTPConnection
        if self._parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=timeout_s, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        try:
            connection.request(method, path, body, self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def connect(url: str | None, key: str | None) -> AdminClient:
    """The admin API that is meant: as given, else the only one of this machine.

    Raises
    ------
    PenstockError
        None or several run here, or its key is not known.
    """
    if url is None:
        found = the_one()
        url, known = found.url, found.key or None
    else:
        known = key_of(url.rstrip("/"))
    key = key or known
    if not key:
        raise PenstockError(f"the key of {url} is not known", "give --key KEY or set PENSTOCK_ADMIN_KEY")
    if not key.isascii() or not key.isprintable():
        raise PenstockError("the admin key cannot be sent in a header", "give --key as penstock serve has it")
    return AdminClient(url, key)


def _path(parts: tuple[str | int, ...], query: dict[str, str | int | None]) -> str:
    path = "/" + "/".join(quote(str(part), safe="") for part in parts)
    kept = {key: value for key, value in query.items() if value is not None}
    return path + (f"?{urlencode(kept)}" if kept else "")
