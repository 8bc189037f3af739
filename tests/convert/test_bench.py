import json
import math
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
