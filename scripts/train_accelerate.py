"""Trains from the YAML of `python -m nanogpt_lit fit`, under raw accelerate instead of Lightning's Trainer.

    accelerate launch scripts/train_accelerate.py --config configs/rtx2050.yaml
    python scripts/train_accelerate.py --config configs/quickstart.yaml --trainer.max_steps 100

The same as `python -m nanogpt_lit fit-accelerate`, which is there without a clone too.
"""

import sys

from nanogpt_lit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["fit-accelerate", *sys.argv[1:]]))
