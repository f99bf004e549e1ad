"""`fit-accelerate`: a run from the YAML of fit under raw accelerate instead of Lightning's Trainer.

Every option of fit works here, or is refused when only the Trainer could follow it. The run is
default_root_dir/accelerate_N, beside fit's version_N, so that TensorBoard lays their curves over each other. The loop
is loops/accelerate.py.
"""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from nanogpt_lit.checkpoint.disk import BestEffortSaver
from nanogpt_lit.checkpoint.newest import load_together
from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.data.datamodule import TokenDataModule, batch_count
from nanogpt_lit.data.sampler import StreamPosition, interleave
from nanogpt_lit.errors import refused_by
from nanogpt_lit.loops.accelerate import ShardingAccelerator, accelerator_options, train
from nanogpt_lit.loops.accelerate_environment import (
    check_environment,
    check_processes,
    check_running,
    check_sharding,
    launched_processes,
)
from nanogpt_lit.loops.compatibility import DEEPSPEED, FSDP2, check_followed
from nanogpt_lit.loops.sharded import compute_on, shard_over_all
from nanogpt_lit.loops.trainer_section import (
    asked_processes,
    loop_settings,
    named_strategy,
    strategy_arguments,
)
from nanogpt_lit.memory.oom import oom_explained
from nanogpt_lit.run.curves import TensorBoardCurves
from nanogpt_lit.run.metrics import say
from nanogpt_lit.run.observers import RunObservers
from nanogpt_lit.run.resume import batches_done, check_network, claim_folder, keep_config, tidied
from nanogpt_lit.run.stops import print_stopped
from nanogpt_lit.run.terminal import closing_table, opening_lines, relative_to_here
from nanogpt_lit.runtime.launch import requeue_signal
from nanogpt_lit.runtime.machine import device_type
from nanogpt_lit.runtime.precision import full_precision_name
from nanogpt_lit.runtime.processes import broadcast


class AccelerateCLI(SettingsCLI):
    """The options of fit, with its --ckpt_path."""

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        return super().init_parser(prog="fit-accelerate", **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint to go on from.")


def run(arguments: list[str]) -> int:
    """`fit-accelerate`; arguments begin with the command. Returns the exit code."""
    quiet_lightning()
    lock = RunLock()
    try:
        return train_run(AccelerateCLI(arguments[1:], lock=lock), lock, arguments)
    finally:
        lock.release()


def train_run(cli: AccelerateCLI, lock: RunLock, arguments: list[str]) -> int:
    trainer = cli.settings.trainer
    shards = named_strategy(trainer.strategy) == FSDP2
    zero = strategy_arguments(trainer.strategy) if named_strategy(trainer.strategy) == DEEPSPEED else None
    takes_parts = shards or zero is not None
    remark = check_environment(
        full_precision_name(trainer.precision),
        trainer.accumulate_grad_batches,
        device_type(trainer.accelerator),
        os.environ,
        shards,
        None if zero is None else {**zero, "gradient_clip_val": trainer.gradient_clip_val},
    )
    check_followed(vars(trainer), full_precision_name(trainer.precision), vars(cli.parser.get_defaults().trainer))
    processes = launched_processes(os.environ)
    check_processes(asked_processes(vars(trainer)), processes)
    if takes_parts:
        check_sharding(processes)
    cli.complete_settings()
    module, data = cli.build()
    data.setup()
    val_limit = batch_count(trainer.limit_val_batches)
    train_loader, val_loader = loaders(data, processes, 0, val_limit)
    settings = loop_settings(vars(trainer), val_batches=len(val_loader) // processes, seed=cli.seed)

    deepspeed = None
    if zero is not None:
        from nanogpt_lit.loops.lightning_sharded import ZeroStrategy  # late, for few runs need it

        compute_on(cli.device)
        deepspeed = ZeroStrategy(**zero).config
    with refused_by("accelerate"):
        accelerator = ShardingAccelerator(**accelerator_options(settings, cli.device, shards, deepspeed))
    check_running(processes, accelerator.num_processes)
    start = load_together(Path(cli.settings.ckpt_path) if cli.settings.ckpt_path else None, takes_parts)
    if start is not None:  # before there is a folder
        data.load_state_dict(dict(start.data))
        train_loader, val_loader = loaders(data, processes, start.batches * start.processes, val_limit)
        check_network(module, start)
        batches_done(start, module, settings.accumulate_grad_batches, accelerator.num_processes)
    if remark is not None:
        accelerator.print(remark)

    features = cli.features(data)
    cli.say_what_changed()
    folder = cli.resumed.run_folder if cli.resumed is not None else Path()
    if accelerator.is_main_process and cli.resumed is None:
        folder = claim_folder(Path(trainer.default_root_dir), "accelerate")
    folder = broadcast(folder)
    curves = None
    if accelerator.is_main_process:
        lock.acquire(folder)
        for stray in tidied(folder, folder / "checkpoints"):
            say(stray)
        curves = TensorBoardCurves(folder, purge_step=None if start is None else start.step + 1)
        keep_config(folder, cli.kept_settings())
        curves.begin(cli.kept_settings(), 0 if start is None else start.step)
    observers = RunObservers(
        curves=curves,
        folder=folder,
        requeue_by=requeue_signal(),
        checkpoints=folder / "checkpoints" if trainer.enable_checkpointing is not False else None,
        saver=BestEffortSaver(),
        data_state=data.state_dict,
        start=start,
        **features,
    )
    accelerator.print(
        opening_lines(
            gpt=module.gpt,
            precision=settings.precision,
            processes=accelerator.num_processes,
            device=accelerator.device,
            accumulate_grad_batches=settings.accumulate_grad_batches,
            batch_size=data.batch_size,
            run_folder=relative_to_here(folder),
            seed=cli.seed,
            deterministic=settings.deterministic,
        )
    )
    cli.say_if_it_overfits(module, accelerator.num_processes)
    if shards:
        shard_over_all(module, cli.device, processes)
    try:
        with oom_explained(module, casts_weights="mixed" in settings.precision):
            train(accelerator, module, train_loader, val_loader, settings, observers.in_order())
    finally:
        observers.curves.close()
    if (stopped := observers.stopped()) is not None:
        print_stopped(stopped, arguments)
        accelerator.end_training()
        return stopped.exit_code
    if accelerator.is_main_process:  # it reads the files that this process alone writes
        print(closing_table(observers, folder), flush=True)
    accelerator.end_training()
    if (kept := observers.checkpoints) is not None and kept.unsaved is not None:
        raise kept.unsaved
    return 0


def loaders(
    data: TokenDataModule, processes: int, batches_done: int, val_limit: int | None
) -> tuple[DataLoader, DataLoader]:
    """The loaders of one process, whose batches accelerate deals out to the processes by turns: each process then reads
    what it reads under Lightning. batches_done: of all processes together, before the first one that is read.
    val_limit: batches of a validation, of all processes together"""
    data.position = StreamPosition(batches_done=lambda: batches_done)
    train_loader = data.train_dataloader()
    shares = []
    for rank in range(processes):
        data.position = StreamPosition(rank, processes)
        shares.append(data.val_dataloader(val_limit))
    return train_loader, interleave(shares)
