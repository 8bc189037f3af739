"""The gateway: a small FastAPI application in front of vLLM's own server.

    POST /v1/recommend         a user's history → ranked items with their scores
    POST /v1/chat/completions  vLLM's, streams included; `user_history` in the body becomes the request's gate
    POST /v1/completions       the same
    GET  /v1/models            vLLM's
    GET  /health               200 while the gateway lives
    GET  /ready                200 while vLLM answers and the adapter is loaded, otherwise 503
    GET  /metrics              Prometheus

A request makes one hop to vLLM, over one pool of connections. What vLLM answers goes on as its bytes come; only a body
with `user_history` is written anew. A client that goes away takes its request to vLLM with it.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import httpx
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from recllm.errors import UserError
from recllm.infer.vllm_plugin.gates import GATE_WEIGHTS
from recllm.serve.adapter import ServedAdapter
from recllm.serve.fields import Entry, FieldError, Recommend, read_history, read_object, read_recommend
from recllm.serve.front_door import (
    CLIENT_GONE,
    RANK,
    FrontDoor,
    Limits,
    Refused,
    too_large,
    unavailable,
    while_connected,
)
from recllm.serve.gate_cache import GateCache
from recllm.serve.metrics import CONTENT_TYPE, Metrics

USER_HISTORY = "user_history"
STARTING_RETRY_S = 5
HEALTH_S = 5  # in which vLLM has to say that it lives
LARGE_BODY = 64 << 10  # bytes of JSON that take over a millisecond: read in a thread
MAX_LOGPROBS = 20
SHOWN_UNKNOWN = (20, 100)  # unknown items in a header, and characters of each
PASSED_ON = ("accept", "x-request-id", "traceparent", "tracestate")  # headers of a request that vLLM may see
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "date", "server", "proxy-connection")
)

T = TypeVar("T")


class Upstream:
    """vLLM's server, as the gateway sees it.

    Args:
        client: whose base_url is vLLM's.
        key: that vLLM asks for; None: none.
    """

    def __init__(self, client: httpx.AsyncClient, key: str | None = None) -> None:
        self.client = client
        self.headers = {"accept-encoding": "identity"} | ({} if key is None else {"authorization": f"Bearer {key}"})
        self.problem: str | None = "vLLM is starting"  # why no request can be answered; None: they can

    def check(self) -> None:
        """Refuse a request that cannot be answered now.

        Raises:
            Refused: 503.
        """
        if self.problem is not None:
            raise unavailable(self.problem, STARTING_RETRY_S)

    async def is_healthy(self) -> bool:
        """Whether vLLM says that its engine lives."""
        try:
            return (await self.client.get("/health", headers=self.headers, timeout=HEALTH_S)).status_code == 200
        except httpx.HTTPError:
            return False


class UserState(NamedTuple):
    """What a history gives a request."""

    weights: list[float] | None  # of the gate, flat; None: uniform
    num_read: int  # items that the gate reads


class Gateway:
    """The routes.

    Args:
        adapter: that is served.
        name: of the adapter's model in requests.
        upstream: vLLM.
        limits: of a request.
        metrics: that /metrics shows.
        cache: of gates.
    """

    def __init__(
        self,
        adapter: ServedAdapter,
        name: str,
        upstream: Upstream,
        limits: Limits,
        metrics: Metrics,
        cache: GateCache,
    ) -> None:
        self.adapter, self.name, self.upstream = adapter, name, upstream
        self.limits, self.metrics, self.cache = limits, metrics, cache
        # One thread: encoder and tokenizer are then never used twice at once
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recllm-encode")
        metrics.watch_cache(cache)
        metrics.watch("recllm_ready", "1 while vLLM can be asked", lambda: float(upstream.problem is None))

    # ---- probes ----

    async def health(self) -> Response:
        """The gateway lives."""
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        """vLLM answers, and the adapter is loaded."""
        self.upstream.check()
        if not await self.upstream.is_healthy():
            raise unavailable("vLLM does not answer", STARTING_RETRY_S)
        return JSONResponse({"status": "ready", "model": self.name})

    async def show_metrics(self) -> Response:
        """Prometheus' text."""
        return Response(self.metrics.text(), media_type=None, headers={"content-type": CONTENT_TYPE})

    # ---- OpenAI's routes ----

    async def models(self, request: Request) -> Response:
        """As vLLM lists them."""
        self.upstream.check()
        return Relayed(self._to_vllm("GET", request, None), self.upstream.client)

    async def complete(self, request: Request) -> Response:
        """Chat or completion; a body with `user_history` gets that user's gate."""
        self.upstream.check()
        body = await self._body(request)
        document = await self._read(body)
        check_logprobs(document)
        headers = {}
        if USER_HISTORY in document:
            state, unknown = await self._gate_of(document)
            headers = self._told(state, unknown)
            body = json.dumps(document).encode()
        return Relayed(self._to_vllm("POST", request, body), self.upstream.client, headers)

    async def _gate_of(self, document: dict[str, Any]) -> tuple[UserState, list[str]]:
        """Put the gate of `user_history` in its place, and say what of the history was unknown."""
        given, most = document.pop(USER_HISTORY), self.limits.history
        history = read_history(given, USER_HISTORY, most, self.adapter.actions)
        if self.adapter.shape is None:
            raise FieldError(
                USER_HISTORY, "given", "but this server's adapter is a plain LoRA without a gate: leave it out"
            )
        if document.setdefault("model", self.name) != self.name:
            found = json.dumps(document["model"])[:60]
            raise FieldError("model", found, f'with {USER_HISTORY} the adapter "{self.name}" is expected')
        extra = document.get("vllm_xargs")
        if extra is not None and not isinstance(extra, dict):
            raise FieldError("vllm_xargs", f"a {type(extra).__name__}", "an object is expected")
        if extra and GATE_WEIGHTS in extra:
            raise FieldError(USER_HISTORY, f"given beside vllm_xargs.{GATE_WEIGHTS}", "one of them is expected")
        items, unknown = self._look_up(history)
        state = await self._user_state(items, in_prompt=False)
        if state.weights is not None:
            document["vllm_xargs"] = {**(extra or {}), GATE_WEIGHTS: state.weights}
        self._count(state, unknown)
        return state, unknown

    def _told(self, state: UserState, unknown: list[str]) -> dict[str, str]:
        """What a chat's answer says of the history, in headers: its body is vLLM's."""
        told = {"x-recllm-gate": self._source(state), "x-recllm-gate-items": str(state.num_read)}
        if unknown:
            count, length = SHOWN_UNKNOWN
            told["x-recllm-unknown-count"] = str(len(unknown))
            names = json.dumps([name[:length] for name in unknown[:count]])
            told["x-recllm-unknown-items"] = names.replace("\x7f", "\\u007f")  # the one control that JSON leaves
        return told

    # ---- /v1/recommend ----

    async def recommend(self, request: Request) -> Response:
        """Rank the catalogue, or the candidates, for a history."""
        self.upstream.check()
        catalogue = self.adapter.catalogue
        if self.adapter.actions:
            raise Refused(
                404,
                "this server's adapter reads events, whose prompts the server does not write: ask "
                f"/v1/chat/completions, with {USER_HISTORY}",
                "not_found",
            )
        if catalogue is None or self.adapter.prompts is None:
            raise Refused(
                404, "this server's adapter was not trained on next_item: it has no recommendations", "not_found"
            )
        document = await self._read(await self._body(request))
        asked = read_recommend(document, self.limits.history)
        if document.get("model", self.name) != self.name:
            raise FieldError("model", json.dumps(document["model"])[:60], f'"{self.name}" is expected')
        items, unknown = self._look_up(asked.history)
        candidates, unknown_candidates = self._look_up(asked.candidates or [])
        if asked.candidates is not None and not candidates:
            raise FieldError(
                "candidates", f"a list of {len(asked.candidates)} unknown items", "at least 1 known is expected"
            )
        state = await self._user_state(items, in_prompt=True)
        prompt = await self._in_thread(self.adapter.prompt, items, asked.user, asked.user_text)
        self._count(state, unknown)
        ranking = await while_connected(request.receive, self._rank(asked, prompt, state, items, candidates))
        told = {"unknown_items": unknown} | (
            {} if asked.candidates is None else {"unknown_candidates": unknown_candidates}
        )
        return JSONResponse(
            {
                "object": "recommendation",
                "model": self.name,
                "items": [
                    {"item_id": catalogue.ids[item], "title": catalogue.texts[item], "score": score}
                    for item, score in zip(ranking["items"], ranking["scores"], strict=True)
                ],
                **told,
                "gate": {"source": self._source(state), "items": state.num_read, "reads": self._reads()},
                "width": None if asked.candidates is not None else asked.width,
            }
        )

    async def _rank(
        self, asked: Recommend, prompt: list[int], state: UserState, items: list[int], candidates: list[int]
    ) -> dict[str, Any]:
        """vLLM's ranking: item indices and scores, best first."""
        wanted: dict[str, Any] = {"prompt_token_ids": prompt, "gate_weights": state.weights, "k": asked.k}
        if asked.candidates is not None:
            wanted["candidates"] = candidates
        else:
            wanted |= {"width": asked.width, "excluded": sorted(set(items)) if asked.exclude_history else []}
        try:
            answer = await self.upstream.client.post(
                RANK, json=wanted, headers=self.upstream.headers, timeout=_timeout(self.limits)
            )
        except httpx.HTTPError as error:
            raise _no_answer(error) from None
        if answer.status_code == 400:
            raise Refused(400, _message(answer))
        if answer.status_code != 200:
            raise Refused(502, f"vLLM answered {answer.status_code}: {_message(answer)}", "upstream_error")
        found: dict[str, Any] = answer.json()
        return found

    # ---- what they share ----

    async def _body(self, request: Request) -> bytes:
        parts, size, limit = [], 0, self.limits.body
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large(f"over {limit}", limit)
                    parts.append(part)
        except TimeoutError:
            late = f"body has not arrived within {self.limits.body_s:g} s: send it at once"
            raise Refused(408, late, param="body", headers={"connection": "close"}) from None
        return b"".join(parts)

    async def _read(self, body: bytes) -> dict[str, Any]:
        return read_object(body) if len(body) < LARGE_BODY else await asyncio.to_thread(read_object, body)

    def _look_up(self, entries: Sequence[Entry]) -> tuple[list[int], list[str]]:
        """Items of a history, and the names of those that are unknown: cold start leaves them out.

        Of events their codes; an event with an unknown item is left out whole.
        """
        found = [(entry, self.adapter.find(entry)) for entry in entries]
        return [item for _, item in found if item is not None], [entry.name for entry, item in found if item is None]

    async def _user_state(self, items: list[int], in_prompt: bool) -> UserState:
        """The gate of a history; where nothing of it is read, the uniform one."""
        read = self.adapter.read(items, in_prompt)
        if not len(read):
            return UserState(None, 0)
        weights = self.cache.get(read)
        if weights is None:
            weights = await self._in_thread(self.adapter.weights, read)
            self.cache.put(read, weights)
        return UserState(weights, len(read))

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _count(self, state: UserState, unknown: list[str]) -> None:
        self.metrics.gates.labels(self._source(state)).inc()
        self.metrics.unknown_items.inc(len(unknown))

    def _source(self, state: UserState) -> str:
        """Where a request's gate comes from: history; uniform, which is the plain LoRA; none of an adapter without."""
        if self.adapter.shape is None:
            return "none"
        return "uniform" if state.weights is None else "history"

    def _reads(self) -> str | None:
        """history.gate of the recipe: what of a history the gate of /v1/recommend reads."""
        reading = self.adapter.reading
        if self.adapter.shape is None or reading is None:
            return None
        return "before_list" if reading.listed else "all"

    def _to_vllm(self, method: str, request: Request, body: bytes | None) -> httpx.Request:
        passed = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        headers = {**passed, **self.upstream.headers} | ({} if body is None else {"content-type": "application/json"})
        return self.upstream.client.build_request(
            method, request.url.path, content=body, headers=headers, timeout=_timeout(self.limits)
        )


class Relayed(Response):
    """vLLM's answer to a request, passed on as its bytes come.

    Args:
        request: that vLLM is sent.
        client: that sends it.
        headers: that are added to the answer's.
    """

    def __init__(
        self, request: httpx.Request, client: httpx.AsyncClient, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.request, self.client, self.added = request, client, dict(headers or {})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002  # ASGI's
        """Ask and answer, unless the client goes away."""
        with contextlib.suppress(ClientDisconnect):
            await while_connected(receive, self._relay(send))

    async def _relay(self, send: Any) -> None:
        try:
            answer = await self.client.send(self.request, stream=True)
        except httpx.HTTPError as error:
            raise _no_answer(error) from None
        try:
            await send({"type": "http.response.start", "status": answer.status_code, "headers": self._relayed(answer)})
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except httpx.HTTPError:  # vLLM broke off: so does the answer, which the client sees by its missing end
            return
        finally:
            await answer.aclose()

    def _relayed(self, answer: httpx.Response) -> list[tuple[bytes, bytes]]:
        kept = [(name.lower(), value) for name, value in answer.headers.raw if name.lower().decode() not in HOP_BY_HOP]
        return kept + [(name.encode(), value.encode("latin-1")) for name, value in self.added.items()]


def check_logprobs(document: Mapping[str, Any]) -> None:
    """Keep to OpenAI's bound: vLLM runs without one, because ranking needs whole vocabularies.

    Raises:
        FieldError: more, or all of them (−1).
    """
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        value = document.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 <= value <= MAX_LOGPROBS:
            raise FieldError(name, json.dumps(value)[:60], f"0 to {MAX_LOGPROBS} is expected")


def _timeout(limits: Limits) -> httpx.Timeout:
    return httpx.Timeout(limits.answer_s, connect=5)


def _no_answer(error: httpx.HTTPError) -> Refused:
    if isinstance(error, httpx.ReadTimeout):
        return Refused(504, "vLLM did not answer in time", "upstream_error")
    if isinstance(error, httpx.ConnectError):
        return unavailable("vLLM does not answer", STARTING_RETRY_S)
    return Refused(502, f"vLLM broke off ({type(error).__name__}): try again", "upstream_error")


def _message(answer: httpx.Response) -> str:
    """What an error of vLLM says."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:500]


# ---- the application ----


def create_app(
    adapter: ServedAdapter,
    name: str,
    upstream: Upstream,
    limits: Limits | None = None,
    api_key: str | None = None,
    cache: GateCache | None = None,
) -> FrontDoor:
    """The ASGI application of a server."""
    limits = limits or Limits()
    metrics = Metrics(limits.concurrency)
    gateway = Gateway(adapter, name, upstream, limits, metrics, GateCache() if cache is None else cache)
    app = FastAPI(title="recllm", openapi_url=None)
    for path, route in (("/health", gateway.health), ("/ready", gateway.ready), ("/metrics", gateway.show_metrics)):
        app.add_api_route(path, route, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", gateway.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/recommend", gateway.recommend, methods=["POST"], response_model=None)
    for path in ("/v1/chat/completions", "/v1/completions"):
        app.add_api_route(path, gateway.complete, methods=["POST"], response_model=None)
    for kind, answer in _ERRORS.items():
        app.add_exception_handler(kind, answer)
    return FrontDoor(app, limits, metrics, api_key)


def _error(refused: Refused) -> Response:
    return JSONResponse(refused.document, refused.status, refused.headers)


async def _on_refused(_: Request, error: Any) -> Response:
    return _error(error)


async def _on_field(_: Request, error: Any) -> Response:
    return _error(Refused(400, str(error), param=error.field))


async def _on_user_error(_: Request, error: Any) -> Response:
    return _error(Refused(400, str(error)))


async def _on_gone(_: Request, __: Any) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_http(request: Request, error: Any) -> Response:
    what = {404: "is no route of this server", 405: f"does not take {request.method}"}.get(
        error.status_code, error.detail
    )
    return _error(Refused(error.status_code, f"{request.url.path} {what}", headers=error.headers))


async def _on_any(_: Request, error: Any) -> Response:
    return _error(Refused(500, f"an error of this server ({type(error).__name__}): see its log", "server_error"))


_ERRORS: dict[Any, Any] = {
    Refused: _on_refused,
    FieldError: _on_field,
    UserError: _on_user_error,
    ClientDisconnect: _on_gone,
    HTTPException: _on_http,
    Exception: _on_any,
}
