"""Replicas under Ray with engines that add numbers: who is asked what, how much at once, what deaths and hangs cost.

Ray and the processes are real, the engines are not; tests/evaluate/test_vllm_evaluation.py has them with vLLM.
"""

import ctypes
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recllm import cluster
from recllm.errors import UserError
from recllm.infer import replicas
from recllm.infer.replicas import IN_FLIGHT, RESTARTS, Replica, Replicas, chunk_size, cores_each

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'"
)


class Adding:
    """An engine whose prompts are numbers. Every call leaves a file in `folder`: its process, and its prompts."""

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        self.folder, self.adapter = folder, adapter

    def add(self, prompts: list[int], to: int = 0) -> list[int]:
        """prompts + to; one that is a process's number waits in that process for a file named `go`."""
        begun = self.folder / f"begun {os.getpid()} {'-'.join(map(str, prompts))} {time.monotonic_ns()}"
        begun.touch()
        while (self.folder / f"stop {os.getpid()}").exists() and not (self.folder / "go").exists():
            time.sleep(0.02)
        (self.folder / begun.name.replace("begun", "ended")).touch()
        return [prompt + to for prompt in prompts]

    def refuse(self, prompts: list[int]) -> list[int]:
        """What the user can mend, or a defect."""
        if prompts == [0]:
            raise UserError("prompt 0 has 0 answers: give it some")
        raise ValueError(f"prompts {prompts}")

    def lose(self, prompts: list[int]) -> list[int]:
        """One answer too few."""
        return prompts[1:]

    def doze(self, prompts: list[int]) -> list[int]:
        """A while."""
        time.sleep(0.6)
        return prompts

    def die(self, prompts: list[int]) -> list[int]:
        """Every time."""
        os.kill(os.getpid(), signal.SIGKILL)
        return prompts

    def hang(self, prompts: list[int]) -> list[int]:
        """The first process that is asked sleeps in C code and holds the interpreter's lock; others answer."""
        (self.folder / f"hung {os.getpid()}").touch()
        try:
            (self.folder / "first").touch(exist_ok=False)  # one of two that come at once
        except FileExistsError:
            if prompts != [0]:
                return prompts
        ctypes.PyDLL(None).sleep(1000)
        return prompts

    def environment(self, prompts: list[int]) -> list[tuple[Path | None, str, str]]:
        """The adapter, and what vLLM reads."""
        names = "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"
        return [(self.adapter, *(os.environ[name] for name in names)) for _ in prompts]


def start(folder: Path) -> Callable[[Path | None], Adding]:
    """What a replica starts with."""
    return partial(Adding, folder)


def refusing() -> Callable[[Path | None], Adding]:
    """A start that cannot be."""
    raise UserError("vLLM is not here: install it")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray of two cores; this module's classes travel by value, as no other process could import them."""
    with cluster.connected("the test", cores=2) as module:
        module.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield module


@pytest.fixture
def two(ray, tmp_path) -> Iterator[Replicas]:
    """Two replicas, a prompt a chunk."""
    made = Replicas(partial(start, tmp_path), 2, chunk=1)
    yield made
    made.close()


def calls(folder: Path, what: str) -> list[tuple[int, str]]:
    """(process, prompts) of each call."""
    found = [path.name.split() for path in folder.glob(f"{what} *")]
    return [(int(process), prompts) for _, process, prompts, _ in found]


def chunks(count: int) -> list[dict[str, Any]]:
    return [{"prompts": [number]} for number in range(count)]


def test_answers_come_in_order_from_both_and_each_chunk_is_asked_once(two, tmp_path):
    answers = two.ask(None, "add", chunks(20), {"to": 100})
    assert answers == [[100 + number] for number in range(20)]
    asked = calls(tmp_path, "ended")
    assert sorted(prompts for _, prompts in asked) == sorted(map(str, range(20)))
    assert {process for process, _ in asked} == {place.pid for place in two.places}
    assert len({place.pid for place in two.places}) == 2
    assert two.ask(None, "add", []) == []
    # each has a core of the two, and vLLM's engine would be in the actor's own process
    adapter = tmp_path / "adapter"
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    assert two.ask(adapter, "environment", chunks(2)) == [[(adapter, threads, "0")]] * 2


def test_a_replica_that_is_busy_is_sent_no_more_than_its_share(two, tmp_path):
    """One is held until the other has answered all that is left: that one holds 2 chunks of 12, no more."""
    held, free = (place.pid for place in two.places)
    (tmp_path / f"stop {held}").touch()
    ended_when_taken = []

    def taken() -> Iterator[dict[str, Any]]:
        for chunk in chunks(12):
            ended_when_taken.append([process for process, _ in calls(tmp_path, "ended")])
            if len(ended_when_taken) == 12:
                (tmp_path / "go").touch()
            yield chunk

    assert two.ask(None, "add", taken()) == [[number] for number in range(12)]
    for number, ended in enumerate(ended_when_taken):
        assert held not in ended
        assert number - len(ended) <= 2 * IN_FLIGHT
    assert len(ended_when_taken[-1]) >= 12 - 2 * IN_FLIGHT
    by_process = [process for process, _ in calls(tmp_path, "ended")]
    assert (by_process.count(held), by_process.count(free)) == (IN_FLIGHT, 12 - IN_FLIGHT)


def test_a_replica_that_is_killed_is_replaced_and_nothing_is_lost_or_twice(two, tmp_path, capsys):
    killed, other = (place.pid for place in two.places)
    (tmp_path / f"stop {killed}").touch()  # so that it surely dies over a chunk

    def taken() -> Iterator[dict[str, Any]]:
        for number, chunk in enumerate(chunks(12)):
            if number == 8:
                until = time.monotonic() + 60
                while killed not in [process for process, _ in calls(tmp_path, "begun")]:
                    assert time.monotonic() < until
                    time.sleep(0.02)
                os.kill(killed, signal.SIGKILL)
            yield chunk

    assert two.ask(None, "add", taken(), {"to": 1}) == [[1 + number] for number in range(12)]
    new = two.places[0].pid
    assert two.places[1].pid == other
    ended = calls(tmp_path, "ended")
    assert sorted(prompts for _, prompts in ended) == sorted(map(str, range(12)))  # what was killed had not ended
    assert {process for process, _ in ended} == {new, other}
    assert new != killed
    assert f"replica 0 died (process {killed} on " in capsys.readouterr().err


def test_what_dies_again_and_again_is_an_error_that_says_how(ray, tmp_path):
    made = Replicas(partial(start, tmp_path), 1)
    said = rf"(?s)replica 0 of 1 died again after .* again {RESTARTS} times.*SYSTEM_ERROR"
    with pytest.raises(UserError, match=said):
        made.ask(None, "die", chunks(1))
    made.close()


def test_errors_of_a_replica_are_raised_here_as_they_are(two):
    with pytest.raises(UserError, match=r"^prompt 0 has 0 answers: give it some$"):
        two.ask(None, "refuse", chunks(1))
    with pytest.raises(ValueError, match=r"prompts \[1\]"):
        two.ask(None, "refuse", chunks(2)[1:])
    with pytest.raises(RuntimeError, match="chunk 0 of 2 prompts has 1 answers"):
        two.ask(None, "lose", [{"prompts": [0, 1]}])


def test_what_keeps_a_replica_from_starting_names_the_node(ray):
    with pytest.raises(UserError, match=r"^replica on node \S+: vLLM is not here: install it$"):
        Replicas(refusing, 1)
    with pytest.raises(UserError, match=r"sources mine.* runs recllm .*: install the same one on all"):
        Replica(refusing, cluster.Identity("0.0", "mine")).place()


def test_more_replicas_than_cores_are_refused(ray, monkeypatch, two):
    with pytest.raises(UserError, match=r"evaluate\.replicas=3 needs a core each, Ray has 2 and no GPU: lower"):
        replicas.room(3)
    monkeypatch.setattr(replicas, "FREE_S", 0.1)
    with pytest.raises(UserError, match=r"2 CPUs are needed, 0 of Ray's 2 are free: wait"):
        replicas.room(1)  # `two` has them
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0, "CPU": 64.0})
    with pytest.raises(UserError, match=r"evaluate\.replicas=4 needs a GPU each, Ray has 2: lower"):
        replicas.room(4)


def test_a_node_that_does_not_come_is_an_error(ray, monkeypatch, two):
    """tests/infer/test_replicas_on_nodes.py loses a real one, and gets another."""
    monkeypatch.setattr(replicas, "SILENT_S", 0.05)
    monkeypatch.setattr(replicas, "START_S", 0.2)
    assert replicas.placeable({"num_cpus": 1}) == 2
    assert replicas.placeable({"num_cpus": 1, "num_gpus": 1}) == 0
    assert two.ask(None, "doze", chunks(1)) == [[0]]  # longer than START_S: both have room, so that it is a long chunk
    monkeypatch.setattr(replicas, "placeable", lambda _: 1)
    with pytest.raises(UserError, match="room for 1 of 2 replicas, and no other came: start Ray on more nodes"):
        two.ask(None, "doze", chunks(1))


def test_the_place_of_a_replica_that_died_is_kept_for_it(ray, two, tmp_path):
    killed = two.places[0].pid
    (tmp_path / f"stop {killed}").touch()

    @ray.remote(num_cpus=1)
    def take() -> None:
        (tmp_path / "taken").touch()

    taking = take.remote()  # as a job that has waited: it would take the core before Ray starts the replica again

    def taken() -> Iterator[dict[str, Any]]:
        for number, chunk in enumerate(chunks(8)):
            if number == 6:
                os.kill(killed, signal.SIGKILL)
            yield chunk

    assert two.ask(None, "add", taken()) == [[number] for number in range(8)]
    assert two.places[0].pid != killed
    assert not (tmp_path / "taken").exists()
    two.close()
    ray.get(taking, timeout=30)  # what is closed keeps nothing


SILENCE_S = 5.0  # more than a replica needs to be started again on a busy machine


@pytest.fixture
def impatient(ray, tmp_path) -> Iterator[Replicas]:
    """Two replicas that are replaced after SILENCE_S."""
    made = Replicas(partial(start, tmp_path), 2, chunk=1, silence_s=SILENCE_S)
    yield made
    made.close()


def test_a_replica_that_hangs_is_replaced_and_nothing_is_lost_or_twice(impatient, tmp_path, capsys):
    hung, other = impatient.places
    (tmp_path / f"stop {hung.pid}").touch()
    begun = time.monotonic()
    assert impatient.ask(None, "add", chunks(12), {"to": 1}) == [[1 + number] for number in range(12)]
    assert time.monotonic() - begun >= SILENCE_S
    ended = calls(tmp_path, "ended")
    assert sorted(prompts for _, prompts in ended) == sorted(map(str, range(12)))
    assert impatient.places[1] == other
    assert {process for process, _ in ended} == {impatient.places[0].pid, other.pid}
    with pytest.raises(ProcessLookupError):
        os.kill(hung.pid, 0)
    said = capsys.readouterr().err
    assert said.count("it is killed and started again, and asked again for what it owes") == 1
    assert f"replica 0 (process {hung.pid} on {hung.node}) gave no answer for 5 s" in said


def test_a_replica_that_hangs_in_c_code_is_replaced_and_one_that_hangs_again_is_an_error(impatient, tmp_path):
    assert impatient.ask(None, "hang", chunks(4)[1:]) == [[1], [2], [3]]
    assert len(list(tmp_path.glob("hung *"))) == 3
    said = r"^replica \d of 2 .* gave no answer for 5 s, was killed and started again, and gave none for 5 s again: "
    with pytest.raises(UserError, match=said + r".*raise evaluate\.replica_timeout_s"):
        impatient.ask(None, "hang", chunks(1))


def test_who_is_at_work_waits_for_a_place_or_was_not_heard_is_not_killed(ray, tmp_path, monkeypatch):
    made, killed = Replicas(partial(start, tmp_path), 1, chunk=1, silence_s=0.2), []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: killed.append(no_restart))
    monkeypatch.setattr(made, "silence_s", 1.0)
    assert made.ask(None, "doze", chunks(4)) == [[0], [1], [2], [3]]  # 2.4 s, 0.6 s each
    slow = (time.sleep(1.5) or chunk for chunk in chunks(4))  # answers wait to be taken
    monkeypatch.setattr(made, "silence_s", 0.5)
    assert made.ask(None, "add", slow) == [[0], [1], [2], [3]]
    monkeypatch.setattr(made, "silence_s", 0.2)
    group = made._held[0]
    monkeypatch.setattr(made, "_held", [SimpleNamespace(wait=lambda timeout_seconds: False)])
    assert made.ask(None, "doze", chunks(1)) == [[0]]
    assert killed == []
    monkeypatch.setattr(made, "_held", [group])
    with pytest.raises(UserError, match="was killed and started again, and gave none"):
        made.ask(None, "doze", chunks(1))
    assert killed == [False]  # Ray is to start it again
    monkeypatch.undo()
    made.close()


def test_a_replica_that_says_nothing_is_told_of_at_growing_intervals(monkeypatch, two, tmp_path):
    silent = two.places[0]
    (tmp_path / f"stop {silent.pid}").touch()
    begun, told = time.monotonic(), []

    def tell(text: str, file: Any) -> None:  # as tqdm.write
        assert file is sys.stderr
        told.append((time.monotonic() - begun, text))
        if len(told) == 3:
            (tmp_path / "go").touch()

    monkeypatch.setattr(replicas, "SILENT_S", 0.1)
    monkeypatch.setattr(two, "_told_after", [0.5, 60.0])
    monkeypatch.setattr(replicas.tqdm, "write", tell)
    assert two.ask(None, "add", chunks(6)) == [[number] for number in range(6)]
    assert len(told) == 3
    for (when, text), least in zip(told, [0.5, 1.0, 2.0], strict=True):
        assert when >= least
        assert text.endswith(f" s from replica 0 (process {silent.pid} on {silent.node})")
    assert told[2][1].startswith("no answer for ")


def test_shares_are_fair():
    assert [chunk_size(count, 2) for count in (0, 1, 12, 64, 256, 1000, 10_000)] == [1, 1, 6, 32, 32, 125, 256]
    assert cores_each([64, 2], 3) == 21  # on the large node
    assert cores_each([], 1) is None
    np.testing.assert_array_equal([cores_each([7], count) for count in range(1, 8)], [7, 3, 2, 1, 1, 1, 1])
