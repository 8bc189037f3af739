"""Writing that never leaves a half-written output behind, and fingerprints of files.

A path enters; a finished file or folder leaves under that path, or the old one stays as it was.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recllm.errors import UserError


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an exception.

    The old folder is kept until the new one is in place; a killed process leaves it untouched.
    """
    path = Path(path).resolve()  # a link to another disk stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    staging = _temporary(path, "new")
    try:
        os.chmod(staging, 0o755)  # mkdtemp makes 0700; outputs follow ordinary permissions
        yield staging
        _swap(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _temporary(path: Path, what: str) -> Path:
    """A folder beside `path` whose name says which process of which host it belongs to."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-{what}-{_host()}-{os.getpid()}-", dir=path.parent))


def _swap(staging: Path, path: Path) -> None:
    if not path.exists():
        os.rename(staging, path)
        return
    old = _temporary(path, "old")
    os.rename(path, old / path.name)
    try:
        os.rename(staging, path)
    except OSError:
        os.rename(old / path.name, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Remove what killed processes of this host left beside an output.

    The old output of a process killed between the two renames of a swap comes back under its name.
    """
    path = Path(path).resolve()
    if not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.tmp-(new|old)-{re.escape(_host())}-(\d+)-")
    for left in path.parent.iterdir():
        match = pattern.match(left.name)
        if match is None or alive(int(match[2])):
            continue
        if match[1] == "old" and not path.exists() and (left / path.name).exists():
            os.rename(left / path.name, path)
        shutil.rmtree(left, ignore_errors=True)


def _host() -> str:
    return re.sub(r"\W", "_", platform.node())


def alive(pid: int) -> bool:
    """Whether a process of this host lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name, then move it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read JSON; a missing or broken file is an error that says what the file is for and where it broke."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: it should be {what}. Run the stage that writes it first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); it should be {what}") from None


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, or of a folder's file names and bytes in sorted order."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path in the recipe (relative to {Path.cwd()})")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as handle:
            for block in iter(lambda: handle.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
