"""scripts/cluster/train.sbatch, run by bash with stand-ins for SLURM's commands and for accelerate.

What each node would run leaves; SLURM itself is not here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .on_cpu import ROOT

SCRIPT = ROOT / "scripts" / "cluster" / "train.sbatch"
STAND_INS = {
    "scontrol": '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && printf "node07\\nnode08\\nnode11\\n"',
    # a task a node, one after the other; options end where the command begins
    "srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do echo "$1" >> "$STARTED.options"; shift; done\n'
    'for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do SLURM_NODEID=$n "$@" || exit $?; done',
    "accelerate": f"#!{sys.executable}\nimport json, os, sys\n"
    'open(os.environ["STARTED"], "a").write(json.dumps(sys.argv[1:]) + "\\n")\n'
    'sys.exit(int(os.environ.get("FAIL", "0")))\n',
}


def submit(folder: Path, *arguments: str, **variables: str) -> tuple[int, list[list[str]], str]:
    """Exit code, the words of each node's accelerate, and what the job printed."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "1230042", "SLURM_JOB_NODELIST": "node[07-08,11]", "SLURM_JOB_NUM_NODES": "3"}
    job |= {"SLURM_CPUS_PER_TASK": "24"}
    job |= {"SLURM_GPUS_ON_NODE": "4", "STARTED": str(folder / "started"), "PATH": f"{folder}:{os.environ['PATH']}"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    found = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=kept | job | variables, capture_output=True, text=True, timeout=60
    )
    started = folder / "started"
    lines = started.read_text().splitlines() if started.exists() else []
    return found.returncode, [json.loads(line) for line in lines], found.stdout + found.stderr


def options(words: list[str]) -> dict[str, Any]:
    """Of accelerate launch; what follows the script is under its name."""
    script = words.index("scripts/train.py")
    assert words[0] == "launch"
    return dict(zip(words[1:script:2], words[2:script:2], strict=True)) | {"scripts/train.py": words[script + 1 :]}


def test_each_node_starts_its_part_of_one_launch(tmp_path: Path):
    override = 'train={"learning_rate": 1e-4, "note": "two  blanks"}'
    code, started, said = submit(tmp_path, "movielens/next_item_ilora", override)
    assert code == 0, said
    assert [options(words) for words in started] == [
        {
            "--config_file": "accelerate_configs/multinode_zero2.yaml",
            "--num_machines": "3",
            "--num_processes": str(3 * 4),
            "--machine_rank": str(node),
            "--main_process_ip": "node07",
            "--main_process_port": str(20_000 + 42),
            "scripts/train.py": ["movielens/next_item_ilora", override],
        }
        for node in range(3)
    ]
    assert (ROOT / options(started[0])["--config_file"]).is_file()
    given = (tmp_path / "started.options").read_text().split()
    assert sorted(given) == ["--cpus-per-task=24", "--kill-on-bad-exit=1"]


def test_another_engine(tmp_path: Path):
    _, started, _ = submit(tmp_path, "RECIPE", CONFIG="multinode_ddp", SLURM_JOB_NUM_NODES="2")
    assert [options(words)["--config_file"] for words in started] == ["accelerate_configs/multinode_ddp.yaml"] * 2
    assert (ROOT / "accelerate_configs" / "multinode_ddp.yaml").is_file()


def test_a_failed_node_fails_the_job(tmp_path: Path):
    code, started, _ = submit(tmp_path, "RECIPE", FAIL="3")
    assert (code, len(started)) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [((), {}, "usage: sbatch"), (("RECIPE",), {"SLURM_GPUS_ON_NODE": ""}, "ask for them with --gpus-per-node=N")],
)
def test_what_is_missing_is_said(tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, str], message: str):
    code, started, said = submit(tmp_path, *arguments, **variables)
    assert code != 0
    assert message in said
    assert not started
