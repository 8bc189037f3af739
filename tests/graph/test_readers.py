"""Every format gives the same triples; names, links and bad input."""

import gzip
import json

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.graph import readers
from recllm.graph.build import build_graph
from recllm.graph.store import ALWAYS, Graph
from recllm.recipe import GraphSection, IdMap, LinksSource, NamesSource, TriplesSource

EX = "http://ex.org/"


def triples(path, **source):
    """All triples of a source as tuples, sorted: batches come in any order."""
    paths = [str(part) for part in path] if isinstance(path, list) else str(path)
    batches = list(readers.read_triples(TriplesSource(path=paths, **source)))
    assert all(batch.triples.schema == readers.TRIPLES for batch in batches)
    return sorted(row for batch in batches for row in batch.triples.rows())


def without_time(rows):
    return [row[:3] for row in rows]


def names(path, **source):
    return dict(readers.read_names(NamesSource(path=str(path), **source), "graph.triples.entities").rows())


def links(path, **source):
    return readers.read_links(LinksSource(path=str(path), **source)).rows()


IDS = st.text(alphabet="abcXYZ0189_-éß /#", min_size=1, max_size=6).map(str.strip).filter(bool)
ROWS = st.lists(st.tuples(IDS, IDS, IDS, st.integers(0, 2**33)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_every_table_gives_the_same_triples(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    frame = pl.DataFrame(rows, schema=["head", "relation", "tail", "timestamp"], orient="row")
    frame.write_parquet(folder / "a.parquet")
    frame.write_csv(folder / "a.csv")
    frame.write_csv(folder / "a.tsv", separator="\t")
    frame.write_csv(folder / "a.txt", separator="\t")
    frame.write_ndjson(folder / "a.jsonl")
    (folder / "b.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    lines = [
        "head_id:token\trelation_id:token\ttail_id:token\ttimestamp:float",
        *("\t".join(map(str, r)) for r in rows),
    ]
    (folder / "a.kg").write_text("\n".join(lines) + "\n")
    for path in sorted(folder.iterdir()):
        assert triples(path) == sorted(rows), path.name


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_every_rdf_format_gives_the_same_triples(tmp_path_factory, rows):
    oxigraph = pytest.importorskip("pyoxigraph")
    folder = tmp_path_factory.mktemp("rdf")
    safe = [tuple(EX + "".join(f"%{byte:02X}" for byte in text.encode()) for text in row[:3]) for row in rows]
    quads = [oxigraph.Quad(*map(oxigraph.NamedNode, row)) for row in safe]
    for ending, kind in (("ttl", "TURTLE"), ("nt", "N_TRIPLES"), ("nq", "N_QUADS"), ("trig", "TRIG")):
        oxigraph.serialize(quads, str(folder / f"a.{ending}"), format=getattr(oxigraph.RdfFormat, kind))
    (folder / "b.nt.gz").write_bytes(gzip.compress((folder / "a.nt").read_bytes()))
    for path in sorted(folder.iterdir()):
        assert triples(path) == sorted((*row, ALWAYS) for row in safe), path.name
    text = [row[:3] for row in rows]
    assert readers.readable(pl.Series([safe[0][0]])).to_list()[0] in (text[0][0], text[0][0].replace("_", " ").strip())


TURTLE = f"""@prefix ex: <{EX}> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
ex:heat ex:director ex:mann ; rdfs:label "Hitze"@de, "Heat"@en, "Heat!" ; ex:year 1995 ; ex:motto "  " .
ex:mann rdfs:label "Michael\\nMann" ; ex:knows [ ex:job "Actor"@en ] .
"""


def rdf_batch(path):
    (batch,) = readers.read_triples(TriplesSource(path=str(path)))
    return batch


def test_rdf_labels_literals_and_blank_nodes(tmp_path):
    pytest.importorskip("pyoxigraph")
    (tmp_path / "a.ttl").write_text(TURTLE)
    batch = rdf_batch(tmp_path / "a.ttl")
    assert sorted(batch.triples.rows()) == sorted(
        [
            (EX + "heat", EX + "director", EX + "mann", ALWAYS),
            (EX + "heat", EX + "year", "1995", ALWAYS),  # a literal is the entity of its text
            ("_:1", EX + "job", "Actor", ALWAYS),
            (EX + "mann", EX + "knows", "_:1", ALWAYS),
        ]
    )
    assert batch.blank_literals == 1
    heat, mann = EX + "heat", EX + "mann"
    assert set(batch.labels.rows()) == {
        (heat, "Hitze", 2), (heat, "Heat", 0), (heat, "Heat!", 1), (mann, "Michael\nMann", 1)
    }  # fmt: skip


def test_labels_name_entities_in_the_graph(tmp_path):
    pytest.importorskip("pyoxigraph")
    (tmp_path / "a.ttl").write_text(TURTLE)
    (tmp_path / "a.link").write_text(f"item_id:token\tentity_id:token\n1\t{EX}heat\n")
    given = {"triples": {"path": str(tmp_path / "a.ttl")}, "links": {"path": str(tmp_path / "a.link")}}
    said = build_graph(GraphSection.model_validate(given), ["1"], tmp_path / "graph")
    assert said["counts"]["triples"] == 4
    assert said["counts"]["blank_literals"] == 1
    assert dict(pl.read_parquet(tmp_path / "graph" / "entities.parquet").rows()) == {
        EX + "heat": "Heat", EX + "mann": "Michael Mann", "1995": "1995", "Actor": "Actor", "_:1": "unnamed 1"
    }  # fmt: skip
    assert Graph.open(tmp_path / "graph").times is None


def test_blank_nodes_of_two_files_are_two_entities(tmp_path):
    pytest.importorskip("pyoxigraph")
    for name in "ab":
        (tmp_path / f"{name}.nt").write_text(f"_:x <{EX}is> <{EX}{name}> .\n")
    found = triples([tmp_path / "a.nt", tmp_path / "b.nt"])
    assert without_time(found) == [("_:1", EX + "is", EX + "a"), ("_:2", EX + "is", EX + "b")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.ttl", f"<{EX}a> <{EX}b> <{EX}c> .\n<{EX}a> <{EX}b> .\n", r"a\.ttl, line 2: not valid RDF"),
        ("a.nt", f"<{EX}a> <{EX}b> <{EX}c> .\n\nhello\n", r"a\.nt, line 3: not valid RDF"),
        ("a.ttl", "ex:a ex:b ex:c .\n", r"line 1: not valid RDF"),
    ],
)
def test_broken_rdf_names_its_line(tmp_path, name, text, message):
    pytest.importorskip("pyoxigraph")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        triples(tmp_path / name)


def test_rdf_under_an_unknown_ending(tmp_path):
    (tmp_path / "a.xml").write_text("")
    with pytest.raises(UserError, match=r"format rdf goes by the file's ending, known: \.ttl, \.nt, \.nq, \.trig"):
        triples(tmp_path / "a.xml", format="rdf")


@pytest.mark.parametrize("separator", ["\t", " "])
@pytest.mark.parametrize("header", ["", "entity_head{}relation{}entity_tail\n"])
def test_integer_triples_of_kgat_need_no_mapping(tmp_path, separator, header):
    lines = [separator.join(row) for row in (("0", "0", "12"), ("7", "1", "0"))]
    (tmp_path / "kg_final.txt").write_text(header.format(separator, separator) + "\n".join(lines) + "\n")
    assert without_time(triples(tmp_path / "kg_final.txt")) == [("0", "0", "12"), ("7", "1", "0")]


def test_triples_of_kgcn_have_no_header_though_their_relations_are_text(tmp_path):
    rows = [("749", "film.film.writer", "2347"), ("2347", "film.writer.film", "749")]
    lines = "\n".join("\t".join(row) for row in rows) + "\n"
    for name in ("kg.txt", "kg.tsv"):
        (tmp_path / name).write_text(lines)
        assert without_time(triples(tmp_path / name)) == sorted(rows)
        (tmp_path / name).write_text("head\trelation\ttail\n" + lines)
        assert without_time(triples(tmp_path / name)) == sorted(rows)
    (tmp_path / "item_index2entity_id.txt").write_text("1\tm.03_gd\n2\tm.0jx\n")
    assert links(tmp_path / "item_index2entity_id.txt") == [("1", "m.03_gd"), ("2", "m.0jx")]
    (tmp_path / "kg.csv").write_text(lines.replace("\t", ","))
    with pytest.raises(UserError, match=r'no column "head" .*set header: false if the first line is no header'):
        triples(tmp_path / "kg.csv")
    assert without_time(triples(tmp_path / "kg.csv", header=False)) == sorted(rows)


@pytest.mark.parametrize(("ending", "separator"), [(".txt", "\t"), (".tsv", "\t"), (".txt", " ")])
def test_between_tabs_and_blanks_a_quote_is_a_letter(tmp_path, ending, separator):
    rows = [('"Weird', "stars", 'Al"'), ("a", 'b"c', '"'), ("x", '"r"', "y")]
    text = separator.join(("head", "relation", "tail")) + "\n" + "".join(separator.join(row) + "\n" for row in rows)
    (tmp_path / f"a{ending}").write_text(text)
    assert without_time(triples(tmp_path / f"a{ending}")) == sorted(rows)
    (tmp_path / f"a{ending}").write_text(text + separator.join(('"', "", "z")) + "\n")
    with pytest.raises(UserError, match="line 5: the relation"):  # quotes hide no line breaks from the count
        triples(tmp_path / f"a{ending}")


def test_names_and_links_between_tabs_keep_their_quotes_and_those_of_csv_do_not(tmp_path):
    (tmp_path / "n.tsv").write_text('id\tname\n1\t"Weird Al" Yankovic\n2\t"Heat"\n')
    assert names(tmp_path / "n.tsv") == {"1": '"Weird Al" Yankovic', "2": '"Heat"'}
    (tmp_path / "l.tsv").write_text('item_id\tentity_id\n1\t"Weird Al" Yankovic\n')
    assert links(tmp_path / "l.tsv") == [("1", '"Weird Al" Yankovic')]
    (tmp_path / "n.csv").write_text('id,name\n1,"""Weird Al"" Yankovic"\n')
    assert names(tmp_path / "n.csv") == {"1": '"Weird Al" Yankovic'}


def test_maps_of_kgat_name_its_integers(tmp_path):
    (tmp_path / "entity_list.txt").write_text("org_id remap_id\nm.045wq1q 0\nthe_matrix 1\n")
    assert names(tmp_path / "entity_list.txt") == {"0": "m.045wq1q", "1": "the matrix"}
    (tmp_path / "item_list.txt").write_text("org_id remap_id freebase_id\nB00 0 m.045wq1q\n")
    assert links(tmp_path / "item_list.txt") == [("B00", "0")]


def test_a_mapping_goes_before_what_is_known(tmp_path):
    (tmp_path / "a.csv").write_text("head,tail,head_id,p,since\nx,y,z,r,5\n")
    columns = {"head": "head_id", "relation": 3, "tail": "tail", "timestamp": "since"}
    assert triples(tmp_path / "a.csv", columns=columns) == [("z", "r", "y", 5)]


def test_a_time_mapped_to_null_is_not_read(tmp_path):
    (tmp_path / "a.csv").write_text("head,relation,tail,timestamp\nx,r,y,never\n")
    assert triples(tmp_path / "a.csv", columns={"timestamp": None}) == [("x", "r", "y", ALWAYS)]


def test_times_in_every_unit_are_seconds_rounded_down_and_blank_is_always(tmp_path):
    for unit, text, expected in (
        ("s", "5.9", 5),
        ("ms", "-1", -1),
        ("us", "1999999", 1),
        ("iso8601", "1970-01-02", 86400),
    ):
        (tmp_path / "a.csv").write_text(f"head,relation,tail,timestamp\nx,r,y,{text}\nx,r,z,\n")
        assert triples(tmp_path / "a.csv", timestamp_unit=unit) == [("x", "r", "y", expected), ("x", "r", "z", ALWAYS)]


@pytest.mark.parametrize(
    ("text", "source", "message"),
    [
        ("head,relation,tail\na,r,b\na, ,b\n", {}, r'line 3: the relation in column "relation" is blank: every triple'),
        ("head,relation,tail\n,r,b\n,r,b\n", {}, r'line 2: the head .* is blank.*\(2 such rows\)'),
        ("head,relation,tail\na,r,\n", {}, r'line 2: the tail in column "tail" is blank'),
        ("head,relation,tale\na,r,b\n", {}, r'no column "tail" for tail, did you mean "tale"\?'),
        ("head,relation,tail\na,r,b\n", {"columns": {"tial": "tail"}}, r'graph\.triples\.columns: unknown name "tial"'),
        ("head,relation,tail\na,r,b\n", {"columns": {"head": 7}}, r"head is mapped to column 7, but it has 3 columns"),
        (
            "head,relation,tail,timestamp\na,r,b,1500000000000\n", {},
            r"line 2: the timestamp .* is '1500000000000'.*: set graph\.triples\.timestamp_unit=ms",
        ),
        ("head,relation,tail,timestamp\na,r,b,soon\n", {}, r"is 'soon'.*mend the line or set graph\.triples"),
        ("head,relation,tail,timestamp\na,r,b,2020-01-01\n", {}, r"set graph\.triples\.timestamp_unit=iso8601"),
    ],
)  # fmt: skip
def test_bad_triples_name_file_line_and_next_step(tmp_path, text, source, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=rf"a\.csv.*{message}" if "unknown name" not in message else message):
        triples(tmp_path / "a.csv", **source)


def test_missing_files_and_an_empty_list(tmp_path):
    for name in ("a.csv", "a.ttl", "a.txt"):
        with pytest.raises(UserError, match="does not exist: check the path"):
            triples(tmp_path / name)
    with pytest.raises(UserError, match=r"graph\.triples\.path is an empty list"):
        triples([])


def test_broken_jsonl_names_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"head": "a", "relation": "r", "tail": "b"}) + "\n{nope\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not valid JSON"):
        triples(tmp_path / "a.jsonl")


def test_names_are_one_line_and_ids_stand_once(tmp_path):
    (tmp_path / "n.csv").write_text('id,name\n1,"A\n  B"\n2,\n3,http://x.org/Some_Name\n')
    assert names(tmp_path / "n.csv") == {"1": "A B", "2": "", "3": "Some Name"}
    (tmp_path / "n.csv").write_text("id,name\n1,A\n1,B\n")
    with pytest.raises(UserError, match=r'id "1" stands in line 2, line 3'):
        names(tmp_path / "n.csv")
    (tmp_path / "n.csv").write_text("id,name\n,A\n")
    with pytest.raises(UserError, match=r'line 2: the id in column "id" is blank: the names need one a row'):
        names(tmp_path / "n.csv")


def test_links_keep_their_order_and_go_through_the_id_map(tmp_path):
    (tmp_path / "l.csv").write_text("item_id,entity_id\n2,b\n1,a\n2,c\n3,d\n")
    assert links(tmp_path / "l.csv") == [("2", "b"), ("1", "a"), ("2", "c"), ("3", "d")]
    (tmp_path / "m.csv").write_text("old,new\n2,two\n1,one\n")
    id_map = IdMap(path=str(tmp_path / "m.csv"), source="old", target="new")
    assert links(tmp_path / "l.csv", id_map=id_map) == [("two", "b"), ("one", "a"), ("two", "c"), (None, "d")]
    (tmp_path / "m.csv").write_text("old,new\n9,two\n")
    with pytest.raises(UserError, match=r"shares no id with the items of .*check graph\.links\.id_map\.source"):
        links(tmp_path / "l.csv", id_map=id_map)
    with pytest.raises(UserError, match=r"check graph\.links\.id_map\.path"):
        links(tmp_path / "l.csv", id_map=IdMap(path=str(tmp_path / "none.csv"), source="old", target="new"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://dbpedia.org/resource/Heat_%281995_film%29", "Heat (1995 film)"),
        ("http://www.w3.org/2000/01/rdf-schema#seeAlso", "seeAlso"),
        ("http://ex.org/people/", "people"),
        ("urn:isbn:0451450523", "0451450523"),
        ("The_Phantom_of_the_Opera", "The Phantom of the Opera"),
        ("snake_case and more", "snake_case and more"),
        ("100%25", "100%25"),  # only an IRI is decoded
        ("http://", "http://"),
        ("_", "_"),
        ("a\nb", "a b"),
    ],
)
def test_readable_names(text, expected):
    assert readers.readable(pl.Series([text])).to_list() == [expected]
