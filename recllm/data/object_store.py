"""Inputs in object stores: URLs such as s3://bucket/log.parquet become local copies.

A URL enters; the path of a copy on this machine leaves, in the folder for temporary files (TMPDIR). Every file is
copied once a conversion and then read as any other: the same checks, line numbers and types, and one pass over the
network where reading needs several. Copies go with `forget_all`; those of killed processes go before the next is made.
Pyarrow's own file systems are asked first (s3, gs, abfs, hdfs, file), then fsspec's.

Credentials are found where the store's own tools find them (environment, profile, role of the machine).
"""

import atexit
import contextlib
import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from recllm import files
from recllm.errors import UserError

_OURS = ("offline", "far-trans")  # schemes of recllm itself (offline.py)
_BLOCK = 1 << 22
_GCS_PATIENCE = "retry_limit_seconds=30"  # pyarrow's own would be a quarter of an hour without credentials
_PREFIX = f"recllm-object-{re.sub(r'[^A-Za-z0-9_]', '_', platform.node())}-"  # and the process
_copies: dict[str, Path] = {}


def is_url(path: str) -> bool:
    """Whether a path of a recipe names an object in a store.

    >>> is_url("s3://logs/a.parquet"), is_url("data/a.parquet"), is_url("offline://movielens-100k/x.inter")
    (True, False, False)
    """
    scheme, found, _ = str(path).partition("://")
    return bool(found) and scheme.isalnum() and scheme not in _OURS


def fetch(url: str) -> Path:
    """A local copy of the object, kept until `forget`, `forget_all` or the end of the process.

    Raises:
        UserError: no such object, a folder, no credentials, a store that does not answer or that nothing here can read.
        OSError: the disk is full.
    """
    if url in _copies:
        return _copies[url]
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / PurePosixPath(url.partition("?")[0]).name
    try:
        with _named(url):
            source = _opened(url)
        with source, copy.open("wb") as target:
            while block := _next(source, url):
                target.write(block)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _copies[url] = copy
    return copy


def forget(url: str) -> None:
    """Give the disk of a copy back."""
    if copy := _copies.pop(url, None):
        shutil.rmtree(copy.parent, ignore_errors=True)


def forget_all() -> None:
    """Give the disk of all copies back; objects are read anew after it, and may then be others."""
    for url in list(_copies):
        forget(url)


def _sweep() -> None:
    """Remove the copies of processes of this host that were killed: they fill the disk."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        process = left.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdecimal() and not files.alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def version(url: str) -> list[Any]:
    """What changes when the object does, as far as its store says without sending it: size, time, entity tag.

    Raises:
        UserError: as `fetch`.
    """
    with _named(url):
        if (found := _arrow(url)) is not None:
            info = found[0].get_file_info(found[1])
            _check_kind(url, info.is_file, str(info.type))
            return [info.size, info.mtime_ns]
        system, path = _fsspec(url)
        entry = system.info(path)
        _check_kind(url, entry.get("type") == "file", str(entry.get("type")))
        return [entry.get("size"), *(str(entry.get(name)) for name in ("ETag", "etag", "mtime", "updated", "created"))]


def _opened(url: str) -> IO[bytes]:
    opened: IO[bytes]
    if (found := _arrow(url)) is not None:
        info = found[0].get_file_info(found[1])
        _check_kind(url, info.is_file, str(info.type))
        opened = found[0].open_input_stream(found[1], compression=None)
    else:
        system, path = _fsspec(url)
        opened = system.open(path, "rb")
    return opened


def _next(source: IO[bytes], url: str) -> bytes:
    with _named(url):
        return source.read(_BLOCK)


def _check_kind(url: str, is_file: bool, kind: str) -> None:
    if not is_file:
        what = "a folder" if "irectory" in kind else "not there"
        raise UserError(f"{url}: is {what}, a file was expected: check the path in the recipe")


def _arrow(url: str) -> tuple[Any, str] | None:
    """Pyarrow's file system and the path in it; None where it knows no such scheme."""
    import pyarrow as pa
    from pyarrow import fs

    if url.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in url:
        url += ("&" if "?" in url else "?") + _GCS_PATIENCE
    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(url)
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem" in str(error):
            return None
        raise
    return found


def _fsspec(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ModuleNotFoundError:
        raise UserError(f"{url}: pyarrow reads no such address, and fsspec is not installed: pip install it") from None
    found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    return found


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Whatever a store's library raises, with the URL; a full disk stays what it is."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: is not there, a file was expected: check the path in the recipe") from None
    except Exception as error:  # every store's library has its own, without a common class
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = str(error).strip() or type(error).__name__
        raise UserError(
            f"{url}: cannot be read ({text.splitlines()[0]}): check the address, and that this machine"
            f"{_host()} has credentials where the store's own tools look for them (s3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile or a role; gs: GOOGLE_APPLICATION_CREDENTIALS; abfs: az login)"
        ) from None


def _host() -> str:
    name = os.uname().nodename if hasattr(os, "uname") else ""
    return f" ({name})" if name else ""
