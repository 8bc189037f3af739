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
