import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_bench_shows_what_is_linear_and_what_is_not():
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "encode.py"), "--num-items", "50", "--rounds", "1"]
    command += ["--lengths", "256", "2560", "--window", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    line = json.loads(done.stdout.splitlines()[-1])
    memory = {name: found["per_tenfold"]["states_peak_mib"] for name, found in line["encoders"].items()}
    assert 9 < memory["windowed"] < 11
    assert 9 < memory["gru4rec"] < 11
    assert memory["sasrec"] > 40
    assert line["encoders"]["windowed"]["reach"] == 2 * 16 + 1
    assert all(case["hit_s"] > 0 for found in line["encoders"].values() for case in found["cases"].values())
