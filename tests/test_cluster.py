"""Joining a Ray cluster: what is refused before any work, and how fast."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import recllm
from recllm import cluster
from recllm.data import object_store
from recllm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def connect() -> None:
    with cluster.connected("recllm convert --engine ray"):
        pass


def test_without_ray_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'recllm convert --engine ray needs ray: run `pip install "recllm\[ray\]"`'):
        connect()


class TestAddress:
    @pytest.fixture(autouse=True)
    def _with_ray(self):
        ray = pytest.importorskip("ray", reason="needs the extra ray")
        assert not ray.is_initialized()

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("ray://head:10001", "is a Ray Client address"),
            ("head", "expected HOST:PORT"),
            ("head:port", "expected HOST:PORT"),
        ],
    )
    def test_what_is_no_address_is_refused(self, monkeypatch, address, message):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"RAY_ADDRESS={address}.*{message}"):
            connect()

    def test_nobody_at_the_address(self, monkeypatch):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and nobody listens
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            monkeypatch.setenv("RAY_ADDRESS", address)
            began = time.monotonic()
            with pytest.raises(UserError, match=f"no Ray cluster at RAY_ADDRESS={address}.*ray start --head"):
                connect()
        assert time.monotonic() - began < 5

    def test_something_else_at_the_address(self, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                line, _ = server.accept()
                with line:
                    line.recv(1000)
                    line.sendall(b"HTTP/1.0 400 Bad request\r\n\r\n")

            threading.Thread(target=answer, daemon=True).start()
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
            with pytest.raises(UserError, match="something that is not Ray answers there"):
                connect()

    def test_a_server_that_says_nothing(self, monkeypatch):
        monkeypatch.setattr(cluster, "PATIENCE_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
            with pytest.raises(UserError, match=r"no Ray cluster at .*timed out"):
                connect()

    def test_nobody_knocks_where_ray_speaks_tls(self, monkeypatch):
        class Refusing:
            def init(self, **_):
                raise ConnectionError("refused by Ray itself")

        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(UserError, match="no Ray cluster at RAY_ADDRESS"):
            cluster._connect(Refusing(), "recllm", None)
        monkeypatch.setenv("RAY_USE_TLS", "1")
        with pytest.raises(UserError, match=r"that this process can join.*refused by Ray itself"):
            cluster._connect(Refusing(), "recllm", None)


class TwoNodesOfOneName:
    """As much of Ray as asks nodes: two have the same host name, one of them runs another recllm."""

    def __init__(self, exceptions):
        self.exceptions = exceptions
        self.strategy = None

    def nodes(self):
        return [{"NodeID": node, "NodeManagerHostname": "localhost", "Alive": True} for node in ("aa" * 28, "bb" * 28)]

    def remote(self, *arguments):
        return self if callable(arguments[0]) else self.strategy.node_id

    def options(self, scheduling_strategy, **_):
        self.strategy = scheduling_strategy
        return self

    def get(self, node, timeout):
        return (cluster.Identity("9.8.7", "") if node == "aa" * 28 else cluster.identity()), None


def test_two_nodes_of_one_host_name_are_both_asked():
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    with pytest.raises(UserError, match=r"node localhost runs recllm 9\.8\.7"):
        cluster.check_nodes(TwoNodesOfOneName(ray.exceptions), "recllm")


NODES = """
import os, sys
from pathlib import Path
import ray
from recllm import cluster
from recllm.errors import UserError
workers = {"env_vars": {"PYTHONPATH": sys.argv[1]}}
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=workers)
os.chdir(sys.argv[3])
try:
    cluster.check_nodes(ray, "recllm convert --engine ray", Path(sys.argv[2]))
except UserError as error:
    print(error)
else:
    print("all nodes are fine")
"""


def answer_of_nodes(workers_path: Path, folder: Path | str, cwd: Path) -> str:
    """What the check says of a Ray whose workers look for packages in `workers_path`; the driver is then in `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", NODES, str(workers_path), str(folder), str(cwd)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()[-1]


def test_a_task_for_a_driver_with_another_recllm_is_refused():
    cluster.check_here(cluster.identity())
    with pytest.raises(UserError, match=f"the driver runs recllm 9.8.7.*node {socket.gethostname()} runs recllm"):
        cluster.check_here(cluster.Identity("9.8.7", ""))


@pytest.mark.parametrize("whose", ["started here", "of the caller"])
def test_a_task_has_one_thread_and_the_caller_keeps_theirs(whose, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("POLARS_MAX_THREADS", raising=False)

    def threads() -> int:
        import polars

        return polars.thread_pool_size()

    if whose == "of the caller":
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with cluster.connected("recllm convert --engine ray", cores=2):
            asked = ray.remote(threads)
            found = ray.get([asked.options(**cluster.task_options()).remote() for _ in range(4)])
    finally:
        ray.shutdown()
    assert found == [1] * 4
    assert "POLARS_MAX_THREADS" not in os.environ


class TestNodes:
    @pytest.fixture(autouse=True)
    def _with_ray(self):
        pytest.importorskip("ray", reason="needs the extra ray")

    def test_another_version_on_a_worker_is_refused_and_both_are_named(self, tmp_path):
        shutil.copytree(ROOT / "recllm", tmp_path / "recllm", ignore=shutil.ignore_patterns("__pycache__"))
        package = tmp_path / "recllm" / "__init__.py"
        package.write_text(package.read_text().replace(f'"{recllm.__version__}"', '"9.8.7"'))
        said = answer_of_nodes(tmp_path, tmp_path, tmp_path)
        assert f"the driver runs recllm {cluster.identity()}" in said
        assert f"node {socket.gethostname()} runs recllm 9.8.7 (sources " in said

    def test_the_same_version_of_other_sources_is_refused(self, tmp_path):
        shutil.copytree(ROOT / "recllm", tmp_path / "recllm", ignore=shutil.ignore_patterns("__pycache__"))
        with (tmp_path / "recllm" / "schema.py").open("a") as module:
            module.write("# changed\n")
        said = answer_of_nodes(tmp_path, tmp_path, tmp_path)
        assert said.count(f"recllm {recllm.__version__} (sources ") == 2

    def test_a_folder_that_a_node_does_not_see(self, tmp_path):
        # every process has another /proc/self/cwd: the driver's holds the folder, the workers' does not
        (tmp_path / "out").mkdir()
        said = answer_of_nodes(ROOT, "/proc/self/cwd/out", tmp_path)
        assert "does not see /proc/self/cwd/out" in said
        assert list((tmp_path / "out").iterdir()) == []


class TestObjectStore:
    def test_an_object_is_copied_once_and_given_back(self, tmp_path):
        (tmp_path / "log.csv.gz").write_bytes(b"content")
        url = f"file://{tmp_path}/log.csv.gz"
        copy = object_store.fetch(url)
        assert (copy.name, copy.read_bytes()) == ("log.csv.gz", b"content")
        assert object_store.fetch(url) == copy
        object_store.forget(url)
        assert not copy.parent.exists()

    def test_fsspec_reads_what_pyarrow_does_not(self):
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").pipe("/logs/a.csv", b"one")
        assert object_store.fetch("memory://logs/a.csv").read_bytes() == b"one"
        before = object_store.version("memory://logs/a.csv")
        object_store.forget("memory://logs/a.csv")
        fsspec.filesystem("memory").pipe("/logs/a.csv", b"three")
        assert object_store.version("memory://logs/a.csv") != before

    def test_what_a_killed_process_left_goes_before_the_next_copy(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with subprocess.Popen(["true"]) as dead:
            pass
        left, in_use = (tmp_path / f"{object_store._PREFIX}{process}-x" for process in (dead.pid, os.getppid()))
        for folder in (left, in_use):
            folder.mkdir()
            (folder / "log.csv").write_text("content")
        (tmp_path / "log.csv").write_text("content")
        copy = object_store.fetch(f"file://{tmp_path}/log.csv")
        assert not left.exists()
        assert in_use.exists()
        object_store.forget_all()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["log.csv", in_use.name])
        assert not copy.exists()

    @pytest.mark.parametrize("url", ["memory://logs/none.csv", "file:///no/such/file.csv", "file:///"])
    def test_no_such_object(self, url):
        for ask in (object_store.fetch, object_store.version):
            with pytest.raises(UserError, match=f"{url}: is (not there|a folder), a file was expected"):
                ask(url)

    def test_no_credentials_or_no_store(self):
        url = "s3://logs/a.parquet?region=us-east-1&endpoint_override=127.0.0.1:9&scheme=http"
        began = time.monotonic()
        with pytest.raises(UserError, match=r"s3://logs/a.parquet.*cannot be read.*AWS_ACCESS_KEY_ID") as raised:
            object_store.fetch(url)
        assert socket.gethostname() in str(raised.value)
        assert time.monotonic() - began < 30

    def test_an_unknown_scheme(self):
        with pytest.raises(UserError, match=r"nostore://a/b: cannot be read \(Protocol not known: nostore"):
            object_store.fetch("nostore://a/b")
