"""A case of `parity` on a text of a few lines, for the tests that hold a feature to the same bits in every loop."""

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.parity.record import compare
from nanogpt_lit.parity.runs import LOOPS, quiet

GREEN_BOTTLES = "".join(f"{n} green bottles hanging on the wall.\n" for n in range(80))


def prepared_data(folder, content=GREEN_BOTTLES, **options):
    """A data module whose shards are there."""
    (folder / "text.txt").write_text(content)
    options = {"tokenizer": "byte", "val_fraction": 0.1, "block_size": 8, "batch_size": 2, **options}
    data = TokenDataModule(str(folder / "text.txt"), shards_dir=str(folder / "shards"), **options)
    data.prepare_data()
    data.setup()
    return data


def assert_loops_agree(case, data):
    """All that the loops compute has the same bits. Returns it."""
    quiet()
    expected = LOOPS["reference"](case, data).entries
    for loop in ("lightning", "accelerate"):
        assert compare(expected, LOOPS[loop](case, data).entries) is None, loop
    return expected
