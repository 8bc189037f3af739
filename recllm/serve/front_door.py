"""The gateway's front door, as ASGI: who may come in, how many at once, how large a body, and what is counted of them.

Requests enter; those that may be answered go on to the application, the others leave with a 401, 413 or 503. An error
has the form that OpenAI's client reads: {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

from starlette.requests import ClientDisconnect

from recllm.serve.metrics import Metrics

LOAD = ("/v1/recommend", "/v1/chat/completions", "/v1/completions")  # routes that count against --max-concurrency
ROUTES = (*LOAD, "/v1/models", "/health", "/ready", "/metrics")  # others are counted together
OPEN = ("/health", "/ready", "/metrics")  # answered without a key
CLIENT_GONE = 499  # in the metrics alone: nobody is there to read it
RETRY_AFTER_S = 1
RANK = "/recllm/rank"  # of vLLM's server, see rank_plugin.py

T = TypeVar("T")


class Limits(NamedTuple):
    """What a request may be."""

    body: int = 256 << 10  # bytes
    history: int = 1000  # items
    concurrency: int = 64  # requests of LOAD at once
    body_s: float = 30.0  # in which a body has to arrive
    answer_s: float = 600.0  # in which vLLM has to answer, or to go on


class Refused(Exception):
    """A request that gets no answer but this error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": status}}

    async def send(self, send: Any) -> None:
        """Answer with it."""
        body = json.dumps(self.document).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self.headers}
        coded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": coded})
        await send({"type": "http.response.body", "body": body})


def unavailable(why: str, retry_after_s: int = RETRY_AFTER_S) -> Refused:
    """503: try again."""
    headers = {"retry-after": str(retry_after_s)}
    return Refused(503, why, "service_unavailable", headers=headers)


def too_large(found: str, limit: int) -> Refused:
    """413."""
    why = f"body is {found} bytes, at most {limit} are expected: send fewer items or messages"
    return Refused(413, why, param="body", headers={"connection": "close"})


class FrontDoor:
    """Stands before an ASGI application.

    Args:
        app: the application.
        limits: body and concurrency.
        metrics: where requests are counted.
        api_key: that a request has to carry as a bearer token; None: none.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, api_key: str | None = None) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self._key = None if api_key is None else _digest(api_key.encode())
        self.in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_GONE

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, noting)
        except BaseException:
            status = 500 if status == CLIENT_GONE else status
            raise
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        path, counts = scope["path"], scope["path"] in LOAD
        try:
            self._check(path, counts, dict(scope["headers"]))
        except Refused as refused:
            await refused.send(send)
            return
        if not counts:
            await self.app(scope, receive, send)
            return
        self._count(1)
        try:
            await self.app(scope, receive, send)
        finally:
            self._count(-1)

    def _check(self, path: str, counts: bool, headers: dict[bytes, bytes]) -> None:
        if path not in OPEN and not self._may_enter(headers.get(b"authorization", b"")):
            raise Refused(
                401,
                "Authorization is missing or wrong, `Bearer KEY` with this server's key is expected",
                "authentication_error",
                headers={"www-authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.limits.body:
            raise too_large(length[:20].decode(), self.limits.body)
        if counts and self.in_flight >= self.limits.concurrency:
            self.metrics.saturated.inc()
            raise unavailable(f"{self.in_flight} requests are in work, which is this server's limit: try again later")

    def _may_enter(self, header: bytes) -> bool:
        """In constant time, whatever the length of what was sent."""
        if self._key is None:
            return True
        scheme, _, token = header.partition(b" ")
        return hmac.compare_digest(_digest(token.strip()), self._key) and scheme.lower() == b"bearer"

    def _count(self, by: int) -> None:
        self.in_flight += by
        self.metrics.in_flight.set(self.in_flight)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


async def while_connected(receive: Any, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it went.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
