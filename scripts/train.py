"""Train an adapter, on one process or many; the same run as `recllm train RECIPE`.

accelerate launch --config_file accelerate_configs/single.yaml scripts/train.py RECIPE [section.key=value …]

Each file of accelerate_configs/ (DDP, ZeRO-1 to 3, with offload, FSDP2, two machines) begins with its own command.
RECIPE is a path or a shipped name. The recipe's output folder must hold dataset/ (`recllm convert RECIPE`); encoder/ is
fitted where it is missing or stale; adapter/ is written.
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
