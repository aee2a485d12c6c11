"""HTTP/1.1 on raw asyncio protocols: what the gateway, the emulated engine and the load generator stand on."""

from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Call, Head, HttpFault, Limits, Request, Response, Sink
from penstock.live.http.server import Handler, HttpServer, Reply
from penstock.live.http.sse import SseReader

__all__ = [
    "Call",
    "Handler",
    "Head",
    "HttpClient",
    "HttpFault",
    "HttpServer",
    "Limits",
    "Reply",
    "Request",
    "Response",
    "Sink",
    "SseReader",
]
