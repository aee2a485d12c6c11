"""An OpenAI-compatible server as a client addresses it, and what it says about itself."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.http.client import HttpClient
from penstock.live.http.messages import HttpFault, Response
from penstock.live.load.chunks import complaint

Kind = Literal["completions", "chat"]
PATHS: dict[Kind, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class Endpoint(msgspec.Struct, frozen=True):
    """Where requests go: ``origin`` (scheme, host, port), a path ``prefix`` if the API is not at the root, headers."""

    origin: str
    prefix: str = ""
    headers: dict[str, str] = {}
    kind: Kind = "completions"

    @property
    def path(self) -> str:
        """Of generation requests."""
        return self.prefix + PATHS[self.kind]

    @property
    def name(self) -> str:
        """Short name, for tables."""
        return self.origin.partition("://")[2] + self.prefix


class Served(msgspec.Struct, frozen=True):
    """A model that the server offers. ``max_model_len`` bounds prompt and output tokens together; None if not said."""

    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[Served] = []


def endpoint(url: str, api_key: str | None = None, kind: str = "completions") -> Endpoint:
    """The endpoint at ``url``, such as ``http://127.0.0.1:8000`` (a ``/v1`` at its end is taken as said).

    Raises
    ------
    PenstockError
        The URL, key or kind is malformed.
    """
    if kind not in PATHS:
        raise PenstockError(f"endpoint {kind!r} is unknown", "give completions or chat")
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in ("http", "https") or parts.query or parts.username is not None:
        raise PenstockError(f"--url {url!r} is not the address of a server", "give one like http://127.0.0.1:8000")
    place = f"[{host}]" if ":" in host else host
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    headers = {"Content-Type": "application/json", "User-Agent": "penstock-bench"}
    if api_key:
        if not (api_key.isascii() and api_key.isprintable()):
            raise PenstockError("the API key has characters that no header can hold", "give the key as it was issued")
        headers["Authorization"] = f"Bearer {api_key}"
    origin = f"{parts.scheme}://{place}" + ("" if port is None else f":{port}")
    return Endpoint(origin, prefix, headers, "chat" if kind == "chat" else "completions")


async def served_model(client: HttpClient, at: Endpoint, wanted: str | None = None) -> Served:
    """The model to ask for: ``wanted``, or the first that the server lists.

    A server without ``/v1/models`` (404, 405) needs ``wanted`` and says nothing about lengths.

    Raises
    ------
    PenstockError
        The server cannot be reached, refuses the key, or does not have the model.
    """
    response = await ask(client, at, "GET", at.prefix + "/v1/models")
    if response.status in (404, 405, 501):
        if wanted is None:
            raise PenstockError(f"{at.origin} does not list its models", "name one with --model")
        return Served(wanted)
    if response.status != 200:
        raise refused(at, response)
    try:
        models = msgspec.json.decode(response.body, type=_Models).data
    except msgspec.MsgspecError:
        raise PenstockError(f"{at.origin}/v1/models is no OpenAI API", "give the address of an API server") from None
    if wanted is None:
        if not models:
            raise PenstockError(f"{at.origin} serves no model", "load one, or name it with --model")
        return models[0]
    for model in models:
        if model.id == wanted:
            return model
    known = ", ".join(model.id for model in models[:8]) or "none"
    raise PenstockError(f"{at.origin} has no model {wanted!r}", f"it serves {known}")


async def ask(
    client: HttpClient, at: Endpoint, method: str, path: str, content: Any = None, timeout_s: float = 120.0
) -> Response:
    """One whole answer; raises PenstockError where there is none."""
    body = b"" if content is None else msgspec.json.encode(content)
    try:
        return await client.fetch(at.origin, method, path, body, at.headers, timeout_s)
    except HttpFault as fault:
        raise PenstockError(f"{at.origin} does not answer ({fault.reason})", "start the server or mend --url") from None


def refused(at: Endpoint, response: Response) -> PenstockError:
    """The error for a status that is not 200."""
    said = complaint(response.body)
    remedies = {400: "check --model and --vocab", 401: "give --api-key", 403: "give another --api-key"}
    remedy = remedies.get(response.status, "see the server's log")
    return PenstockError(f"{at.origin} answers {response.status}: {said or 'nothing more'}", remedy)
