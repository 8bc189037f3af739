"""A stand-in for vLLM's server, and how an application is run behind a socket. Imports nothing heavy.

python stand_in.py PORT DELAY_S        as a process of its own
"""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "of-the-stub"


class Stub:
    """A server that stands in for vLLM's: notes what it is asked, and answers at once, slowly or never."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.aborted = 0
        self.delay_s = 0.0
        self.status = 200
        self.healthy = True
        self.parts = ["data: a\n\n", "data: b\n\n"]
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.chat, methods=["POST"]),
            Route("/recllm/rank", self.rank, methods=["GET", "POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def health(self, _: Request) -> Response:
        return Response(status_code=200 if self.healthy else 503)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "recllm"}]})

    async def chat(self, request: Request) -> Response:
        document = await self._note(request)
        if document.get("stream"):
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        await self._wait(request)
        return JSONResponse({"object": "chat.completion", "choices": []}, self.status, {"x-request-id": "its-own"})

    async def rank(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"titles": 39})
        document = await self._note(request)
        await self._wait(request)
        if self.status != 200:
            return JSONResponse({"error": {"message": "not today"}}, self.status)
        items = document.get("candidates") or list(range(document["k"]))
        items = items[: document["k"]]
        return JSONResponse({"items": items, "scores": [-float(place) for place in range(len(items))]})

    async def _note(self, request: Request) -> dict[str, Any]:
        document: dict[str, Any] = await request.json()
        print(f"asked {request.url.path}", flush=True)
        self.asked.append(document | {"_key": request.headers.get("authorization"), "_path": request.url.path})
        return document

    async def _wait(self, request: Request) -> None:
        until = time.monotonic() + self.delay_s
        while time.monotonic() < until:
            await asyncio.sleep(min(0.05, self.delay_s))
            if await request.is_disconnected():
                self.aborted += 1
                return

    async def _stream(self) -> Any:
        try:
            for part in self.parts:
                yield part.encode()
                await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.aborted += 1
            raise


@contextlib.contextmanager
def running(app: Any, **settings: Any) -> Any:
    """An ASGI application behind a real socket, in a thread; yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", **settings))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(20)


def error_of(answer: Any) -> dict[str, Any]:
    """The error of an answer; asserts its form."""
    document = json.loads(answer.content)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["code"] == answer.status_code
    return dict(document["error"])


if __name__ == "__main__":
    stand_in = Stub()
    stand_in.delay_s = float(sys.argv[2])
    uvicorn.run(stand_in.app, host="127.0.0.1", port=int(sys.argv[1]), log_level="info")
