"""The accelerate entry point; the same run as `recllm train RECIPE`, on one process or many.

accelerate launch --config_file accelerate_configs/single.yaml scripts/train.py RECIPE [section.key=value ...]
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
