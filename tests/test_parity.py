"""Three loops, the same bits; and the comparison sees every bit."""

import pytest
import torch

from nanogpt_lit.cli import quiet_lightning
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import compare
from nanogpt_lit.parity.runs import LOOPS, Case


@pytest.fixture(autouse=True)
def _one_thread():
    quiet_lightning()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(60)))
    data = TokenDataModule(
        str(text), "byte", val_fraction=0.1, shards_dir=str(folder / "shards"), block_size=8, batch_size=2
    )
    data.prepare_data()
    data.setup()
    return data


STEPS = 6


def case(precision="32-true", accumulate=1, clip=0.05, dropout=0.1, implementation="fused", ragged=None, **rest):
    return Case(
        LoopSettings(STEPS, accumulate, clip, precision, val_check_interval=5, limit_val_batches=2, seed=7),
        GPTConfig(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=8, dropout=dropout),
        AdamWConfig(lr=0.01, implementation=implementation),
        ScheduleConfig(warmup_steps=2, total_steps=STEPS),
        batches_per_epoch=ragged,
        **rest,
    )


OVERFLOWS = {"init_scale": 2.0**20, "growth_interval": 2}
GRID = {
    "float32": case(),
    "float32, nothing clipped, no dropout": case(clip=None, dropout=0.0),
    "a ragged last window": case(accumulate=4, ragged=10),
    "bfloat16, accumulation, for-loop": case("bf16-mixed", 4, implementation="for-loop"),
    "bfloat16, ragged, foreach": case("bf16-mixed", 4, implementation="foreach", ragged=6),
    "float16, steps skipped and scale grown": case("16-mixed", 1, scaler=OVERFLOWS),
    "float16, the same with foreach, ragged": case("16-mixed", 4, implementation="foreach", ragged=6, scaler=OVERFLOWS),
    "float16, the same, nothing clipped": case("16-mixed", 4, clip=None, scaler=OVERFLOWS),
}


@pytest.mark.parametrize("name", GRID)
def test_the_three_loops_give_the_same_bits(name, data):
    runs = {loop: run(GRID[name], data).entries for loop, run in LOOPS.items()}
    assert compare(runs["reference"], runs["lightning"]) is None
    assert compare(runs["reference"], runs["accelerate"]) is None
