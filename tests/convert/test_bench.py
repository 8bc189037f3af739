import json
import subprocess
import sys
from pathlib import Path

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


def test_bench_of_actions_converts_a_log_of_events(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "actions.py"), "--parts", "conversion"]
    options = ["--events", "2e3", "--folder", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["bench"], line["events"]) == ("actions", 2000)
    assert line["examples"] == line["examples_as_json"]
    assert 1000 < line["examples"] < 2000  # all but the first of each session
    assert min(line["events_per_cpu_s"], line["events_per_cpu_s_as_json"]) > 0
    assert list(tmp_path.iterdir()) == []
