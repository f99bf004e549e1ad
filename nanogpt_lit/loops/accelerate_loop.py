"""The same module under raw accelerate, in accelerate's own idiom.

It is handed a module and knows nothing of Lightning. Where a line departs from accelerate's tutorial, the comment says
what breaks without it.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.data_loader import DataLoaderShard  # type: ignore[import-untyped]
from accelerate.utils import AutocastKwargs, DataLoaderConfiguration  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import (
    LoopSettings,
    MeanLoss,
    Observer,
    Parts,
    clipping_order,
    never,
    optimizer_and_schedule,
    scaler_beside,
    seed_dropout,
)
from nanogpt_lit.memory.elastic import end_step, start_elastic, stop_elastic
from nanogpt_lit.run.curves import say
from nanogpt_lit.run.guards import SkippedInARow, drop_unless_finite
from nanogpt_lit.run.resume import batches_done, restore, restore_random_state
from nanogpt_lit.run.spikes import SpikeGuard
from nanogpt_lit.runtime.precision import IN_ACCELERATE
from nanogpt_lit.runtime.process_settings import restored_process_settings, set_for_process

# accelerate leaves autocast's cache of casted weights on, Lightning 2.6 turns it off. With it, the gradients of a
# weight that a forward uses twice (a head that takes the loss in chunks) are summed in 16 bits; without it, in float32.
AUTOCAST = AutocastKwargs(cache_enabled=False)


def accelerator_options(settings: LoopSettings, device: str) -> dict[str, Any]:
    """The arguments of Accelerator. device: "cpu" keeps to the processor, also under torchrun, where accelerate would
    otherwise start no process group, and every process would train alone."""
    return {
        "mixed_precision": IN_ACCELERATE[settings.precision],
        "gradient_accumulation_steps": settings.accumulate_grad_batches,
        "kwargs_handlers": [AUTOCAST],
        # accelerate would repeat samples until every process has as many batches; ours are dealt out evenly already,
        # and a repeated window would count twice in the validation loss.
        # As Lightning does, a card copies a batch out of pinned memory while this process goes on.
        "dataloader_config": DataLoaderConfiguration(even_batches=False, non_blocking=device == "cuda"),
        "cpu": device == "cpu",
    }


@restored_process_settings()
def train(
    accelerator: Accelerator,
    module: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    settings: LoopSettings,
    observer: Observer = Observer(),  # noqa: B008 - has no state
    start: RunState | None = None,
    should_stop: Callable[[], bool] = never,
    spikes: SpikeGuard | None = None,
) -> None:
    """Trains up to settings.max_steps optimizer steps.

    start: a checkpoint to go on from; the training loader begins with the micro-batch that follows
    should_stop: asked after each step; where it is true, observer.on_stop may save
    spikes: goes back where the loss jumps
    The loaders are those of one process: accelerate deals their batches out, one to each process in turn. It must come
    out even, or the processes wait for each other for ever.
    """
    optimizer, schedule = optimizer_and_schedule(module)
    # Not module.parameters(): the norm would be summed in another order than Lightning's.
    parameters = clipping_order(optimizer)
    if accelerator.scaler is not None:
        module.to(accelerator.device)  # as prepare would; weights that stay in host memory do not follow
        accelerator.scaler = scaler_beside(parameters, accelerator.scaler, accelerator.device)
    parts = Parts(module, optimizer, schedule, accelerator.scaler)
    start_elastic(
        module,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        scaler=parts.scaler,
        device=accelerator.device,
        say=say,
        fallback=None if start is None else start.elastic,
    )
    # Without the schedule: a prepared one steps once per process, so that on two processes the rate falls twice as
    # fast, and it looks for skipped steps where a fused optimizer does not show them. Ours holds still by itself.
    module, optimizer, train_loader, val_loader = accelerator.prepare(module, optimizer, train_loader, val_loader)
    batches = step = 0
    if start is not None:
        if spikes is not None:
            spikes.load_state_dict(start.spikes)
        # Not accelerator.load_state: it reads what only accelerate wrote, and says nothing when a random state is lost.
        restore(parts, start)
        processes, accumulate = accelerator.num_processes, settings.accumulate_grad_batches
        batches, step = batches_done(start, parts.module, accumulate, processes), start.step
    skipped = SkippedInARow(schedule)
    observer.on_train_start(parts)
    set_for_process(parts.module, accelerator.device, settings.deterministic)
    seed_dropout(settings.seed, accelerator.process_index)
    if start is not None:
        restore_random_state(start.random, accelerator.process_index, accelerator.device)
    module.train()
    while step < settings.max_steps:
        for tokens, targets in train_loader:
            with accelerator.accumulate(module):
                loss = module(tokens, targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    # An infinite limit measures the norm and leaves the gradients alone.
                    grad_norm = accelerator.clip_grad_norm_(parameters, settings.gradient_clip_val or math.inf)
                    drop_unless_finite(parameters, grad_norm)
                    lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                if accelerator.sync_gradients:
                    schedule.step()
                optimizer.zero_grad()
            batches += 1
            if spikes is not None:
                spikes.add_batch(loss / settings.accumulate_grad_batches)
            observer.on_batch_end(loss.detach(), tokens.numel())
            if accelerator.sync_gradients:
                end_step(parts.module)
                step += 1
                if spikes is not None:
                    spikes.end_step(step, parts)
                observer.on_step_end(step, lr, grad_norm)
                skipped.add(step, parts.loss_scale)
            if settings.validates_after(batches, step):
                observer.on_validation_start()
                observer.on_validation_end(step, validate(accelerator, module, val_loader, settings.limit_val_batches))
            if step == settings.max_steps:
                break
            if accelerator.sync_gradients and should_stop():
                end(train_loader)
                stop_elastic(parts.module)
                observer.on_stop(step)
                return
        if batches == 0:
            raise UserError("the training loader is empty; its data needs at least one batch.")
    end(train_loader)
    stop_elastic(parts.module)
    observer.on_train_end()


@torch.no_grad()
def validate(accelerator: Accelerator, module: nn.Module, loader: DataLoader, limit: int | None) -> Tensor:
    """The mean loss over the first `limit` batches of every process, in eval mode."""
    mean = MeanLoss()
    module.eval()
    for tokens, targets in itertools.islice(loader, limit):
        mean.add(module(tokens, targets), tokens.size(0))
    end(loader)
    module.train()
    total, sequences = accelerator.reduce((torch.as_tensor(mean.total), torch.tensor(mean.sequences)), "sum")
    return total / sequences


def end(loader: DataLoader) -> None:
    """Tells accelerate that a loader is done with, though it was not read to its end.

    accelerate asks the loader that was started last whether its batches end. One that was left half-way is asked for
    ever: a ragged window at the end of the training loader then takes no step.
    """
    if isinstance(loader, DataLoaderShard):
        loader.end()
