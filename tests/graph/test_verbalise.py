import json
import pickle
import re
from functools import partial
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.convert.titles import neutralise
from recllm.errors import UserError
from recllm.graph import verbalise
from recllm.graph.store import ALWAYS
from recllm.graph.subgraphs import Subgraphs
from recllm.graph.verbalise import STYLES, Verbaliser

DAY = 86_400
FILMS = ["Heat", "Michael Mann", "Crime", "Drama", "Thief"]
VERBS = ["directed by", "has genre"]
FORMATS = sorted(STYLES)

NASTY = [
    "Crouching Tiger, Hidden Dragon", "Alien: Resurrection", "a; b", 'say "x"', '"x" said', "x,", "x:", "(x)", "x)",
    "10,000 BC", "made in", "made", "in France", "x (2020-01-03)", "<|im_end|>", "</s>", "a_b", "a b", "100%", "%41",
    "..", "http://x/y?z#w", "@id", "_:b", "[INST]", "{x}", "\\u0041", "a\nb\t c", "", "  ", "Амели", "千と千尋の神隠し",
    "É\u0301", "🎬", "#Horror", "'Til",
]  # fmt: skip
NAMES = st.one_of(st.sampled_from(NASTY), st.text(st.sampled_from('ab ,;:"()<>|#%_@{}\\é\n0'), max_size=8))
TIMES = st.one_of(st.just(ALWAYS), st.integers(0, 40_000).map(lambda day: day * DAY + 17))


@st.composite
def cases(draw, names=NAMES):
    """Names of entities and relations, and triples (head, relation, tail, time) of each prompt."""
    entities, relations = draw(st.lists(names, min_size=1, max_size=6)), draw(st.lists(names, min_size=1, max_size=3))
    triple = st.tuples(
        st.integers(0, len(entities) - 1), st.integers(0, len(relations) - 1), st.integers(0, len(entities) - 1), TIMES
    )
    return entities, relations, draw(st.lists(st.lists(triple, max_size=9), max_size=4))


def subgraphs_of(prompts):
    flat = [triple for prompt in prompts for triple in prompt]
    heads, relations, tails, times = (np.array([triple[column] for triple in flat], np.int64) for column in range(4))
    ids = (column.astype(np.int32) for column in (heads, relations, tails))
    scores, hops = np.linspace(1, 0, len(flat), dtype=np.float32), np.ones(len(flat), dtype=np.int8)
    return Subgraphs(np.cumsum([0, *map(len, prompts)]), *ids, times, scores, hops)


def written_by(verbaliser, subgraphs, kept=None):
    """The text of each prompt, of the triples (M,) that are kept; None: of all."""
    layout = verbaliser.layout(subgraphs)
    kept = np.ones(len(layout.is_repeat), dtype=bool) if kept is None else kept
    return verbaliser.write(subgraphs, layout, np.flatnonzero(kept & ~layout.is_repeat))


def shown(names, what):
    """Names as texts show them, before quotation marks or percent signs."""
    return [" ".join(name.split()) or f"{what} {number}" for number, name in enumerate(names)]


def day(time):
    return None if time == ALWAYS else str(np.datetime64(time // DAY, "D"))


def meant(entities, relations, prompt, dates):
    """What a text must say: [(head, relation, tail, date)] by name, each once."""
    heads, verbs = shown(entities, "entity"), shown(relations, "relation")
    said = [(heads[h], verbs[r], heads[t], day(time) if dates else None) for h, r, t, time in prompt]
    return list(dict.fromkeys(said))


# ---- texts ----


def texts(format, prompts, **options):
    return written_by(Verbaliser(FILMS, VERBS, format, **options), subgraphs_of(prompts))


HEAT = [(0, 1, 2, 10 * DAY), (4, 0, 1, ALWAYS), (0, 0, 1, ALWAYS), (0, 1, 3, 11 * DAY)]


def test_grouped():
    assert texts("grouped", [HEAT, [], HEAT[1:2]]) == [
        "Heat: has genre Crime, Drama; directed by Michael Mann\nThief: directed by Michael Mann",
        "",
        "Thief: directed by Michael Mann",
    ]


def test_lines():
    assert texts("lines", [HEAT[:2]]) == ["(Heat, has genre, Crime)\n(Thief, directed by, Michael Mann)"]


def test_turtle():
    assert texts("turtle", [HEAT]) == [
        "@base <kg:> .\n<#Heat> <#has_genre> <#Crime>, <#Drama>; <#directed_by> <#Michael_Mann>.\n"
        "<#Thief> <#directed_by> <#Michael_Mann>."
    ]


def test_json_ld():
    (text,) = texts("json_ld", [HEAT])
    genres, directors = [{"@id": "#Crime"}, {"@id": "#Drama"}], [{"@id": "#Michael_Mann"}]
    assert json.loads(text)["@graph"] == [
        {"@id": "#Heat", "has_genre": genres, "directed_by": directors},
        {"@id": "#Thief", "directed_by": directors},
    ]


DATED = {
    "grouped": "Heat: has genre Crime (1970-01-11), Drama (1970-01-12)\nThief: directed by Michael Mann",
    "lines": "(Heat, has genre, Crime, 1970-01-11)\n(Thief, directed by, Michael Mann)\n"
    "(Heat, has genre, Drama, 1970-01-12)",
    "turtle": '@base <kg:> .\n<#Heat> <#has_genre> <#Crime> {| <#date> "1970-01-11" |}, '
    '<#Drama> {| <#date> "1970-01-12" |}.\n<#Thief> <#directed_by> <#Michael_Mann>.',
}


@pytest.mark.parametrize("format", DATED)
def test_dates(format):
    assert texts(format, [[HEAT[0], HEAT[1], HEAT[3]]], dates=True) == [DATED[format]]


def test_what_repeats_is_written_once_and_a_date_makes_it_another():
    twice = [(0, 1, 2, 10 * DAY), (0, 1, 2, 10 * DAY + 5), (0, 1, 2, 12 * DAY)]
    assert texts("grouped", [twice]) == ["Heat: has genre Crime"]
    assert texts("grouped", [twice], dates=True) == ["Heat: has genre Crime (1970-01-11), Crime (1970-01-13)"]


def test_only_kept_triples_are_written():
    verbaliser = Verbaliser(FILMS, VERBS)
    assert written_by(verbaliser, subgraphs_of([HEAT]), np.array([False, True, True, False])) == [
        "Thief: directed by Michael Mann\nHeat: directed by Michael Mann"
    ]


def test_names_are_cleaned_as_titles_are():
    clean = partial(neutralise, special_tokens=("<|im_end|>",))
    verbaliser = Verbaliser(["Heat<|im_end|>\n", "\u202e"], ["is <s>"], clean=clean)
    assert written_by(verbaliser, subgraphs_of([[(0, 0, 1, ALWAYS)]])) == ["Heat‹|im_end|>: is ‹s> entity 1"]


def test_no_format_makes_a_control_token_of_a_name():
    """An IRI in angle brackets could be one: <pad>, <end_of_turn>."""
    triples = subgraphs_of([[(0, 0, 1, ALWAYS)]])
    for format in FORMATS:
        (text,) = written_by(Verbaliser(["end of turn", "|im_end|"], ["pad"], format), triples)
        assert not re.search(r"<(end_of_turn|\|im_end\||pad)>", text)


def test_unknown_format():
    with pytest.raises(UserError, match=r'"xml": one of grouped, lines, turtle, json_ld'):
        Verbaliser([], [], "xml")


def test_no_prompt_and_no_triple():
    for format in FORMATS:
        assert texts(format, []) == []
        assert texts(format, [[], []]) == ["", ""]


# ---- what a text says ----


@given(cases(), st.booleans())
def test_grouped_reads_back(case, dates):
    entities, relations, prompts = case
    written = written_by(Verbaliser(entities, relations, "grouped", dates=dates), subgraphs_of(prompts))
    for text, prompt in zip(written, prompts, strict=True):
        assert set(read_grouped(text, shown(relations, "relation"))) == set(meant(entities, relations, prompt, dates))


@given(cases(), st.booleans())
def test_lines_read_back(case, dates):
    entities, relations, prompts = case
    written = written_by(Verbaliser(entities, relations, "lines", dates=dates), subgraphs_of(prompts))
    for text, prompt in zip(written, prompts, strict=True):
        assert list(dict.fromkeys(map(read_line, text.splitlines()))) == meant(entities, relations, prompt, dates)


@given(cases())
def test_lines_of_a_group_stand_by_their_best_triple(case):
    entities, relations, prompts = case
    entities, relations = [f"e{n}" for n in range(len(entities))], [f"r{n}" for n in range(len(relations))]
    written = written_by(Verbaliser(entities, relations), subgraphs_of(prompts))
    assert written == [plain_grouped(entities, relations, prompt) for prompt in prompts]


@pytest.mark.parametrize("format", ["turtle", "json_ld"])
@given(case=cases(), dates=st.booleans())
def test_rdf_reads_back_to_the_same_triples(format, case, dates):
    entities, relations, prompts = case
    written = written_by(Verbaliser(entities, relations, format, dates=dates), subgraphs_of(prompts))
    for text, prompt in zip(written, prompts, strict=True):
        expected = {triple[:3] for triple in meant(entities, relations, prompt, dates)}
        assert read_rdf(text, format)[0] == expected


def test_a_relation_that_another_goes_on_from_is_quoted():
    """made · "in France" and made in · "France" would be one text."""
    names, verbs = ["x", "in France", "France"], ["made", "made in", "mad"]
    prompt = [(0, 0, 1, ALWAYS), (0, 1, 2, ALWAYS), (0, 2, 2, ALWAYS)]
    (text,) = written_by(Verbaliser(names, verbs), subgraphs_of([prompt]))
    assert text == 'x: "made" in France; made in France; mad France'
    assert read_grouped(text, verbs) == meant(names, verbs, prompt, False)


@pytest.mark.parametrize("format", ["turtle", "json_ld"])
def test_rdf_reads_names_that_look_like_iris_or_keywords(format):
    names = ["http://x/y?z#w", "Alien: Resurrection", "@id", "@type", "_:b", "..", "a_b", "a b", "%41", "A"]
    prompt = [(head, head, tail, ALWAYS) for head in range(len(names)) for tail in range(len(names))]
    (text,) = written_by(Verbaliser(names, names, format), subgraphs_of([prompt]))
    assert read_rdf(text, format)[0] == {triple[:3] for triple in meant(names, names, prompt, False)}


@given(cases())
def test_turtle_states_dates_of_triples(case):
    entities, relations, prompts = case
    written = written_by(Verbaliser(entities, relations, "turtle", dates=True), subgraphs_of(prompts))
    for text, prompt in zip(written, prompts, strict=True):
        expected = {said for said in meant(entities, relations, prompt, True) if said[3]}
        assert read_rdf(text, "turtle")[1] == expected


def test_json_ld_keeps_dates_in_index():
    (text,) = texts("json_ld", [HEAT[:1]], dates=True)
    assert json.loads(text)["@graph"][0]["has_genre"] == [{"@id": "#Crime", "@index": "1970-01-11"}]


@pytest.mark.parametrize("format", ["turtle", "json_ld"])
@given(names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=5))
def test_rdf_reads_any_unicode_back(format, names):
    prompt = [(head, 0, tail, ALWAYS) for head in range(len(names)) for tail in range(len(names))]
    (text,) = written_by(Verbaliser(names, names, format), subgraphs_of([prompt]))
    assert read_rdf(text, format)[0] == {triple[:3] for triple in meant(names, names, prompt, False)}


# ---- a process of its own ----


@pytest.mark.parametrize("format", FORMATS)
def test_it_pickles_as_its_names(format):
    names = pa.array([f"entity of number {number}" for number in range(20_000)])
    verbaliser = Verbaliser(names, VERBS, format, clean=partial(neutralise, special_tokens=("x",)))
    triples = subgraphs_of([[(number, number % 2, number + 1, ALWAYS) for number in range(0, 900, 3)]])
    written = written_by(verbaliser, triples)
    pickled = pickle.dumps(verbaliser)
    assert len(pickled) < 1.2 * names.nbytes
    assert written_by(pickle.loads(pickled), triples) == written


@given(cases())
def test_forgetting_pieces_changes_nothing(case):
    entities, relations, prompts = case
    triples = subgraphs_of(prompts)
    expected = written_by(Verbaliser(entities, relations), triples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbalise, "MOST_PIECES", 1)
        forgetful = Verbaliser(entities, relations)
        assert [written_by(forgetful, triples) for _ in range(3)] == [expected] * 3


@given(cases())
def test_a_batch_equals_its_prompts(case):
    entities, relations, prompts = case
    for format in FORMATS:
        verbaliser = Verbaliser(entities, relations, format, dates=True)
        singly = [written_by(verbaliser, subgraphs_of([prompt]))[0] for prompt in prompts]
        assert written_by(verbaliser, subgraphs_of(prompts)) == singly


# ---- readers and writers of the tests ----


def plain_grouped(entities, relations, prompt):
    lines = {}
    for head, relation, tail, _ in prompt:
        tails = lines.setdefault(head, {}).setdefault(relation, [])
        tails += [tail] if tail not in tails else []
    return "\n".join(
        f"{entities[head]}: "
        + "; ".join(f"{relations[verb]} {', '.join(entities[tail] for tail in tails)}" for verb, tails in parts.items())
        for head, parts in lines.items()
    )


DATE = r" \(\d{4,}-\d\d-\d\d\)"


def take(text, until):
    """A name at the beginning of a text, in quotation marks or as far as `until`, and what is behind it."""
    if found := re.match(r'"((?:[^"]|"")*)"', text):
        return found[1].replace('""', '"'), text[found.end() :]
    found = re.match(f"(.*?)(?={until}|$)", text)
    return found[1], text[found.end() :]


def take_relation(text, known):
    if text.startswith('"'):
        return take(text, "")
    name = max((name for name in known if text.startswith(name + " ")), key=len)
    return name, text[len(name) :]


def read_grouped(text, relations):
    said = []
    for line in text.split("\n") if text else []:
        head, rest = take(line, ": ")
        separator = ": "
        while rest:
            assert rest.startswith(separator)
            relation, rest = take_relation(rest[2:], relations)
            rest = "," + rest
            while rest.startswith(", "):
                tail, rest = take(rest[2:], f"{DATE}[,;] |{DATE}$|[,;] ")
                date = re.match(DATE, rest)
                said.append((head, relation, tail, date and date[0][2:-1]))
                rest = rest[date.end() :] if date else rest
            separator = "; "
    return said


def read_line(line):
    assert line[0] == "("
    assert line[-1] == ")"
    fields, rest = [], ", " + line[1:-1]
    while rest:
        assert rest.startswith(", ")
        name, rest = take(rest[2:], ", ")
        fields.append(name)
    return (*fields, None)[:4]


def read_rdf(text, format):
    """Triples by name, and the (head, relation, tail, date) that are stated about triples."""
    ox = pytest.importorskip("pyoxigraph")
    if not text:
        return set(), set()
    kind = {"turtle": ox.RdfFormat.TURTLE, "json_ld": ox.RdfFormat.JSON_LD}[format]
    said, about, dates = set(), {}, []
    for quad in ox.parse(text.encode(), format=kind):
        if isinstance(quad.object, ox.Triple):
            about[quad.subject] = named(quad.object)
        elif isinstance(quad.object, ox.Literal):
            dates.append((quad.subject, quad.object.value))
        else:
            said.add(named(quad))
    return said, {(*about[subject], date) for subject, date in dates}


def named(triple):
    terms = [term.value for term in (triple.subject, triple.predicate, triple.object)]
    assert all(term.startswith("kg:#") for term in terms)
    return tuple(unquote(term.removeprefix("kg:#").replace("_", " ")) for term in terms)
