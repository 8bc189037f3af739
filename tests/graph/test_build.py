"""The streamed folder equals the graph that the same triples make in memory; names, links and counts beside it."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm import files
from recllm.data.randomness import text_keys
from recllm.errors import UserError
from recllm.graph import build, readers
from recllm.graph.store import ALWAYS, ARRAYS, Graph
from recllm.recipe import GraphSection

TRIPLES = [("heat", "directed by", "mann", 5), ("heat", "stars", "pacino", None), ("ali", "directed by", "mann", 7)]


def write_triples(path, rows):
    lines = ["head,relation,tail,timestamp"] + [f"{h},{r},{t},{'' if s is None else s}" for h, r, t, s in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def section(path, links, triples=None, **more):
    """A graph section of two files; `triples` and the rest go into the sections of triples and of links."""
    return GraphSection.model_validate(
        {"triples": {"path": str(path)} | (triples or {}), "links": {"path": str(links)} | more}
    )


@pytest.fixture
def small(tmp_path):
    """build(rows, links) → (counts, folder) of triples given as tuples and links as "item,entity" lines."""

    def run(rows=TRIPLES, links=("1,heat",), items=("1", "2"), **more):
        triples = write_triples(tmp_path / "triples.csv", rows)
        (tmp_path / "links.csv").write_text("\n".join(["item_id,entity_id", *links]) + "\n")
        folder = tmp_path / "graph"
        return build.build_graph(section(triples, tmp_path / "links.csv", **more), items, folder), folder

    return run


IDS = st.sampled_from(["2", "10", "9", "a", "b", "Zoë", "x y", "m.07"])
TIMES = st.one_of(st.none(), st.integers(-3, 3))
ROWS = st.lists(st.tuples(IDS, st.sampled_from(["r", "7", "s"]), IDS, TIMES), min_size=1, max_size=40)


def natural(texts):
    """Whole numbers by value, then texts: what the numbers of ids follow."""
    return sorted(set(texts), key=lambda text: (0, int(text), text) if text.isdecimal() else (1, 0, text))


def assert_equals_memory(folder, rows):
    """The folder's arrays are those of Graph.of, name for name, and so are their types."""
    entities = natural([h for h, _, _, _ in rows] + [t for _, _, t, _ in rows])
    relations = natural([r for _, r, _, _ in rows])
    entity, relation = ({text: number for number, text in enumerate(texts)} for texts in (entities, relations))
    expected = Graph.of(
        [entity[h] for h, _, _, _ in rows],
        [relation[r] for _, r, _, _ in rows],
        [entity[t] for _, _, t, _ in rows],
        [ALWAYS if s is None else s for *_, s in rows],
        num_entities=len(entities),
        num_relations=len(relations),
        entity_keys=text_keys(entities),
        relation_keys=text_keys(relations),
    )
    found = Graph.open(folder)
    assert found.num_relations == expected.num_relations
    for name in ARRAYS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype, name
            assert ours.tolist() == theirs.tolist(), name
    assert pl.read_parquet(folder / build.ENTITIES)["entity_id"].to_list() == entities
    assert pl.read_parquet(folder / build.RELATIONS)["relation_id"].to_list() == relations
    assert not list(folder.glob(".scratch-*"))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, bucket=st.sampled_from([1, 3, 1 << 20]), batch=st.sampled_from([2, 200_000]))
def test_streamed_arrays_equal_those_in_memory(tmp_path_factory, rows, bucket, batch):
    tmp_path = tmp_path_factory.mktemp("graph")
    (tmp_path / "links.csv").write_text(f"item_id,entity_id\n1,{rows[0][0]}\n")
    given = section(write_triples(tmp_path / "triples.csv", rows), tmp_path / "links.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BUCKET", bucket)  # small: many buckets, and entities that overflow one
        patch.setattr(build, "BATCH", batch)
        patch.setattr(readers, "BATCH", batch)
        said = build.build_graph(given, ["1"], tmp_path / "graph")
    assert_equals_memory(tmp_path / "graph", rows)
    different = set(rows)
    times = [s for *_, s in different if s is not None]
    assert said["counts"]["triples"] == len(different)
    assert said["counts"]["duplicate_triples"] == len(rows) - len(different)
    assert said["counts"]["self_loops"] == sum(h == t for h, _, t, _ in different)
    assert said["time_range"] == ([min(times), max(times)] if times else None)


def test_a_large_graph_through_several_buckets_and_batches(tmp_path):
    rng = np.random.default_rng(0)
    heads = np.where(rng.random(300_000) < 0.2, 0, rng.integers(0, 20_000, 300_000))  # entity 0 is a hub
    relations, tails = rng.integers(0, 5, 300_000), rng.zipf(1.3, 300_000) % 20_000
    times = rng.integers(0, 1000, 300_000)
    frame = pl.DataFrame({"head": heads, "relation": relations, "tail": tails, "timestamp": times})
    frame.write_parquet(tmp_path / "triples.parquet")
    (tmp_path / "links.csv").write_text("item_id,entity_id\n1,0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BUCKET", 50_000)
        build.build_graph(section(tmp_path / "triples.parquet", tmp_path / "links.csv"), ["1"], tmp_path / "graph")
    entities = np.unique(np.concatenate([heads, tails]))
    expected = Graph.of(
        np.searchsorted(entities, heads), relations, np.searchsorted(entities, tails), times,
        num_entities=len(entities), num_relations=5,
        entity_keys=text_keys(map(str, entities)), relation_keys=text_keys("01234"),
    )  # fmt: skip
    found = Graph.open(tmp_path / "graph")
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_neither_the_order_of_rows_nor_of_files_shows(tmp_path):
    (tmp_path / "links.csv").write_text("item_id,entity_id\n1,heat\n")
    one = write_triples(tmp_path / "one.csv", TRIPLES[:2])
    two = write_triples(tmp_path / "two.csv", TRIPLES[2:])
    for name, paths in (("x", [one, two]), ("y", [two, one])):
        triples = {"path": [str(path) for path in paths]}
        build.build_graph(section(one, tmp_path / "links.csv", triples=triples), ["1"], tmp_path / name)
    assert files.sha256_of(tmp_path / "x") == files.sha256_of(tmp_path / "y")


def test_the_manifest_says_what_was_read_and_linked(small, tmp_path):
    links = ("1,heat", "1,ali", "2,nowhere", "9,heat", "3,ali", "3,ali")
    said, folder = small([*TRIPLES, TRIPLES[0], ("ali", "like", "ali", None)], links, ("1", "2", "3", "4"))
    assert said["counts"] == {
        "triples": 4, "duplicate_triples": 1, "self_loops": 1, "entities": 4, "relations": 3, "blank_literals": 0,
        "linked_items": 2, "items_without_link": 2, "links_not_in_id_map": 0, "links_of_unknown_items": 1,
        "links_to_unknown_entities": 1, "items_linked_twice": 1, "entities_of_several_items": 0,
    }  # fmt: skip
    assert said["time_range"] == [5, 7]
    paths = [tmp_path / "triples.csv", tmp_path / "links.csv"]
    assert said["inputs"] == {str(path): files.sha256_of(path) for path in paths}
    entities = pl.read_parquet(folder / build.ENTITIES)["entity_id"].to_list()
    linked = np.load(folder / build.LINKS)
    assert linked.dtype == np.int32
    assert [None if entity < 0 else entities[entity] for entity in linked] == ["heat", None, "ali", None]
    json.dumps(said)


def test_a_table_names_entities_and_relations_and_the_rest_is_read_from_ids(small, tmp_path):
    (tmp_path / "names.csv").write_text('id,name\nheat,"Heat\n(1995)"\nali,\nnobody,Nobody\n')
    (tmp_path / "relations.csv").write_text("rid,says\nstars,starred_by_actor\n")
    rows = [*TRIPLES, ("ali", "http://x.org/p#has_genre", "http://dbpedia.org/resource/Drama_%28film%29", None)]
    triples = {
        "entities": {"path": str(tmp_path / "names.csv")},
        "relations": {"path": str(tmp_path / "relations.csv"), "columns": {"id": "rid", "name": "says"}},
    }
    said, folder = small(rows, triples=triples)
    assert dict(pl.read_parquet(folder / build.ENTITIES).rows()) == {
        "heat": "Heat (1995)", "ali": "ali", "mann": "mann", "pacino": "pacino",
        "http://dbpedia.org/resource/Drama_%28film%29": "Drama (film)",
    }  # fmt: skip
    assert dict(pl.read_parquet(folder / build.RELATIONS).rows()) == {
        "directed by": "directed by", "stars": "starred by actor", "http://x.org/p#has_genre": "has genre"
    }  # fmt: skip
    assert str(tmp_path / "names.csv") in said["inputs"]


def test_names_that_name_nothing_are_an_error(small, tmp_path):
    (tmp_path / "names.csv").write_text("id,name\n7,Heat\n")
    with pytest.raises(UserError, match=r'none of the 4 ids .*there: "7".*check graph.triples.entities.columns.id'):
        small(triples={"entities": {"path": str(tmp_path / "names.csv")}})


def test_item_ids_go_through_the_id_map(small, tmp_path):
    links = ("100,heat", "200,ali", "300,mann", "300,mann", "400,nowhere")
    (tmp_path / "map.csv").write_text("old,new\n100,1\n400,9\n")
    said, folder = small(links=links, id_map={"path": str(tmp_path / "map.csv"), "source": "old", "target": "new"})
    assert said["counts"]["linked_items"] == 1
    assert said["counts"]["links_not_in_id_map"] == 3  # of 200 and 300, one of them twice
    assert said["counts"]["links_of_unknown_items"] == 1  # 9 is none of the items
    assert said["counts"]["links_to_unknown_entities"] == 0
    assert np.load(folder / build.LINKS).tolist() == [1, -1]  # ali, heat, mann, pacino
    assert str(tmp_path / "map.csv") in said["inputs"]


def test_items_of_several_entities_and_entities_of_several_items_are_counted(small):
    links = ("1,heat", "1,ali", "1,mann", "2,heat", "3,heat", "4,mann", "4,mann", "5,ali", "5,heat")
    counts = small(links=links, items=("1", "2", "3", "4", "5"))[0]["counts"]
    assert counts["items_linked_twice"] == 2  # 1 and 5
    assert counts["entities_of_several_items"] == 1  # heat, of 1, 2 and 3; 5 is ali, its first


def test_no_item_linked_names_both_kinds_of_ids(small):
    message = r'Its item ids: "tt1", in the interactions: "1", "2"; its entity ids: "heat", in the triples: "ali"'
    with pytest.raises(UserError, match=message):
        small(links=("tt1,heat",))


def test_no_triples_is_an_error(small):
    with pytest.raises(UserError, match=r"no triples there: check graph\.triples\.path"):
        small([])


DBPEDIA = {
    "triples": {"path": "kg_final.txt", "entities": {"path": "e_map.txt"}, "relations": {"path": "r_map.txt"}},
    "links": {
        "path": "i2kg_map.txt",
        "columns": {"item_id": "pid", "entity_id": "eid"},
        "id_map": {"path": "mapping/product_mapping.txt", "source": "rating_id", "target": "new_id", "separator": "\t"},
    },
}


def within(folder, value):
    """Every path of a section below a folder."""
    if not isinstance(value, dict):
        return value
    return {key: f"{folder}/{inner}" if key == "path" else within(folder, inner) for key, inner in value.items()}


@pytest.mark.shared
def test_movielens_1m_with_dbpedia(shared_data, tmp_path):
    source = shared_data / "ml-1m-dbpedia"
    items = pl.read_csv(source / "mapping" / "product_mapping.txt", separator="\t", infer_schema=False)[
        "new_id"
    ].to_list()
    said = build.build_graph(GraphSection.model_validate(within(source, DBPEDIA)), items, tmp_path / "graph")
    rows = [tuple(line.split()) for line in (source / "kg_final.txt").read_text().splitlines()[1:]]
    assert len(rows) == 205_521
    assert said["counts"] == {
        "triples": len(set(rows)), "duplicate_triples": len(rows) - len(set(rows)), "self_loops": 0, "entities": 13_754,
        "relations": 11, "blank_literals": 0, "linked_items": 2977, "items_without_link": 6, "links_not_in_id_map": 0,
        "links_of_unknown_items": 0, "links_to_unknown_entities": 6, "items_linked_twice": 0,
        "entities_of_several_items": 0,
    }  # fmt: skip
    assert_equals_memory(tmp_path / "graph", [(*row, None) for row in rows])
    named = pl.read_parquet(tmp_path / "graph" / build.ENTITIES)["name"]
    linked = np.load(tmp_path / "graph" / build.LINKS)
    assert named[int(linked[items.index("1")])] == "Monty Python's Life of Brian"
    assert "starred by actor" in pl.read_parquet(tmp_path / "graph" / build.RELATIONS)["name"]


@pytest.mark.shared
def test_movielens_100k_with_freebase_as_recbole_has_it(shared_data, tmp_path):
    source = shared_data / "ml-100k"
    given = section(source / "ml-100k.kg", source / "ml-100k.link")
    said = build.build_graph(given, [str(item) for item in range(1, 1683)], tmp_path / "graph")
    rows = [tuple(line.split("\t")) for line in (source / "ml-100k.kg").read_text().splitlines()[1:]]
    assert (said["counts"]["triples"], said["counts"]["linked_items"]) == (91_631, 1598)
    assert_equals_memory(tmp_path / "graph", [(*row, None) for row in rows])


def test_the_graph_of_the_offline_default(movielens, tmp_path):
    folder = "offline://movielens-100k-graph"
    names = {"entities": {"path": f"{folder}/entities.parquet"}}
    given = section(f"{folder}/triples.parquet", f"{folder}/links.csv", triples=names)
    items = [line.split("\t")[0] for line in (movielens / "ml-100k.item").read_text().splitlines()[1:]]
    said = build.build_graph(given, items, tmp_path / "graph")
    assert (said["counts"]["triples"], said["counts"]["linked_items"]) == (24_046, 1415)
    graph = Graph.open(tmp_path / "graph")
    entities = pl.read_parquet(tmp_path / "graph" / build.ENTITIES)["name"]
    relations = pl.read_parquet(tmp_path / "graph" / build.RELATIONS)["name"].to_list()
    heat = int(np.load(tmp_path / "graph" / build.LINKS)[items.index("273")])
    runs = range(graph.run_offsets[heat], graph.run_offsets[heat + 1])
    shown = {
        relations[graph.run_relations[run]]: set(
            entities[graph.targets[graph.run_begins[run] : graph.run_begins[run + 1]]]
        )
        for run in runs
    }
    assert shown["directed by"] == {"Michael Mann"}
    assert {"Al Pacino", "Robert De Niro"} <= shown["stars"]
    assert shown["released in"] == {"1990s"}


def test_the_arrays_are_plain_npy_files_of_the_right_length(small):
    _, folder = small()
    for name in ARRAYS:
        assert np.load(folder / f"{name}.npy").ndim == 1
    assert len(np.load(folder / "targets.npy")) == 2 * len(TRIPLES)


UNITS = {"s": 1, "ms": 1000, "us": 1_000_000}
DATES = st.integers(2 * 10**8, 2 * 10**9)  # 1976 to 2033
SPANS = st.tuples(DATES, DATES).map(sorted)


@given(SPANS, SPANS, st.permutations(list(UNITS)))
def test_times_in_a_wrong_unit_are_an_error_or_a_warning(triples, interactions, units):
    """Written in one unit, read in a finer one: an error where the spans meet in truth, a warning where they do not."""
    factor = UNITS[units[1]] // UNITS[units[0]]
    if not factor:
        return
    read = [time // factor for time in triples]
    if triples[0] <= interactions[1] and triples[1] >= interactions[0] + factor:
        match = rf"times are {read[0]} to .* interactions {interactions[0]} to .*in {units[0]} and not {units[1]}"
        with pytest.raises(UserError, match=match) as error:
            build.check_times(read, *interactions)
        assert "graph.triples.timestamp_unit" in str(error.value)
        with pytest.raises(UserError, match=rf"in {units[1]} and not {units[0]}"):  # the interactions' are wrong
            build.check_times(interactions, *read)
    elif triples[1] < interactions[0]:
        assert "no cut-off hides a triple of January 1970" in build.check_times(read, *interactions)


@given(st.tuples(st.integers(-(10**10), 10**10), st.integers(-(10**10), 10**10)).map(sorted), SPANS)
def test_times_in_the_right_unit_pass(triples, interactions):
    """Facts from long before the log, from the future or around 1970: whatever is not all within a year of 1970."""
    if max(map(abs, triples)) > 0.1 * 10**9:
        assert build.check_times(triples, *interactions) is None


def test_no_times_nothing_to_check_and_times_of_0_are_a_warning():
    assert build.check_times(None, 10**9, 10**9) is None
    assert "1970" in build.check_times([0, 0], 10**9, 10**9)
    assert build.check_times([0, 50], 0, 100) is None  # a log that counts from 0
    assert build.check_times([1000, 2000], 1, 2) is None
    with pytest.raises(UserError, match="in s and not ms"):  # they touch
        build.check_times(np.array([900_001, 1_000_003]), np.int64(1_000_003_000), np.int64(2 * 10**9))
    with pytest.raises(UserError, match=r"interactions 1000000000 to 1000000001 s since 1970 \(2001-09-09 to"):
        build.check_times([10**12, 10**12 + 500], 10**9, 10**9 + 1)  # beyond Python's dates: as numbers
