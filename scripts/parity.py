"""Lightning, accelerate and plain PyTorch on the same module: are they the same bits?

    python scripts/parity.py --config configs/quickstart.yaml
    python scripts/parity.py --config configs/parity.yaml --all --precision bf16-mixed --steps 20

The same as `python -m nanogpt_lit parity`, which is there without a clone too; `--help` says all.
"""

import sys

from nanogpt_lit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
