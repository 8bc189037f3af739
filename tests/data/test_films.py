"""Which film of the table a film of MovieLens is, and the graph that follows."""

import csv
import sqlite3

import polars as pl
import pytest

from recllm import files
from recllm.data import films, offline
from recllm.data.films import Film, Item

COLUMNS = ("ID", "Title", "Year", "Genre", "Director", "Writer", "Cast", "Language", "Country")
TABLE = [
    (1, "Heat", 1995, "Crime, Drama", "Michael Mann", "Michael Mann", "Al Pacino, Zed", "English", "United States"),
    (2, "The Insider", 1999, "Drama", "Michael Mann", None, "Al Pacino", "English", "United States"),
    (3, "Al Pacino", 1995, "Documentary", "Zed", "", "", "", None),
    (4, "Heat", 1972, "Comedy", "Paul Morrissey", "", "", "English", "United States"),
]
ITEMS = [
    ("10", "Heat", "1995", "Crime"),
    ("11", "Al Pacino", "1996", "Documentary"),
    ("12", "Nowhere", "1995", "Drama"),
]


@pytest.fixture
def sources(tmp_path):
    """movies.db and ml-100k.item with a few films."""
    with sqlite3.connect(tmp_path / "movies.db") as connection:
        connection.execute(f"CREATE TABLE omdb ({', '.join(f'`{name}`' for name in COLUMNS)})")
        connection.executemany(f"INSERT INTO omdb VALUES ({', '.join('?' * len(COLUMNS))})", TABLE)
    connection.close()
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", *map("\t".join, ITEMS)]
    (tmp_path / "ml-100k.item").write_text("\n".join(lines) + "\n")
    return tmp_path / "movies.db", tmp_path / "ml-100k.item"


def test_the_graph_of_the_linked_films(sources, tmp_path):
    (tmp_path / "graph").mkdir()
    films.derive(*sources, tmp_path / "graph")
    assert pl.read_parquet(tmp_path / "graph" / films.TRIPLES).rows() == sorted(
        [
            ("film/1", "directed by", "person/Michael Mann"), ("film/1", "written by", "person/Michael Mann"),
            ("film/1", "stars", "person/Al Pacino"), ("film/1", "stars", "person/Zed"),
            ("film/1", "has genre", "genre/Crime"), ("film/1", "has genre", "genre/Drama"),
            ("film/1", "spoken in", "language/English"), ("film/1", "made in", "country/United States"),
            ("film/1", "released in", "decade/1990s"), ("film/3", "directed by", "person/Zed"),
            ("film/3", "has genre", "genre/Documentary"), ("film/3", "released in", "decade/1990s"),
        ]
    )  # fmt: skip
    names = dict(pl.read_parquet(tmp_path / "graph" / films.ENTITIES).rows())
    assert names["film/3"] == names["person/Al Pacino"] == "Al Pacino"  # one name, two entities
    assert names["film/1"] == "Heat"  # the other Heat is not in the graph
    with (tmp_path / "graph" / films.LINKS).open(newline="") as handle:
        assert list(csv.reader(handle)) == [["item_id", "entity_id"], ["10", "film/1"], ["11", "film/3"]]


def test_the_same_bytes_every_time(sources, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        films.derive(*sources, tmp_path / name)
    assert files.sha256_of(tmp_path / "x") == files.sha256_of(tmp_path / "y")


def film(number, title, year, genres=("Drama",), cast=()):
    values = dict.fromkeys(films._RELATIONS, ()) | {"has genre": genres, "stars": cast}
    return Film(f"film/{number}", title, year, values)


def found(title, year, table, genres=("drama",)):
    return films.match([Item("i", title, year, frozenset(genres))], table).get("i")


@pytest.mark.parametrize(
    ("title", "year", "other", "other_year"),
    [
        ("Usual Suspects, The", 1995, "The Usual Suspects", 1995),
        ("Seven (Se7en)", 1995, "Se7en", 1995),
        ("Manon of the Spring (Manon des sources)", 1986, "Manon des Sources", 1987),
        ("Cité des enfants perdus, La", 1995, "La cite des Enfants perdus", 1995),
        ("Fast & Furious", 1995, "Fast and Furious", 1996),
        ("Jungle2Jungle", 1997, "Jungle 2 Jungle", 1997),
        ("Twelve Monkeys", 1995, "12 Monkeys", 1995),
        ("M*A*S*H", 1970, "MASH", 1970),
        ("Star Wars", 1977, "Star Wars: Episode IV – A New Hope", 1977),
        ("Return of the Jedi", 1983, "Star Wars: Episode VI – Return of the Jedi", 1983),
        ("Star Trek: The Wrath of Khan", 1982, "Star Trek II: The Wrath of Khan", 1982),
    ],
)
def test_titles_that_are_the_same_film(title, year, other, other_year):
    assert found(title, year, [film(1, "Something Else", year), film(2, other, other_year)]) == "film/2"


@pytest.mark.parametrize(
    ("title", "year", "table"),
    [
        ("Heat", 1995, [film(1, "Heat", 1997)]),  # two years apart
        ("Boys, Les", 1997, [film(1, "Boys", 1996, ("Romance",))]),  # a year apart, one word, another genre
        ("Heat", 1995, [film(1, "Heat Wave", 1995)]),  # a beginning of four letters
        ("Star Wars", 1977, [film(1, "Star Wars: One", 1977), film(2, "Star Wars: Two", 1977)]),  # fits two
        ("Star Wars", 1977, [film(1, "Star Wars: One", 1977, ("Comedy",))]),  # another genre
        ("Star Wars", 1977, [film(1, "Star Wars: One", 1978)]),  # a part in another year
        ("Star Wars", 1977, [film(1, "Star Warships", 1977)]),  # within a word
        ("Heat", None, [film(1, "Heat", 1995)]),
    ],
)
def test_titles_that_are_not(title, year, table):
    assert found(title, year, table) is None


def test_of_several_films_the_nearest_in_year_then_genre_then_cast():
    drama, comedy = film(1, "Fear", 1995), film(2, "Fear", 1995, ("Comedy",))
    assert found("Fear", 1995, [film(3, "Fear", 1996), drama]) == "film/1"
    assert found("Fear", 1995, [drama, comedy], ("comedy",)) == "film/2"
    assert found("Fear", 1995, [drama, film(4, "Fear", 1995, cast=("Zed",))]) == "film/4"


def stars(one, table):
    return [tail for _, relation, tail in films._triples(one, films._careers([*table, one])) if relation == "stars"]


def test_of_a_long_cast_those_with_the_most_films_so_far_stay():
    cast = [f"Actor {number:02d}" for number in range(15)]
    earlier = [film(2, "Earlier", 1990, cast=cast[number:]) for number in range(15)]  # the last plays in all of them
    expected = [f"person/Actor {number:02d}" for number in range(14, 14 - films.MAX_CAST, -1)]
    assert stars(film(1, "Fear", 1995, cast=cast), earlier) == expected


def test_what_comes_after_a_film_does_not_change_its_cast():
    cast = [f"Actor {number:02d}" for number in range(15)]
    one, later = film(1, "Fear", 1995, cast=cast), [film(3, "Later", 1996, cast=cast[10:])] * 9
    assert stars(one, later) == [f"person/{person}" for person in cast[: films.MAX_CAST]]  # all alike: by name
    same_year = [film(4, "Same", 1995, cast=cast[14:])]
    assert stars(one, [*later, *same_year])[0] == "person/Actor 14"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ed Begley, Jr., Bing Russell", ["Ed Begley Jr.", "Bing Russell"]),
        ("Sammy Davis,Jr", ["Sammy Davis Jr"]),
        ("Isiah Whitlock Jr., Isiah Whitlock, Jr.", ["Isiah Whitlock Jr."]),
        ("Robert Downey, Sr., Hank Williams, III", ["Robert Downey Sr.", "Hank Williams III"]),
        ("A, II, B, IV", ["A II", "B IV"]),
        ("IIona, Jr. Walker, Ivan", ["IIona", "Jr. Walker", "Ivan"]),  # a suffix is a word of its own
        (" , ", []),
        (None, []),
    ],
)
def test_a_suffix_belongs_to_the_name_before_it(text, expected):
    assert films._split(text) == expected


def test_films_of_one_title_are_told_apart_by_their_years():
    names = dict(films._names([film(1, "Heat", 1995), film(2, "Heat", 1972), film(3, "Ali", 2001)], ["genre/A/B"]))
    assert names == {"film/1": "Heat (1995)", "film/2": "Heat (1972)", "film/3": "Ali", "genre/A/B": "A/B"}


def test_the_fetched_default_links_most_of_movielens(movielens):
    links = pl.read_csv(offline.resolve("offline://movielens-100k-graph/links.csv"), schema_overrides=[pl.String] * 2)
    assert links["item_id"].is_unique().all()
    assert links.height == 1415
    log = pl.read_csv(movielens / "ml-100k.inter", separator="\t", infer_schema=False)
    assert log.join(links, left_on="item_id:token", right_on="item_id", how="semi").height == 96_509
    triples = pl.read_parquet(offline.resolve("offline://movielens-100k-graph/triples.parquet"))
    assert triples.height == 24_046
    assert set(links["entity_id"]) == set(triples["head"])
