"""Nothing is lost: a killed or failed write leaves the old output as it was."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recllm import files
from recllm.errors import UserError


def _folder(path: Path, text: str, error: Exception | None = None) -> None:
    with files.replacing_folder(path) as staging:
        (staging / "a").write_text(text)
        if error:
            raise error


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    _folder(tmp_path / "out", "old")
    _folder(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    _folder(tmp_path / "out", "old")
    with pytest.raises(OSError, match="No space"):
        _folder(tmp_path / "out", "half", OSError(errno.ENOSPC, "No space left on device"))
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_leaves_the_old_folder(tmp_path: Path) -> None:
    _folder(tmp_path / "out", "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from recllm import files\n"
        "with files.replacing_folder(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'a').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "a").read_text() == "old"
    _folder(tmp_path / "out", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "what the killed process left is swept"


def test_a_kill_in_the_middle_of_the_swap_loses_nothing(tmp_path: Path) -> None:
    _folder(tmp_path / "out", "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from recllm import files\n"
        "rename, calls = os.rename, []\n"
        "def die_at_the_second(a, b):\n"
        "    calls.append(a)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(a, b)\n"
        "os.rename = die_at_the_second\n"
        "with files.replacing_folder(Path(sys.argv[1])): pass\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match="full"):
        _folder(tmp_path / "out", "half", OSError("full"))
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def second_rename_fails(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_rename_fails)
    with pytest.raises(OSError, match="No space"):
        _folder(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path, "a test") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text('{\n"a": 1,\n}')
    with pytest.raises(UserError, match="line 3"):
        files.read_json(path, "the manifest of a dataset")
    with pytest.raises(UserError, match="Run the stage"):
        files.read_json(tmp_path / "absent.json", "the manifest of a dataset")


def test_the_hash_of_a_folder_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("1")
    first = files.sha256_of(tmp_path / "x")
    (tmp_path / "x" / "a").rename(tmp_path / "x" / "b")
    second = files.sha256_of(tmp_path / "x")
    (tmp_path / "x" / "b").write_text("2")
    assert len({first, second, files.sha256_of(tmp_path / "x")}) == 3


def test_recover_brings_back_the_output_of_a_process_killed_in_mid_swap(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f".out.tmp-old-{files._host()}-{int(dead.stdout)}-x"
    (left / "out").mkdir(parents=True)
    (left / "out" / "a").write_text("old")
    files.recover(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    _folder(tmp_path / "big" / "out", "old")
    (tmp_path / "out").symlink_to(tmp_path / "big" / "out")
    _folder(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "big" / "out" / "a").read_text() == "new"
