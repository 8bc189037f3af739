import json
import math
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recllm.data.synthetic import write_events

ROOT = Path(__file__).resolve().parents[2]


def test_bench_prints_one_line_a_size_and_one_of_all(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "convert.py"), "--sizes", "2000", "4000"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=True)
    first, second, together = [json.loads(line) for line in done.stdout.splitlines()]
    assert (first["interactions"], second["interactions"]) == (2000, 4000)
    assert {"examples", "examples_per_cpu_s", "wall_s", "peak_rss_mib"} <= set(first)
    assert first["examples"] > 1000
    assert together["sizes"] == [first, second]
    assert len(together["wall_ratios"]) == 1
    assert list(tmp_path.iterdir()) == []  # tidied up


def askable(log: Path) -> int:
    """How many events of a log are asked about: all but each session's first, and but what a cut-off trims of it.

    Cut-offs are as the protocol action_by_time has them: the newest tenth is test, the tenth before valid.
    """
    rows = pq.read_table(log, columns=["user_id", "session_id", "timestamp"]).to_pylist()
    times = sorted(row["timestamp"] for row in rows)
    tenth = len(rows) // 10
    cutoffs = (times[-2 * tenth], times[-tenth])
    sessions = defaultdict(list)
    for row in rows:
        sessions[row["user_id"], row["session_id"]].append(row["timestamp"])
    kept = [[t for t in own if not any(min(own) < cut <= t for cut in cutoffs)] for own in sessions.values()]
    return sum(len(own) - 1 for own in kept)


def test_bench_of_actions_counts_events_and_forwards(tmp_path, long_model_folder):
    """Two thousand events: as many as the log has, and an example of each that can be asked about, for both tasks.

    A batch of questions with 19 answers is one forward of the model, at both lengths of the prompt.
    """
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "actions.py"), "--quick", "--rounds", "1"]
    options = ["--events", "2e3", "--folder", str(tmp_path / "scratch")]
    model = ["--model", str(long_model_folder), "--dtype", "float32", "--batch-size", "2"]
    done = subprocess.run([*command, *options, *model], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    log = write_events(tmp_path / "log", 2000, 2000 // 100, 20_000, seed=0) / "interactions.parquet"
    assert (line["bench"], line["events"]) == ("actions", pq.read_metadata(log).num_rows)
    assert line["examples"] == line["examples_as_json"] == askable(log)
    assert min(line["events_per_cpu_s"], line["events_per_cpu_s_as_json"]) > 0
    assert (line["actions"], line["forward_passes_per_step"]) == (19, 1)
    assert [case["forward_passes_per_step"] for case in line["scoring"].values()] == [1, 1]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_bench_of_scale_prints_the_figures_of_all_sizes(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "scale.py"), "--sizes", "2000", "8000", "--ray-size"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=True)
    small, large, together = [json.loads(line) for line in done.stdout.splitlines()]
    assert together["runs"] == [small, large]
    grown = (large["wall_s"] / small["wall_s"]) ** (1 / math.log10(8000 / 2000))  # as if it were a factor of ten
    assert together["time_ratio_per_10x"] == round(grown, 2)
    assert together["peak_rss_mib"] == max(small["peak_rss_mib"], large["peak_rss_mib"]) > 0
    assert together["disk_bytes_per_interaction"] == round(large["disk_mib"] * 2**20 / 8000, 1)
    assert small["tree_cpu_s"] > small["driver_cpu_s"] * 0.5
    assert small["driver_cpu_s"] > small["before_examples_cpu_s"] > 0
    assert together["ray_over_local"] == {}
    assert list(tmp_path.iterdir()) == []


def test_bench_of_scale_cuts_the_log_into_files(tmp_path):
    script = str(ROOT / "scripts" / "bench" / "scale.py")
    command = [sys.executable, script, "--sizes", "2000", "--folder", str(tmp_path), "--ray-size"]
    options = {"capture_output": True, "text": True, "check": True}
    runs = [subprocess.run([*command, *more], **options) for more in ([], ["--files=3"])]
    whole, cut = (json.loads(run.stdout.splitlines()[0]) for run in runs)
    assert cut["interactions"] == 2000
    assert cut["examples"] == whole["examples"] > 0

    log = tmp_path / "log.parquet"
    pq.write_table(pa.table({"row": range(10)}), log)
    runpy.run_path(str(ROOT / "scripts" / "bench" / "convert.py"))["cut"](log, 3)
    parts = sorted(tmp_path.glob("log*"))
    assert [pq.read_table(part)["row"].to_pylist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
