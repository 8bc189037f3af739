"""The engine of a cluster gives the local engine's files, whatever is lost on the way."""

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recllm import files, schema, stages
from recllm.cli import main
from recllm.cluster import as_they_end, identity
from recllm.convert import kept, pipeline, ray_reading
from recllm.convert.pipeline import Written, convert
from recllm.data import rows as reading
from recllm.data.sequences import Prepared
from recllm.data.stored import StoredSequences
from recllm.errors import UserError
from recllm.recipe import Recipe, UsersSource

ray = pytest.importorskip("ray", reason="needs the extra ray")

from recllm.convert import ray_engine  # noqa: E402
from recllm.convert.ray_engine import Done, RayEngine  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TASKS = [
    {"task": "next_item", "template": "next_item/films"},
    {"task": "next_item", "template": "next_item/items", "dense_window": 4, "dense_start": "random"},
    {"task": "next_item_among", "template": "next_item_among/items"},
    {"task": "like", "template": "like/items"},
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of two cores in this process; its address."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Of all splits, sorted by example_id."""
    tables = [pq.read_table(path) for split in schema.SPLITS for path in sorted((folder / split).iterdir())]
    return sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["example_id"])


def on_ray(recipe, output: Path, partitions: int | None = None, key: str = "test", **options: Any) -> dict[str, Any]:
    return convert(recipe, output, engine=RayEngine(output, key, partitions), **options)


def left_beside(output: Path) -> list[str]:
    return [path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.name}.")]


@pytest.fixture
def recipe(make_recipe, monkeypatch):
    """Candidates, several phrasings and windows; more than 16 shards."""
    monkeypatch.setattr(pipeline, "SHARD_POSITIONS", 15)
    return make_recipe(tasks=TASKS, filter={"like_at": 4})


@pytest.fixture
def local(recipe, tmp_path) -> dict[str, bytes]:
    """What the local engine writes of `recipe`."""
    convert(recipe, tmp_path / "local", workers=1)
    return contents(tmp_path / "local")


def test_any_number_of_partitions_gives_the_local_files(cluster, recipe, local, tmp_path, monkeypatch):
    assert len([name for name in local if name.startswith("train/")]) > 16
    for partitions in (1, 3, 16):
        manifest = on_ray(recipe, tmp_path / "ray", partitions)
        assert manifest == json.loads(local["manifest.json"])
        assert contents(tmp_path / "ray") == local
    monkeypatch.setattr(pipeline, "SHARD_POSITIONS", 1 << 17)
    convert(recipe, tmp_path / "whole", workers=1)
    assert rows(tmp_path / "ray") == rows(tmp_path / "whole")  # shards of another size: the same rows
    assert left_beside(tmp_path / "ray") == []


def test_a_log_in_several_files_of_several_formats(cluster, recipe, local, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BATCH", 7)
    whole = pl.read_csv(tmp_path / "log.csv", infer_schema=False)
    whole[:100].write_csv(tmp_path / "a.csv")
    whole[100:300].write_parquet(tmp_path / "b.parquet")
    whole[300:].write_ndjson(tmp_path / "c.jsonl")
    parts = [str(tmp_path / name) for name in ("a.csv", "b.parquet", "c.jsonl")]
    data = recipe.data.model_copy(update={"interactions": recipe.data.interactions.model_copy(update={"path": parts})})
    manifest = on_ray(recipe.model_copy(update={"data": data}), tmp_path / "ray")
    assert manifest["counts"] == json.loads(local["manifest.json"])["counts"]
    assert manifest["inputs"] == {path: files.sha256_of(Path(path)) for path in [*parts, str(tmp_path / "items.csv")]}
    found = contents(tmp_path / "ray")
    assert {name for name in local if found[name] != local[name]} == {"manifest.json"}  # which names the files


def test_events_with_actions_sessions_and_attributes(cluster, tmp_path, monkeypatch):
    generator = np.random.default_rng(5)
    heading = "user_id,session_id,timestamp,action,text,item_id"
    lines = [
        f"u{user},s{step // 6},{1000 * (step // 6) + int(generator.integers(600))},{action},words {step},i{item}"
        for user in range(40)
        for step, (action, item) in enumerate(zip(generator.choice(["view", "buy"], 30), generator.integers(0, 30, 30)))
    ]  # not in order of time: the audit counts it by the place in the files
    parts = [tmp_path / "one.csv", tmp_path / "two.csv"]
    parts[0].write_text("\n".join([heading, *lines[:500]]) + "\n")
    parts[1].write_text("\n".join([heading, *lines[500:]]) + "\n")
    split = {"method": "temporal", "whole_sessions": True, "valid_fraction": 0.2, "test_fraction": 0.2}
    recipe = Recipe.model_validate(
        {
            "name": "events",
            "data": {"interactions": {"path": [str(part) for part in parts]}},
            "actions": {"words": {"view": "look at", "buy": "buy"}, "attributes": ["text"]},
            "protocol": {"name": "p", "split": {**split, "targets": "all"}, "candidates": {"count": 5}},
            "prompt": {"max_items": 4},
            "tasks": [
                {"task": "next_action", "template": "next_action/events"},
                {"task": "next_event", "template": "next_event/events", "fields": {"typed": "text", "item": "item"}},
                {"task": "next_item", "template": "next_item/sessions", "within_session": True},
            ],
            "model": {"name_or_path": "none"},
        }
    )
    monkeypatch.setattr(pipeline, "SHARD_POSITIONS", 100)
    monkeypatch.setattr(reading, "_BATCH", 64)
    manifest = convert(recipe, tmp_path / "local", workers=1)
    assert any(value > 100 for value in manifest["audit"].values() if isinstance(value, int))  # disordered events
    on_ray(recipe, tmp_path / "ray", 3)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_subgraphs_of_a_store_that_the_nodes_map(cluster, make_recipe, tiny_tokenizer, tmp_path, monkeypatch):
    triples = [f"e{item},made by,maker {item % 5}" for item in range(30)]
    (tmp_path / "triples.csv").write_text("\n".join(["head,relation,tail", *triples]) + "\n")
    links = [f"i{item},e{item}" for item in range(30)]
    (tmp_path / "links.csv").write_text("\n".join(["item_id,entity_id", *links]) + "\n")
    graph = {
        "triples": {"path": str(tmp_path / "triples.csv")},
        "links": {"path": str(tmp_path / "links.csv")},
        "retrieval": {"method": "khop", "max_triples": 30},
        "budget": 400,
    }
    recipe = make_recipe(tasks=[{"task": "next_item", "template": "next_item/films_graph"}], graph=graph)
    monkeypatch.setattr(pipeline, "SHARD_POSITIONS", 60)
    tokenizer = tiny_tokenizer.backend_tokenizer.to_str()
    manifest = convert(recipe, tmp_path / "local", workers=1, tokenizer=tokenizer)
    assert manifest["graph"]["shown"]["test/next_item"]["with_graph"] > 0
    on_ray(recipe, tmp_path / "ray", 3, tokenizer=tokenizer)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_a_worker_that_is_killed_in_the_middle_of_a_shard(cluster, recipe, local, tmp_path):
    output, killed = tmp_path / "ray", list[int]()

    def kill() -> None:
        while not killed and not output.exists():
            for under_way in tmp_path.glob(".ray.shards-*/.writing-*"):
                if any(under_way.parent.glob("*.json")):
                    pid = int(under_way.name.split("-")[-2])
                    assert psutil.Process(pid).cmdline()[0].startswith("ray::")
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            time.sleep(0.001)

    killer = threading.Thread(target=kill)
    killer.start()
    on_ray(recipe, output, 3)
    killer.join()
    assert killed
    assert contents(output) == local
    assert left_beside(output) == []


DRIVER = """
import sys
from pathlib import Path
from recllm.convert import pipeline, ray_reading
from recllm.convert.ray_engine import RayEngine
from recllm.recipe import Recipe
pipeline.SHARD_POSITIONS = 15
recipe, output = Recipe.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
pipeline.convert(recipe, output, engine=RayEngine(output, "test", 8))
"""


def test_a_run_that_is_killed_as_a_whole_goes_on_from_the_shards_that_are_done(
    cluster, recipe, local, tmp_path, monkeypatch
):
    output = tmp_path / "ray"
    stale = tmp_path / ".ray.shards-of-other-inputs"
    (stale / "train").mkdir(parents=True)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "recipe.json"), str(output)]
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE) as driver:
        while len(list(tmp_path.glob(".ray.shards-*/*.json"))) < 5:
            assert driver.poll() is None, driver.stderr and driver.stderr.read().decode()
            time.sleep(0.001)
        driver.kill()
    assert not output.exists()
    (partial,) = tmp_path.glob(".ray.shards-*")  # the stale one is gone
    wait_until_quiet(partial)
    notes = {int(note.stem): json.loads(note.read_text()) for note in partial.glob("*.json")}
    shards = len([name for name in local if name.startswith("train/")])
    assert 5 <= len(notes) < shards
    parts = [partial / split / f"part-{number:05d}.parquet" for number in notes for split in notes[number]["sizes"]]
    before = {path.stat().st_ino: path.stat().st_mtime_ns for path in parts}
    prepared = []  # the log is taken as it was
    monkeypatch.setattr(pipeline, "prepare", lambda *_, **__: prepared.append("log"))
    on_ray(recipe, output, 3)
    assert prepared == []
    assert contents(output) == local
    after = {path.stat().st_ino: path.stat().st_mtime_ns for path in output.rglob("part-*.parquet")}
    assert before.items() <= after.items()  # the very same files, not written again
    assert left_beside(output) == []


class Prepares:
    """Stands for pipeline.prepare, and counts how often it is asked; the run is interrupted after it, while told so."""

    def __init__(self, monkeypatch) -> None:
        self.calls, self.interrupts, self._prepare, self._write = 0, True, pipeline.prepare, RayEngine.write
        monkeypatch.setattr(pipeline, "prepare", self)
        monkeypatch.setattr(RayEngine, "write", lambda *arguments: self.write(*arguments))

    def __call__(self, *arguments: Any, **options: Any) -> Prepared:
        self.calls += 1
        return self._prepare(*arguments, **options)

    def write(self, *arguments: Any) -> Iterator[tuple[int, Written]]:
        if self.interrupts:
            raise KeyboardInterrupt
        return self._write(*arguments)


def test_a_log_is_prepared_once_until_an_input_or_the_recipe_changes(cluster, make_recipe, tmp_path, monkeypatch):
    document = make_recipe().model_dump(mode="json") | {"output_dir": str(tmp_path / "run")}
    recipe, prepares = Recipe.model_validate(document), Prepares(monkeypatch)
    output = stages.output_of(recipe, "convert")

    def convert_on_ray(recipe: Recipe) -> int:
        with pytest.raises(KeyboardInterrupt) if prepares.interrupts else nullcontext():
            stages.convert(recipe, engine="ray")
        return prepares.calls

    assert [convert_on_ray(recipe) for _ in range(3)] == [1, 1, 1]
    (partial,) = output.parent.glob(f".{output.name}.shards-*")
    assert (partial / "prepared" / "sequences.parquet").exists()
    assert list(partial.glob(".writing-*")) == []
    with (tmp_path / "log.csv").open("a") as file:
        file.write("user0,i1,99999999,5\n")
    assert [convert_on_ray(recipe) for _ in range(2)] == [2, 2]
    assert not partial.exists()  # of other inputs
    other = recipe.model_copy(update={"seed": 7})
    assert [convert_on_ray(other) for _ in range(2)] == [3, 3]
    assert not output.exists()
    prepares.interrupts = False
    assert convert_on_ray(other) == 3
    assert left_beside(output) == []
    convert(other, tmp_path / "local", workers=1)
    assert prepares.calls == 4
    assert contents(output) == contents(tmp_path / "local")


def test_a_prepared_log_that_was_cut_short_or_lacks_files_of_the_log_is_made_anew(make_recipe, tmp_path):
    prepared, made = prepared_of(make_recipe(), tmp_path), []

    def make(folder: Path, **changes: Any) -> Prepared:
        made.append(folder)
        shutil.copy(prepared.sequences.path, folder)
        return dataclasses.replace(prepared, **changes)

    def again(make: Any) -> int:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        found = done.prepared(folder, make)
        assert found.sequences.path == folder / "sequences.parquet"
        assert found.sequences.path.read_bytes() == prepared.sequences.path.read_bytes()
        return len(made)

    done = RayEngine(tmp_path / "out", "test").done
    with done.opened():
        skips = functools.partial(make, skipped={"log.csv": "cut short"})
        assert [again(skips), again(skips), again(make), again(make)] == [1, 2, 3, 3]
        for name in ("prepared.json", "items.arrow", "train_counts.npy", "lengths.npy", "sequences.parquet"):
            path = done.folder / "prepared" / name
            before, content = len(made), path.read_bytes()
            path.unlink()  # another inode: the sequences' other name keeps its content
            if path.suffix != ".json":
                path.write_bytes(content[:-1])
            assert [again(make), again(make)] == [before + 1] * 2
        assert not any(folder.exists() for folder in made)


def prepared_of(recipe: Recipe, tmp_path: Path) -> Prepared:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    return pipeline.prepare(
        recipe.data, recipe.filter, recipe.protocol.split, recipe.seed, folder, recipe.actions, reading.scan
    )


def test_all_that_a_log_was_prepared_to_survives_the_disk(make_recipe, tmp_path):
    (tmp_path / "users.csv").write_text("user_id,age\n" + "".join(f"user{n},{20 + n}\n" for n in range(39)))
    recipe = make_recipe()
    data = recipe.data.model_copy(update={"users": UsersSource(path=str(tmp_path / "users.csv"))})
    for one in (recipe, recipe.model_copy(update={"data": data})):
        prepared = prepared_of(one, tmp_path)
        kept.write(prepared, prepared.sequences.path.parent)
        found = kept.read(prepared.sequences.path.parent)
        assert found.sequences.path == prepared.sequences.path
        np.testing.assert_array_equal(found.sequences.lengths, prepared.sequences.lengths)
        np.testing.assert_array_equal(found.train_counts, prepared.train_counts)
        assert found.items.equals(prepared.items)
        assert found.items.schema == prepared.items.schema
        assert (found.users is None) == (prepared.users is None)
        assert found.users is None or found.users.equals(prepared.users)
        for name in ("actions", "split", "audit", "inputs", "skipped", "counts"):
            assert getattr(found, name) == getattr(prepared, name)
        assert list(found.audit) == list(prepared.audit)


def test_where_a_file_has_one_name_the_sequences_are_copied(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("sequences")

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    ray_engine._link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "sequences"


def wait_until_quiet(folder: Path) -> None:
    """Tasks of a dead driver are ended by their node; until then they may finish a shard."""
    quiet_since, last = time.monotonic(), -1
    while time.monotonic() - quiet_since < 2:
        if (now := len(list(folder.rglob("*")))) != last:
            quiet_since, last = time.monotonic(), now
        time.sleep(0.05)


def test_batches_of_a_task_that_ran_twice_are_taken_once(make_recipe):
    about = ray_reading._File(["user_id", "item_id"], [])
    frames = [pl.DataFrame({"user_id": [f"u{number}"], "item_id": ["i1"]}) for number in range(3)]
    begin, end = ray_reading._piece(0, about=about), ray_reading._piece(0, about=about._replace(batches=3))
    rows_of = [ray_reading._piece(0, number=number, batch=frame) for number, frame in enumerate(frames)]

    def taken(tables: list[pa.Table]) -> list[str]:
        data = make_recipe().data.interactions
        merge = ray_reading._Merge(
            ["log.csv"], ray_reading.Reading(data, frozenset(), None, None, False, "/", identity(), 7)
        )
        pieces = ({name: table.column(name)[0] for name in table.column_names} for table in tables)
        return [user for batch in merge.all([], pieces) for user in batch["user_id"]]

    assert taken([begin, *rows_of, end]) == ["u0", "u1", "u2"]
    assert taken([begin, *rows_of[:2], begin, *rows_of, end]) == ["u0", "u1", "u2"]  # lost after two batches
    with pytest.raises(RuntimeError, match="2 of 3 batches came"):
        taken([begin, *rows_of[:2], end])


def test_shards_of_other_sequences_are_forgotten(many_users, make_converter, tmp_path):
    done = RayEngine(tmp_path / "out", "test").done
    with done.opened():
        done.bind("a")
        held = done.write(0, many_users, make_converter())
        assert held.examples["test/next_item"] == 37
        done.bind("a")
        assert done.read(0) == held
        done.bind("b")
        assert done.read(0) is None
        assert list(done.folder.glob("*/part-*")) == []
        done.write(0, many_users, make_converter())
        (done.folder / "test" / "part-00000.parquet").write_bytes(b"cut short")
        assert done.read(0) is None


def test_a_shard_over_which_every_process_is_killed_is_an_error(tmp_path):
    done = RayEngine(tmp_path / "out", "test").done
    with pytest.raises(UserError, match="5 processes were killed over shard 3"), done.opened():  # noqa: PT012
        for number in range(5):
            (done.folder / f".writing-3-{done.run}-host-{number}-x").mkdir()
        (done.folder / f".writing-2-{done.run}-host-9-x").mkdir()  # of another shard
        done.write(3, pa.record_batch({}), None)
    assert left_beside(tmp_path / "out") == []


def test_the_parts_that_notes_name_become_the_dataset(many_users, make_converter, tmp_path):
    done = RayEngine(tmp_path / "out", "test").done
    for split in schema.SPLITS:
        (tmp_path / "new" / split).mkdir(parents=True)
    with done.opened():
        done.bind("a")
        assert done.noted() == set()
        for number in (0, 1):
            done.write(number, many_users, make_converter())
        assert done.noted() == {0, 1}
        note = json.loads((done.folder / "1.json").read_text())
        del note["sizes"]["valid"]  # a part that another try left: this shard has none of this split
        files.write_json(done.folder / "1.json", note)
        part = done.folder / "test" / "part-00001.parquet"
        whole = part.read_bytes()
        part.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=r"shard 1 was written, but its files .* not whole"):
            done.move_to(tmp_path / "new", 2)
        assert contents(tmp_path / "new") == {}
        part.write_bytes(whole)
        with pytest.raises(UserError, match="shard 2 was written, but"):
            done.move_to(tmp_path / "new", 3)
        done.move_to(tmp_path / "new", 2)
        moved = [f"{split}/part-0000{number}.parquet" for split in schema.SPLITS for number in (0, 1)]
        assert sorted(contents(tmp_path / "new")) == sorted(set(moved) - {"valid/part-00001.parquet"})


def test_without_locks_nothing_is_taken_for_left_behind(many_users, make_converter, tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    first, second, other = (RayEngine(tmp_path / "out", key).done for key in ("test", "test", "other"))
    with first.opened(), other.opened():
        for number in range(5):
            (first.folder / f".writing-0-{first.run}-host-{number}-x").mkdir()
        with pytest.raises(ZeroDivisionError), second.opened():  # noqa: PT012
            second.remove_others()
            second.bind("a")
            assert other.folder.exists()
            second.write(0, many_users, make_converter())  # processes that the other run lost are not counted
            assert len(list(first.folder.glob(".writing-*"))) == 5
            raise ZeroDivisionError


def lost(*_, **__) -> None:
    """A task over which the system kills every process, before it leaves a mark."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("module", "task", "kept_log"), [(ray_reading, "_read", 0), (ray_engine, "_write_part", 1)])
def test_a_task_over_which_every_process_is_killed_ends(
    cluster, make_recipe, tmp_path, monkeypatch, module, task, kept_log
):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(module, task, lost)
    monkeypatch.setattr("recllm.cluster.MOST_LOST", 1)
    (tmp_path / "two.csv").write_bytes((tmp_path / "log.csv").read_bytes())
    log = [str(tmp_path / name) for name in ("log.csv", "two.csv")]
    recipe = make_recipe(data={"interactions": {"path": log}, "items": {"path": str(tmp_path / "items.csv")}})
    with pytest.raises(UserError, match="was lost too often"):
        on_ray(recipe, tmp_path / "ray")
    assert len(left_beside(tmp_path / "ray")) == len(list(tmp_path.glob(".ray.shards-*/prepared"))) == kept_log


def at_work(mark: Path, *, stubborn: bool) -> None:
    """A task that ends when it is interrupted, or not even then."""
    mark.touch()
    while True:
        try:
            time.sleep(0.1)  # Ray's interruption does not end a sleep
        except KeyboardInterrupt:
            if not stubborn:
                mark.with_suffix(".cleaned").touch()
                raise


def failing(others: Path) -> None:
    """A task that fails when another is at work."""
    while not others.exists():
        time.sleep(0.05)
    raise UserError("a task failed")


@pytest.mark.parametrize("stubborn", [False, True])
def test_when_one_task_fails_the_others_do_not_go_on(cluster, tmp_path, monkeypatch, stubborn):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("recllm.cluster.PATIENCE_S", 2.0 if stubborn else 60.0)
    mark = tmp_path / "mark"
    busy = [ray.remote(at_work).remote(mark, stubborn=stubborn) for _ in range(5)]  # cores are two: some wait
    began = time.monotonic()
    with pytest.raises(UserError, match="a task failed"):
        list(as_they_end(ray, [*busy, ray.remote(failing).options(num_cpus=0).remote(mark)]))
    assert time.monotonic() - began < 50
    ended, left = ray.wait(busy, num_returns=len(busy), timeout=0)
    assert (len(ended), left) == (5, [])
    assert mark.with_suffix(".cleaned").exists() is not stubborn


def test_a_cluster_without_a_cpu_is_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    with (
        pytest.raises(UserError, match="no node of the cluster has a CPU"),
        RayEngine(tmp_path / "out", "k").opened(tmp_path),
    ):
        pass


class Failing(Done):
    """Raises what it is asked to."""

    error: Exception

    def write(self, number, batch, converter):
        raise self.error


def test_only_what_the_file_system_did_is_said_of_it(stored_work, tmp_path):
    done = Failing(tmp_path / "out", "test")
    done.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(UserError, match=f"node .*: shard 0 cannot be written to {done.folder} .*Input/output error"):
        ray_engine._write_part([0], stored_work, done)
    done.error = pa.ArrowInvalid("a defect of a converter")
    with pytest.raises(pa.ArrowInvalid, match="a defect"):
        ray_engine._write_part([0], stored_work, done)
    ray_engine._opened["work"].sequences.path.write_bytes(b"PAR1 broken")
    with pytest.raises(UserError, match=r"sequences cannot be read from .*sequences.parquet"):
        ray_engine._write_part([0], stored_work, done)


@pytest.fixture
def stored_work(many_users, make_converter, tmp_path, monkeypatch) -> list[Any]:
    """A reference to the work on `many_users`, as tasks get it."""
    pq.write_table(pa.Table.from_batches([many_users]), tmp_path / "sequences.parquet")
    sequences = StoredSequences(tmp_path / "sequences.parquet", many_users.column("items").value_lengths().to_numpy())
    work = ray_engine.Work(sequences, sequences.cut(1 << 17), make_converter(), identity())
    monkeypatch.setattr(ray_engine, "_opened", {"work": work})
    return [SimpleNamespace(hex=lambda: "work")]


def test_where_a_path_hangs_on_the_drivers_folder(make_recipe, tmp_path, monkeypatch):
    how = ray_reading.Reading(
        make_recipe().data.interactions, frozenset(), None, None, False, str(tmp_path / "nowhere"), identity(), 7
    )
    monkeypatch.chdir(tmp_path)
    for path in (f"file://{tmp_path}/log.csv", str(tmp_path / "log.csv")):
        with ray_reading._here(how, path):  # the driver's folder is not on this node, and need not be
            assert Path.cwd() == tmp_path
    with pytest.raises(UserError, match=f"has no folder {tmp_path}/nowhere .*to which log.csv is relative"):
        ray_reading._here(how, "log.csv").__enter__()
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(UserError, match=rf"log.csv does not exist on node .* \(relative to {tmp_path}/nowhere\)"):
        ray_reading._here(how, "log.csv").__enter__()
    assert Path.cwd() == tmp_path
    (tmp_path / "nowhere" / "log.csv").touch()
    with ray_reading._here(how, "log.csv"):
        assert Path("log.csv").exists()
        assert Path.cwd() == tmp_path / "nowhere"
    assert Path.cwd() == tmp_path


class FullDisk(Done):
    """The disk of the node that writes the eighth shard has no room."""

    def write(self, number, batch, converter):
        if number == 7:
            with pa.OSFile("/dev/full", "wb") as file:  # given its name, write_table would remove it
                pq.write_table(pa.table({"n": np.arange(1 << 20)}), file, compression=None)
        return super().write(number, batch, converter)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_a_full_disk_on_one_node(cluster, recipe, local, tmp_path, capsys):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    output = tmp_path / "ray"
    engine = RayEngine(output, "test", 16)
    engine.done = FullDisk(engine.done.output, engine.done.key)
    with pytest.raises(OSError, match="No space left") as raised:
        convert(recipe, output, engine=engine)
    assert raised.value.errno == errno.ENOSPC  # of which the command line makes a message
    assert "UDF" not in str(raised.value)  # of Ray's own words
    assert not output.exists()
    assert "the next run goes on from them" in capsys.readouterr().err
    assert list(tmp_path.glob(".ray.shards-*/.writing-*")) == []
    on_ray(recipe, output)
    assert contents(output) == local


def test_an_unreadable_file_is_named_and_on_demand_skipped_and_counted(cluster, make_recipe, tmp_path, capsys):
    whole = pl.read_csv(tmp_path / "log.csv", infer_schema=False)
    parts = [tmp_path / f"{name}.parquet" for name in "abc"]
    for part, frame in zip(parts, (whole[:200], whole[200:250], whole[250:])):
        frame.write_parquet(part)
    parts[1].write_bytes(parts[1].read_bytes()[:-20])  # cut short, as a broken transfer leaves it
    interactions = {"path": [str(part) for part in parts]}
    recipe = make_recipe(data={"interactions": interactions, "items": {"path": str(tmp_path / "items.csv")}})
    for options in ({}, {"engine": RayEngine(tmp_path / "out", "test")}):
        with pytest.raises(UserError, match=r"b\.parquet: cannot be read"):
            convert(recipe, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    assert left_beside(tmp_path / "out") == []
    convert(recipe, tmp_path / "local", workers=1, skip_unreadable=True)
    manifest = on_ray(recipe, tmp_path / "ray", skip_unreadable=True)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert list(manifest["skipped"]) == [str(parts[1])]
    assert manifest["counts"]["interactions_read"] == whole.height - 50
    assert str(parts[1]) not in manifest["inputs"]
    assert "1 files of the log could not be read and were skipped" in capsys.readouterr().out


def test_a_wrong_value_is_told_as_the_local_engine_tells_it(cluster, make_recipe, tmp_path):
    text = (tmp_path / "log.csv").read_text().splitlines()
    (tmp_path / "first.csv").write_text("\n".join(text) + "\n")
    text[5] = text[5].replace(text[5].split(",")[2], "soon")
    (tmp_path / "log.csv").write_text("\n".join(text) + "\n")
    files_of_log = [str(tmp_path / "first.csv"), str(tmp_path / "log.csv")]
    recipe = make_recipe(data={"interactions": {"path": files_of_log}, "items": {"path": str(tmp_path / "items.csv")}})
    told = []
    for options in ({}, {"engine": RayEngine(tmp_path / "out", "test"), "skip_unreadable": True}):
        with pytest.raises(UserError, match=r"log.csv, line 6: the timestamp.*'soon'") as raised:
            convert(recipe, tmp_path / "out", **options)
        told.append(str(raised.value))
    assert told[0] == told[1]


def test_urls_of_an_object_store_are_read_by_both_engines(cluster, make_recipe, tmp_path):
    heading, *lines = (tmp_path / "log.csv").read_text().splitlines()
    for name, part in (("one", lines[:200]), ("two", lines[200:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([heading, *part]) + "\n")

    def data(before: str) -> dict[str, Any]:
        log, items = [f"{before}{tmp_path}/{name}.csv" for name in ("one", "two")], f"{before}{tmp_path}/items.csv"
        return {"interactions": {"path": log}, "items": {"path": items}}

    of_paths = convert(make_recipe(data=data("")), tmp_path / "paths", workers=1)
    of_urls = convert(make_recipe(data=data("file://")), tmp_path / "urls", workers=1)
    on_ray(make_recipe(data=data("file://")), tmp_path / "ray")
    assert of_urls["inputs"] == {f"file://{path}": sha256 for path, sha256 in of_paths["inputs"].items()}
    assert contents(tmp_path / "ray") == contents(tmp_path / "urls")
    for name in ("test/part-00000.parquet", "sequences.parquet", "items.parquet"):
        assert (tmp_path / "urls" / name).read_bytes() == (tmp_path / "paths" / name).read_bytes()


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_object_that_was_replaced_is_read_anew(request, make_recipe, tmp_path, monkeypatch, engine):
    if engine == "ray":
        request.getfixturevalue("cluster")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    log, items = f"file://{tmp_path}/log.csv", f"file://{tmp_path}/items.csv"
    recipe = make_recipe(data={"interactions": {"path": log}, "items": {"path": items}})
    found = []
    for _ in range(2):
        options = {"engine": RayEngine(tmp_path / "out", "test")} if engine == "ray" else {"workers": 1}
        found.append(convert(recipe, tmp_path / "out", **options)["counts"]["interactions_read"])
        assert list((tmp_path / "tmp").glob("recllm-object-*")) == []
        with (tmp_path / "log.csv").open("a") as file:
            file.write("user0,i1,99999999,5\n")
    assert found[1] == found[0] + 1


def test_two_runs_do_not_write_the_same_output(cluster, make_recipe, tmp_path):
    other = RayEngine(tmp_path / "out", "test").done
    with other.opened(), pytest.raises(UserError, match="another run is writing it"):
        on_ray(make_recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_shard_held_survives_json():
    held = Written.nothing()
    held.examples["train/next_item"] += 3
    held.labels["train/like", "like"] += 2
    held.graph["train/next_item/tokens"] += 5
    held.sessions["train"] += 1
    assert Written.of_document(json.loads(json.dumps(held.document()))) == held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partitions", "4"], "--partitions 4 is of --engine ray"),
        (["--engine", "ray", "--workers", "2"], "--workers 2 is of the local engine"),
        (["--engine", "ray", "--partitions", "0"], "--partitions 0: at least 1"),
    ],
)
def test_options_of_the_other_engine_are_refused(make_recipe, tmp_path, capsys, options, message):
    document = make_recipe().model_dump(mode="json") | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    assert main(["convert", str(tmp_path / "recipe.yaml"), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_converts_on_ray(cluster, make_recipe, tmp_path, capsys):
    document = make_recipe().model_dump(mode="json") | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    command = ["convert", str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path}/run"]
    assert main([*command, "--engine", "ray", "--partitions", "2"]) == 0
    folder = next((tmp_path / "run").rglob("manifest.json")).parent
    on_cluster = contents(folder)
    assert main(command) == 0
    assert contents(folder) == on_cluster
    assert "test/next_item: 40 examples" in capsys.readouterr().out
