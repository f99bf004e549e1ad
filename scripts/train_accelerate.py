"""Trains from the YAML of `python -m nanogpt_lit fit`, under raw accelerate instead of Lightning's Trainer.

    accelerate launch scripts/train_accelerate.py --config configs/rtx2050.yaml
    python scripts/train_accelerate.py --config configs/quickstart.yaml --trainer.max_steps 100
    python scripts/train_accelerate.py --config configs/quickstart.yaml --ckpt_path last.safetensors
    python -m nanogpt_lit keep-alive scripts/train_accelerate.py --config configs/rtx2050.yaml

Every option of fit works here, or is refused when only the Trainer could follow it. The run is
default_root_dir/accelerate_N, beside fit's version_N, so that TensorBoard lays their curves over each other. The loop
is nanogpt_lit/loops/accelerate_loop.py.
"""

import os
import sys
from pathlib import Path

from accelerate import Accelerator  # type: ignore[import-untyped]
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from nanogpt_lit.__main__ import exit_code
from nanogpt_lit.checkpoint import disk
from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning, relative_to_here
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.interleave import interleave
from nanogpt_lit.data.sampler import Position
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.accelerate_environment import (
    check_environment,
    check_processes,
    check_running,
    launched_processes,
)
from nanogpt_lit.loops.accelerate_loop import accelerator_options, train
from nanogpt_lit.loops.compatibility import check_followed
from nanogpt_lit.loops.contract import Observer
from nanogpt_lit.loops.lightning_callbacks import TextSamples
from nanogpt_lit.loops.trainer_section import (
    asked_processes,
    loop_settings,
    text_samples,
)
from nanogpt_lit.memory.oom import oom_explained
from nanogpt_lit.run.guards import NotFinite, give_up
from nanogpt_lit.run.journal import Journal, OtherProcess, next_folder
from nanogpt_lit.run.pieces import keep_config
from nanogpt_lit.run.report import closing_table, opening_lines
from nanogpt_lit.run.resume import batches_done, check_network, load_together
from nanogpt_lit.run.stops import Reason, Stopped, Stops, go_on_line, seconds_of
from nanogpt_lit.runtime.clock import awake_s
from nanogpt_lit.runtime.environment import requeue, requeue_signal
from nanogpt_lit.runtime.machine import device_type
from nanogpt_lit.runtime.precision import full_precision_name
from nanogpt_lit.runtime.processes import broadcast
from nanogpt_lit.runtime.supervised import stop_with_supervisor, supervised


class AccelerateCLI(SettingsCLI):
    """The options of fit, with its --ckpt_path."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint to go on from.")


def main(arguments: list[str]) -> int:
    quiet_lightning()
    lock = RunLock()
    try:
        return run(AccelerateCLI(arguments, lock=lock), lock, arguments)
    finally:
        lock.release()


def run(cli: AccelerateCLI, lock: RunLock, arguments: list[str]) -> int:
    trainer = cli.settings.trainer
    remark = check_environment(
        full_precision_name(trainer.precision),
        trainer.accumulate_grad_batches,
        device_type(trainer.accelerator),
        os.environ,
    )
    check_followed(vars(trainer), full_precision_name(trainer.precision), vars(cli.parser.get_defaults().trainer))
    processes = launched_processes(os.environ)
    check_processes(asked_processes(vars(trainer)), processes)
    cli.complete_settings()
    module, data = cli.build()
    data.setup()
    train_loader, val_loader = loaders(data, processes, 0)
    settings = loop_settings(vars(trainer), val_batches=len(val_loader) // processes, seed=cli.seed)

    accelerator = Accelerator(**accelerator_options(settings, cli.device))
    check_running(processes, accelerator.num_processes)
    start = load_together(Path(cli.settings.ckpt_path) if cli.settings.ckpt_path else None)
    if start is not None:  # before there is a folder
        data.load_state_dict(dict(start.data))
        train_loader, val_loader = loaders(data, processes, start.batches * start.processes)
        check_network(module, start)
        batches_done(start, module, settings.accumulate_grad_batches, accelerator.num_processes)
    if remark is not None:
        accelerator.print(remark)

    samples = TextSamples(**text_samples(vars(trainer)))
    samples.check(data)
    saves = trainer.enable_checkpointing is not False
    every = trainer.log_every_n_steps
    observer: Observer = OtherProcess(
        settings,
        log_every_n_steps=every,
        device=accelerator.device,
        saves=saves,
        batches=start.batches * start.processes // accelerator.num_processes if start is not None else 0,
        save_times=cli.save_times,
    )
    cli.say_what_changed()
    resumed = cli.resumed.run_folder if cli.resumed is not None else None
    folder = broadcast(resumed or next_folder(Path(trainer.default_root_dir), "accelerate"))
    if accelerator.is_main_process:
        lock.acquire(folder)
        observer = journal = Journal(
            folder,
            settings,
            log_every_n_steps=every,
            processes=accelerator.num_processes,
            device=accelerator.device,
            show_progress=trainer.enable_progress_bar is not False,
            write_sample=lambda: samples.write(module, data),
            data_state=data.state_dict if saves else None,
            start=start,
            spikes=cli.spikes,
            save_times=cli.save_times,
        )
        keep_config(folder, cli.kept_settings())
        journal.add_text("config", cli.kept_settings())
    accelerator.print(
        opening_lines(
            gpt=module.gpt,
            precision=settings.precision,
            processes=accelerator.num_processes,
            device=accelerator.device,
            accumulate_grad_batches=settings.accumulate_grad_batches,
            batch_size=data.batch_size,
            run_folder=relative_to_here(str(folder)),
            seed=cli.seed,
            deterministic=settings.deterministic,
        )
    )
    if cli.spikes is not None:
        cli.spikes.folder = folder / "checkpoints"
    started_s = awake_s()
    try:
        with (
            Stops(folder, seconds_of(trainer.max_time), requeue_by=requeue_signal()) as stops,
            oom_explained(module, casts_weights="mixed" in settings.precision),
        ):
            train(accelerator, module, train_loader, val_loader, settings, observer, start, stops.asked, cli.spikes)
    except NotFinite as error:
        last = observer.checkpoints.get("last") if isinstance(observer, Journal) else None
        give_up(error, last and relative_to_here(last))
    finally:
        if isinstance(observer, Journal):
            observer.close()
    unsaved = None
    try:
        if isinstance(observer, Journal):
            observer.saver.insist(disk.END_S if stops.reason is None else disk.STOP_S)
    except UserError as error:
        unsaved = error
    if stops.reason is not None:
        code = stops.reason.exit_code
        if isinstance(observer, Journal):
            last = observer.checkpoints.get("last") if unsaved is None else None
            stopped = Stopped(stops.reason, observer.step, last and relative_to_here(last), saves)
            code = stopped.exit_code
            print(stopped, flush=True)
            if last is not None:
                print(go_on_line([sys.argv[0]], arguments), flush=True)
            if stops.reason is Reason.PREEMPTED:
                print(requeue(), flush=True)  # the job ends with it
        accelerator.end_training()
        return code
    if isinstance(observer, Journal):
        print(
            closing_table(
                steps=observer.step,
                elapsed_s=awake_s() - started_s,
                meter=observer.meter,
                validations=observer.validations,
                sample=observer.sample,
                checkpoints={name: relative_to_here(path) for name, path in observer.checkpoints.items()},
                run_folder=Path(relative_to_here(str(folder))),
            )
        )
    accelerator.end_training()
    if unsaved is not None:
        raise unsaved
    return 0


def loaders(data: TokenDataModule, processes: int, batches_done: int) -> tuple[DataLoader, DataLoader]:
    """The loaders of one process, whose batches accelerate deals out to the processes by turns: each process then reads
    what it reads under Lightning. batches_done: of all processes together, before the first one that is read"""
    data.position = Position(batches_done=lambda: batches_done)
    train_loader = data.train_dataloader()
    shares = []
    for rank in range(processes):
        data.position = Position(rank, processes)
        shares.append(data.val_dataloader())
    return train_loader, interleave(shares)


if __name__ == "__main__":
    if supervised():
        stop_with_supervisor()
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
