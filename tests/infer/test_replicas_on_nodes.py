"""Replicas on a Ray cluster of several nodes, one of which is lost. The nodes are raylets of this machine."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from recllm.errors import UserError
from recllm.infer import replicas
from recllm.infer.replicas import IN_FLIGHT, Replicas

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'"
)


class Located:
    """An engine that says on which node it is, and waits there while `folder` has a file of the node's name."""

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        self.folder, self.adapter = folder, adapter

    def where(self, prompts: list[int]) -> list[tuple[int, str]]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        while (self.folder / node).exists():
            time.sleep(0.05)
        return [(prompt, node) for prompt in prompts]


def start(folder: Path) -> Callable[[Path | None], Located]:
    """What a replica starts with."""
    return partial(Located, folder)


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A head without cores; RAY_ADDRESS names it."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


def test_a_replica_waits_for_another_node_when_its_own_is_lost(cluster, monkeypatch, tmp_path):
    nodes, said = [cluster.add_node(num_cpus=1) for _ in range(2)], []

    def tell(text: str, file: Any) -> None:  # as tqdm.write
        if text.startswith("no answer for ") or "is to be started again and has no place" in text:
            return  # while the node is found lost, and while the process starts on the new one
        said.append(text)
        if "new node" in text:
            nodes.append(cluster.add_node(num_cpus=1))

    with pytest.raises(UserError, match=r"evaluate\.replicas=3 needs a core each, Ray has 2 and no GPU"):
        Replicas(partial(start, tmp_path), 3)
    made = Replicas(partial(start, tmp_path), 2, chunk=1)
    (tmp_path / nodes[0].node_id).touch()  # so that it is lost over its chunks
    monkeypatch.setattr(replicas, "SILENT_S", 0.5)
    monkeypatch.setattr(replicas.tqdm, "write", tell)

    def taken() -> Iterator[dict[str, Any]]:
        for number in range(12):
            if number == 6:
                cluster.remove_node(nodes[0], allow_graceful=False)
            yield {"prompts": [number]}

    answers = [row for chunk in made.ask(None, "where", taken()) for row in chunk]
    made.close()
    assert [number for number, _ in answers] == list(range(12))
    assert len(nodes) == 3
    places = [place for _, place in answers]
    assert places.count(nodes[2].node_id) == IN_FLIGHT  # what the lost one owed
    assert places.count(nodes[1].node_id) == 12 - IN_FLIGHT
    assert said[0].startswith("Ray has lost nodes: it has room for 1 of 2 replicas; what the others owe waits")
    assert " died (process " in said[1]
    assert len(said) == 2


def test_a_replica_that_finds_no_place_is_an_error_after_a_while(cluster, monkeypatch, tmp_path, capsys):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    made = Replicas(partial(start, tmp_path), 2, chunk=1)
    (tmp_path / nodes[0].node_id).touch()
    monkeypatch.setattr(replicas, "SILENT_S", 0.2)
    monkeypatch.setattr(replicas, "START_S", 4.0)
    monkeypatch.setattr(replicas, "placeable", lambda _: 2)  # as if others held what another node has

    def taken() -> Iterator[dict[str, Any]]:
        for number in range(8):
            if number == 6:
                cluster.remove_node(nodes[0], allow_graceful=False)
                until = time.monotonic() + 60
                while not made._unplaced():
                    assert time.monotonic() < until
                made.silence_s = 0.5
            yield {"prompts": [number]}

    said = r"^replica \d of 2 is to be started again and has no place, for 4 s: wait for the others"
    with pytest.raises(UserError, match=said):
        made.ask(None, "where", taken())
    made.close()
    told = capsys.readouterr().err
    assert told.count("has no place; what it owes waits: others may hold what the nodes have") == 1
    assert "killed" not in told
