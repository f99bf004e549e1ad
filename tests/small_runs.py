"""A run of a second, by fit and by accelerate, for the tests of what a run does and leaves behind."""

import io
import multiprocessing
import os
import socket
from contextlib import redirect_stderr
from dataclasses import replace

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.parity.processes import in_new_processes, quick_start
from nanogpt_lit.parity.record import leaves, same

BOTTLES = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(120))


def fit(*arguments):
    return main(["fit", *arguments])


def accelerate(*arguments):
    try:
        return main(["fit-accelerate", *arguments])
    except SystemExit as exit:  # argparse's
        return exit.code


LOOPS = {fit: "version_0", accelerate: "accelerate_0"}
"""The loops, and the folder of the first run of each."""


def started(work, *arguments):
    """A process of work(*arguments), which has the imports behind it; sys.exit(code) there is its exitcode."""
    process = multiprocessing.get_context(quick_start()).Process(target=work, args=arguments)
    process.start()
    return process


def on_two_processes(loop, *arguments):
    return on_processes(2, loop, *arguments)


def on_processes(count, loop, *arguments):
    """Of each: the exit code, and the errors. They are told what torchrun tells those that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return in_new_processes(count, as_torchrun_starts, str(count), port, loop, arguments, method=quick_start())


def as_torchrun_starts(rank, folder, count, port, loop, arguments):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    with redirect_stderr(io.StringIO()) as said:
        code = loop(*arguments)
    return code, [line for line in said.getvalue().splitlines() if line.startswith("error: ")]


def small_run(text, root, *more):
    """8 steps of 2 micro-batches with dropout, a validation of one batch, and so a checkpoint, after each second."""
    return [
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", "--trainer.max_steps=8",
        "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1",
        "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
        "--trainer.callbacks=nanogpt_lit.loops.lightning.TextSamples", "--trainer.callbacks.tokens=1",
        "--model.gpt.n_layer=1", "--model.gpt.n_head=2", "--model.gpt.n_embd=8", "--model.gpt.dropout=0.1",
        "--model.schedule.warmup_steps=2", f"--data.source={text}", "--data.tokenizer=byte", "--data.block_size=16",
        "--data.batch_size=2", "--data.val_fraction=0.1", f"--data.shards_dir={text.parent / 'shards'}", *more,
    ]  # fmt: skip


def curves(folder):
    """(tag, step) to value, of all that two runs of the same steps have in common: all but their speed and time."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("throughput/")}
    points = [((tag, event.step), event.value) for tag in tags for event in events.Scalars(tag)]
    assert len(points) == len(dict(points)), "a step is there twice"
    return dict(points)


def different(first, second):
    """The names of what two checkpoints differ in, of all that every loop goes on from."""
    a, b = (dict(leaves("", vars(replace(load_run(path), lightning=None, trained_s=0.0)))) for path in (first, second))
    assert a.keys() == b.keys()
    return [path for path, value in a.items() if not same(value, b[path])]
