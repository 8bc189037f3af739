"""A readable knowledge graph for MovieLens-100K: its films joined with a table of Wikidata films by title and year.

The table `omdb` of movies.db (Wikidata, CC0) and the .item file of MovieLens enter; triples.parquet, entities.parquet
and links.csv leave, derived on the machine that asks for them: MovieLens itself is not passed on.

Only films that an item links to have triples. The others would add paths of four triples between items, longer than
retrieval goes, through films that no user of the log has seen.
"""

import csv
import re
import sqlite3
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

VERSION = 2  # counted up when the same wheels give other files
MAX_CAST = 10  # the source lists up to hundreds in alphabetical order: those with the most films so far are known
TRIPLES, ENTITIES, LINKS = "triples.parquet", "entities.parquet", "links.csv"

_ARTICLES = "the|a|an|le|la|les|l|il|lo|gli|i|el|los|las|das|der|die|der|un|une|una|det|den"
_SUFFIXES = r"(?:Jr\.?|Sr\.?|II|III|IV)"
_SPELLINGS = {"colours": "colors", "blvd": "boulevard", "twelve": "12", "nineteen": "19"}
_GENRES: Mapping[str, tuple[str, ...]] = {  # of MovieLens → of the table, where they differ
    "children's": ("family", "animation", "fantasy", "adventure"),
    "film-noir": ("crime", "thriller", "drama", "mystery"),
    "musical": ("musical", "music"),
}


@dataclass(frozen=True)
class Film:
    """One film of the table."""

    id: str
    title: str
    year: int
    values: Mapping[str, Sequence[str]]  # relation → its values, in the order of the table


@dataclass(frozen=True)
class Item:
    """One film of MovieLens."""

    id: str
    title: str
    year: int | None
    genres: frozenset[str]


# relation → (column, kind of the entity). Kinds keep the film Heat apart from a person of that name.
_RELATIONS = {
    "directed by": ("Director", "person"),
    "written by": ("Writer", "person"),
    "stars": ("Cast", "person"),
    "has genre": ("Genre", "genre"),
    "spoken in": ("Language", "language"),
    "made in": ("Country", "country"),
}


def derive(films: Path, items: Path, folder: Path) -> None:
    """Write the graph of the films that both sides know into an empty folder; the same bytes every time.

    Args:
        films: movies.db.
        items: ml-100k.item.
        folder: exists.
    """
    table = read_films(films)
    links = match(read_items(items), table)
    wanted, careers = set(links.values()), _careers(table)
    linked = [film for film in table if film.id in wanted]
    triples = sorted({triple for film in linked for triple in _triples(film, careers)})
    pl.DataFrame(triples, schema=["head", "relation", "tail"], orient="row").write_parquet(folder / TRIPLES)
    names = _names(linked, {tail for _, _, tail in triples})
    pl.DataFrame(names, schema=["id", "name"], orient="row").write_parquet(folder / ENTITIES)
    with (folder / LINKS).open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows([("item_id", "entity_id"), *links.items()])


def read_films(path: Path) -> list[Film]:
    """All films of the table, by id."""
    columns = [column for column, _ in _RELATIONS.values()]
    query = f"SELECT ID, Title, Year, {', '.join(f'''`{column}`''' for column in columns)} FROM omdb ORDER BY ID"
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        rows = connection.execute(query).fetchall()
    finally:
        connection.close()
    return [
        Film(f"film/{number}", title.strip(), year, {name: _split(text) for name, text in zip(_RELATIONS, values)})
        for number, title, year, *values in rows
    ]


def _split(text: str | None) -> list[str]:
    """Values between commas, each once; a comma within a name, before its suffix, is none between values.

    >>> _split("Ed Begley, Jr., Bing Russell")
    ['Ed Begley Jr.', 'Bing Russell']
    """
    text = re.sub(rf",\s*(?={_SUFFIXES}\s*(?:,|$))", " ", text or "")
    return list(dict.fromkeys(part for value in text.split(",") if (part := value.strip())))


def read_items(path: Path) -> list[Item]:
    """All items of MovieLens, in the order of the file."""
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        Item(
            row["item_id:token"],
            row["movie_title:token_seq"],
            _year(row["release_year:token"], row["movie_title:token_seq"]),
            frozenset(row["class:token_seq"].lower().split()),
        )
        for row in rows
    ]


def _year(text: str, title: str) -> int | None:
    """The release year; of the one title that was cut apart at the wrong place, the year in it."""
    found = re.fullmatch(r"\d{4}", text) or re.search(r"(?<=\()\d{4}(?=\))", title)
    return int(found[0]) if found else None


def match(items: Iterable[Item], films: Sequence[Film]) -> dict[str, str]:
    """Item id → id of its film: a title that is equal, and otherwise one that begins or ends the other.

    Equal: in the same year; or in a year beside it, if the title has several words or a genre is the same (Boys, Les is
    not Boys). Of several films the one in the nearest year, with more genres in common, with the longer cast. A part:
    in the same year, with a genre in common, and if it is of six letters and fits one film only.
    """
    by_key: dict[str, list[Film]] = defaultdict(list)
    by_year: dict[int, list[tuple[str, Film]]] = defaultdict(list)
    for film in films:
        by_key[_joined(key_of(film.title))].append(film)
        by_year[film.year].append((key_of(film.title), film))
    found = {}
    for item in items:
        if item.year is not None and (it := _by_title(item, item.year, by_key) or _by_part(item, by_year[item.year])):
            found[item.id] = it.id
    return found


def _by_title(item: Item, year: int, by_key: Mapping[str, Sequence[Film]]) -> Film | None:
    for key in _keys(item.title):
        near = [
            film
            for film in by_key.get(_joined(key), ())
            if film.year == year or (abs(film.year - year) == 1 and (" " in key or _common(item, film)))
        ]
        if near:
            return min(near, key=lambda film: (abs(film.year - year), -_common(item, film), -len(film.values["stars"])))
    return None


def _by_part(item: Item, films: Sequence[tuple[str, Film]]) -> Film | None:
    _, colon, subtitle = item.title.rpartition(":")
    for key in [*_keys(item.title), *(_keys(subtitle) if colon and " " in subtitle.strip() else ())]:
        near = [film for other, film in films if _is_part(key, other) and _common(item, film)]
        if len(near) == 1:
            return near[0]
    return None


def _is_part(one: str, other: str) -> bool:
    """Whether the shorter of two keys begins or ends the longer, at whole words."""
    short, long = sorted((one, other), key=len)
    return len(short) >= 6 and (f"{long} ".startswith(f"{short} ") or f" {long}".endswith(f" {short}"))


def _joined(key: str) -> str:
    """Jungle2Jungle is Jungle 2 Jungle."""
    return key.replace(" ", "")


def _common(item: Item, film: Film) -> int:
    """Genres in common."""
    wanted = {other for genre in item.genres for other in _GENRES.get(genre, (genre,))}
    return len(wanted & {genre.lower() for genre in film.values["has genre"]})


def _keys(title: str) -> Iterator[str]:
    """What a MovieLens title may be called elsewhere: as it stands, without brackets, and what is in them.

    >>> list(_keys("Postman, The (Postino, Il)"))
    ['postman the postino il', 'postman', 'postino']
    """
    plain = re.sub(r"\s*\(\d{4}\)", "", title)
    parts = [plain, re.sub(r"\s*\([^)]*\)", "", plain), *re.findall(r"\(([^)]*)\)", plain)]
    yield from dict.fromkeys(key for part in parts if (key := key_of(part)))


def key_of(title: str) -> str:
    """A title for comparison: without case, accents, punctuation, and without its article, in front or behind.

    >>> key_of("Usual Suspects, The") == key_of("The Usual Suspects")
    True
    >>> key_of("Cité des enfants perdus, La"), key_of("Fast & Furious")
    ('cite des enfants perdus', 'fast and furious')
    """
    text = unicodedata.normalize("NFKD", title.replace("&", " and "))
    text = "".join(letter for letter in text if not unicodedata.combining(letter)).casefold()
    text = re.sub(rf",\s*({_ARTICLES})\s*$", "", text.strip()).replace("'", "").replace("\u2019", "")
    text = re.sub(r"[*.]", "", re.sub(r"^a\.?k\.?a\.?\s", "", text))
    text = " ".join(_SPELLINGS.get(word, word) for word in re.findall(r"\w+", text))
    return re.sub(rf"^({_ARTICLES})\s+(?=\S)", "", text)


def _careers(films: Iterable[Film]) -> dict[str, list[int]]:
    """Person → the years of the films that he or she plays in, over the whole table, rising."""
    years: dict[str, list[int]] = defaultdict(list)
    for film in sorted(films, key=lambda film: film.year):
        for person in film.values["stars"]:
            years[person].append(film.year)
    return years


def _triples(film: Film, careers: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str, str]]:
    for relation, (_, kind) in _RELATIONS.items():
        values = film.values[relation]
        if relation == "stars":
            so_far = {person: bisect_right(careers[person], film.year) for person in values}
            values = sorted(values, key=lambda person: (-so_far[person], person))[:MAX_CAST]
        for value in values:
            yield film.id, relation, f"{kind}/{value}"
    yield film.id, "released in", f"decade/{film.year // 10 * 10}s"


def _names(films: Sequence[Film], others: Iterable[str]) -> list[tuple[str, str]]:
    """Id and name of every entity; films of one title are told apart by their years."""
    titles = Counter(film.title for film in films)
    names = [(film.id, film.title if titles[film.title] == 1 else f"{film.title} ({film.year})") for film in films]
    return sorted(names) + sorted((other, other.split("/", 1)[1]) for other in others)
