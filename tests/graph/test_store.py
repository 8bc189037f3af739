"""The folder of a graph: what opens, and what does not."""

import json
import shutil

import numpy as np
import pytest

from recllm.errors import UserError
from recllm.graph import build, store
from recllm.graph.store import ARRAYS, FORMAT, META, Graph
from recllm.recipe import GraphSection


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder of 3 triples, one with a time, of 4 entities and 2 relations."""
    folder = tmp_path_factory.mktemp("graph")
    (folder / "triples.csv").write_text("head,relation,tail,timestamp\na,r,b,5\na,s,c,\nd,r,b,\n")
    (folder / "links.csv").write_text("item_id,entity_id\n1,a\n")
    section = {"triples": {"path": str(folder / "triples.csv")}, "links": {"path": str(folder / "links.csv")}}
    build.build_graph(GraphSection.model_validate(section), ["1"], folder / "graph")
    return folder / "graph"


@pytest.fixture
def folder(built, tmp_path):
    """A copy to break."""
    return shutil.copytree(built, tmp_path / "graph")


def test_a_folder_opens_mapped_into_memory(folder):
    graph = Graph.open(folder)
    assert (graph.num_entities, graph.num_relations, graph.num_triples) == (4, 2, 3)
    assert graph.degrees(np.arange(4)).tolist() == [2, 2, 1, 1]
    assert all(isinstance(getattr(graph, name).base, np.memmap) for name in ARRAYS)


def test_offsets_are_small_where_they_fit(folder):
    graph = Graph.open(folder)
    assert graph.run_offsets.dtype == graph.run_begins.dtype == np.int32
    assert store.offset_type(2**31 - 1) is np.int32
    assert store.offset_type(2**31) is np.int64


def test_no_graph_there(tmp_path):
    with pytest.raises(UserError, match=r"graph\.json does not exist: it should be a graph written by"):
        Graph.open(tmp_path)


@pytest.mark.parametrize("text", [json.dumps({"format": FORMAT - 1}), "[]", "{}"])
def test_another_format(folder, text):
    (folder / META).write_text(text)
    with pytest.raises(UserError, match=rf"graph\.json: format \w+, this recllm reads {FORMAT}: convert again"):
        Graph.open(folder)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_and_a_truncated_array_are_named(folder, name):
    path = folder / f"{name}.npy"
    whole = path.read_bytes()
    for size in (len(whole) - 1, 20, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{name}\.npy: is no readable array .*: convert again"):
            Graph.open(folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.npy: is no readable array .*: convert again"):
        Graph.open(folder)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("by", [-1, 1])
def test_an_array_of_another_length_is_an_error(folder, name, by):
    array = np.load(folder / f"{name}.npy")
    np.save(folder / f"{name}.npy", array[:-1] if by < 0 else np.append(array, array[-1]))
    with pytest.raises(UserError, match=r"\.npy: holds \d+ numbers, \d+ are expected: convert again"):
        Graph.open(folder)
    np.save(folder / f"{name}.npy", array[:0])
    with pytest.raises(UserError, match=r"\.npy: holds \d+ numbers, \d+ are expected: convert again"):
        Graph.open(folder)


@pytest.mark.parametrize("name", ["num_entities", "num_relations", "num_triples"])
def test_sizes_that_do_not_fit_the_arrays(folder, name):
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | {name: meta[name] + 1}))
    with pytest.raises(UserError, match=r"\.npy: holds \d+ numbers, \d+ are expected: convert again"):
        Graph.open(folder)


def test_times_are_of_as_many_edges(folder):
    """A folder that says that no triple has a time does not look for them."""
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | {"has_times": False}))
    assert Graph.open(folder).times is None


def test_equal_keys_follow_the_numbers():
    keys = np.array([7, 3, 7, 3], dtype=np.uint64)
    assert store.places(keys).tolist() == [2, 0, 3, 1]
    graph = Graph.of([0, 0, 0], [0, 0, 0], [2, 1, 3], num_entities=4, num_relations=1, entity_keys=keys)
    assert graph.targets[:3].tolist() == [1, 3, 2]
