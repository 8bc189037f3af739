"""Ray, for the verbs that run on it: connecting, one recllm on every node, and errors as the user should see them.

`RAY_ADDRESS` enters (unset: a Ray of this machine alone, with the cores that this process may use); the connected
module `ray` leaves. Ray is imported here and nowhere before it is asked for.

    with cluster.connected("recllm convert --engine ray") as ray, cluster.own_errors():
        ...
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import platform
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import recllm
from recllm.errors import UserError

ADDRESS = "RAY_ADDRESS"
MOST_LOST = 5  # processes that may be lost over one task, or one shard; Ray itself would go on for ever
PATIENCE_S = 5.0  # for the first sign of life of a cluster
NODE_PATIENCE_S = 60.0  # for every node to start one process and import recllm in it
TASK_ENVIRONMENT = {"POLARS_MAX_THREADS": "1"}  # a task has one core; Polars counts its threads when it is imported
_RAY_DATA_NOTE = "Failed to apply UDF transform"  # begins what Ray Data appends to what a function raised
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_started_here: ContextVar[bool] = ContextVar("_started_here", default=False)  # whether the Ray connected to was
# Ray's head speaks gRPC: a server of HTTP/2 answers this preface and empty SETTINGS frame (RFC 9113, 3.4) by SETTINGS
_HTTP2_HELLO, _HTTP2_SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"\x04"


class Identity(NamedTuple):
    """Which recllm a process runs."""

    version: str
    sources: str  # sha256 of the package's source files: a checkout may be newer than its version

    def __str__(self) -> str:
        return f"{self.version} (sources {self.sources[:12]})"


@cache
def identity() -> Identity:
    """Version and sources of the recllm that this process has imported."""
    folder, digest = Path(recllm.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return Identity(recllm.__version__, digest.hexdigest())


@contextlib.contextmanager
def connected(what: str, folder: Path | None = None, cores: int | None = None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster on whose nodes the same recllm runs.

    A process that is already connected stays so, and its connection is used; otherwise the connection ends with the
    block, and a Ray that was started for it ends too.

    Args:
        what: who asks, for messages: "recllm convert --engine ray".
        folder: that every node must see under the same path (a shared file system); None: none.
        cores: of a Ray that is started here; None: those that this process may use. GPUs are found by Ray.

    Raises:
        UserError: Ray is not installed; no cluster at RAY_ADDRESS (within seconds); a Ray of another version there; a
            node with another recllm, without recllm, or that does not see `folder`. Names both sides.
    """
    ray = _import(what)
    ours = not ray.is_initialized()
    local = _connect(ray, what, cores) if ours else False
    token = _started_here.set(local)
    try:
        check_nodes(ray, what, folder)
        yield ray
    finally:
        _started_here.reset(token)
        if ours:
            ray.shutdown()


def _import(what: str) -> Any:
    if importlib.util.find_spec("ray") is None:
        raise UserError(f'{what} needs ray: run `pip install "recllm[ray]"`')
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(MOST_LOST))  # those that Ray's memory monitor kills count apart
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without GPU keeps what it sees
    import ray

    return ray


def _connect(ray: Any, what: str, cores: int | None) -> bool:
    """Connected to the cluster at RAY_ADDRESS, or to a Ray that is started here: whether it is the latter."""
    address = os.environ.get(ADDRESS, "").strip()
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address in ("", "local"):
        with _environment(TASK_ENVIRONMENT):  # its processes inherit it
            ray.init(address="local", num_cpus=cores or _available_cores(), include_dashboard=False, **quiet)
        return True
    if address.startswith("ray://"):
        raise UserError(
            f"{what}: {ADDRESS}={address} is a Ray Client address, whose driver has no files in common with the "
            "cluster: run recllm on a node of the cluster, with RAY_ADDRESS=auto or HOST:6379"
        )
    if address != "auto" and os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):  # else none answers us
        _find(address, what)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{what}: no Ray cluster that this process can join at {ADDRESS}={address} "
            f"({_first_line(error)}): start one with `ray start --head`, join it from this machine with "
            f"`ray start --address=HOST:6379`, or unset {ADDRESS} for a Ray of this machine alone"
        ) from None
    return False


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables of the environment that processes started in the block inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _find(address: str, what: str) -> None:
    """Knock at the address: Ray itself would wait for minutes, and for ever where something else answers."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise UserError(f"{what}: {ADDRESS}={address} is no address: expected HOST:PORT, auto or local")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE_S) as line:
            line.sendall(_HTTP2_HELLO)
            if line.recv(9)[3:4] != _HTTP2_SETTINGS:
                raise ConnectionError("something that is not Ray answers there")
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{what}: no Ray cluster at {ADDRESS}={address} ({error}): start one with `ray start --head`, mend the "
            f"address, or unset {ADDRESS} for a Ray of this machine alone"
        ) from None


def check_nodes(ray: Any, what: str, folder: Path | None = None) -> None:
    """Ask every node which recllm it runs, and whether it sees `folder`.

    Raises:
        UserError: another recllm than this process's, none, or a node that does not see the folder.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark, token = None, uuid.uuid4().hex
    if folder is not None:
        mark = Path(folder) / f".seen-by-{token}"
        mark.write_text(token)
    try:
        nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        asked = {
            node: ray.remote(_answer())
            .options(num_cpus=0, max_retries=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(str(mark) if mark else None)
            for node in nodes
        }
        for node, answer in asked.items():  # host names may occur twice
            _judge(ray, what, nodes[node], answer, token, folder)
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)


def _answer() -> Any:
    """A function that Ray sends by value: it must run where there is another recllm, or none."""

    def answer(mark: str | None) -> tuple[Any, str | None]:
        seen = None
        if mark is not None:
            try:
                with open(mark) as file:
                    seen = file.read()
            except OSError as error:
                seen = str(error)
        try:
            from recllm import __version__

            try:
                from recllm.cluster import identity

                return tuple(identity()), seen
            except ImportError:  # a recllm that is older than this module
                return (__version__, ""), seen
        except ImportError as error:
            return str(error), seen

    return answer


def task_options() -> dict[str, Any]:
    """How Ray runs a task of ours: on one core, and again a bounded number of times where its process is lost."""
    options: dict[str, Any] = {"num_cpus": 1, "max_retries": MOST_LOST}
    if not _started_here.get():  # an environment of their own costs tasks the processes that Ray has ready
        options["runtime_env"] = {"env_vars": TASK_ENVIRONMENT}
    return options


def as_they_end(ray: Any, tasks: Sequence[Any]) -> Iterator[Any]:
    """What tasks give, in the order in which they end.

    When one raises, or nobody asks for the next, those under way are interrupted and waited for, and killed where that
    does not help: none writes any more.
    """
    waiting = list(tasks)
    try:
        while waiting:
            ended, waiting = ray.wait(waiting)
            yield from ray.get(ended)
    finally:
        with contextlib.suppress(Exception):  # of a cluster that is gone, say; what ended the loop is told of
            for force in (False, True):
                for task in waiting:
                    ray.cancel(task, force=force)
                if waiting:
                    _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=PATIENCE_S)


def check_here(driver: Identity) -> None:
    """In a task: refuse to work for a driver with another recllm, on a node that joined after `check_nodes` too.

    Raises:
        UserError: the versions differ; names both.
    """
    if Identity(*driver) != identity():
        raise _other(Identity(*driver), platform.node(), identity())


def _other(driver: Identity, node: str, theirs: Identity) -> UserError:
    return UserError(f"the driver runs recllm {driver}, node {node} runs recllm {theirs}: install the same one on all")


def _judge(ray: Any, what: str, name: str, answer: Any, token: str, folder: Path | None) -> None:
    try:
        theirs, seen = ray.get(answer, timeout=NODE_PATIENCE_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise UserError(f"{what}: node {name} runs no task ({_first_line(error)}): mend it or take it away") from None
    if isinstance(theirs, str):
        raise UserError(f"{what}: node {name} has no recllm ({theirs}): install {identity().version} there")
    if Identity(*theirs) != identity():
        raise UserError(f"{what}: {_other(identity(), name, Identity(*theirs))}")
    if folder is not None and seen != token:
        raise UserError(
            f"{what}: node {name} does not see {folder} ({seen}): give an output on a file system that all nodes share"
        )


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """What a task raised, as if it had been raised here: UserError and a full disk; a lost cluster is a UserError.

    Other errors of a task are defects and stay as Ray wraps them, with their traceback. Ray Data hides what a function
    raised unless DataContext.raise_original_map_exception is set.
    """
    ray = _import("this")
    exceptions = ray.exceptions
    lost = (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.ObjectLostError,
        exceptions.LocalRayletDiedError,
    )
    try:
        yield
    except Exception as error:  # Ray wraps whatever a task raised; what is not ours is raised again below
        own = _own(error)
        if own is not None:
            raise own from None
        full = (exceptions.OutOfDiskError, exceptions.ObjectStoreFullError)
        if any(isinstance(one, full) for one in _chain(error)):
            raise OSError(errno.ENOSPC, f"Ray's object store has no room to spill to: {_first_line(error)}") from None
        if any(isinstance(one, lost) for one in _chain(error)):
            raise UserError(
                f"a process or node of the Ray cluster was lost too often ({_first_line(error)}), most likely for want "
                "of memory: give each task more of it, or take fewer at once"
            ) from None
        raise


def _own(error: BaseException) -> Exception | None:
    """The UserError, or the error of a full disk, that lies at the bottom of Ray's wrappings."""
    for one in reversed(_chain(error)):
        if isinstance(one, UserError) and not hasattr(one, "traceback_str"):
            return type(one)(str(one).partition(_RAY_DATA_NOTE)[0].rstrip())
        if isinstance(one, OSError) and one.errno in _DISK_FULL:
            named = [one.filename] if one.filename and not str(one.filename).startswith(_RAY_DATA_NOTE) else []
            return OSError(one.errno, one.strerror or os.strerror(one.errno), *named)
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and all that it says it comes from; Ray's wrappings keep theirs in `cause`."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return found


def _available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
