"""The contract driven by plain PyTorch: what both frameworks are measured against, and what to copy to have neither."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import (
    LoopSettings,
    MeanLoss,
    Observer,
    Parts,
    clipping_order,
    device_of,
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
from nanogpt_lit.runtime.precision import PRECISIONS, dtype_of, scales_gradients
from nanogpt_lit.runtime.process_settings import restored_process_settings, set_for_process

Batch = tuple[Tensor, Tensor]


@restored_process_settings()
def train(
    module: nn.Module,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch],
    settings: LoopSettings,
    observer: Observer = Observer(),  # noqa: B008 - has no state
    scaler: GradScaler | None = None,
    start: RunState | None = None,
    should_stop: Callable[[], bool] = never,
    spikes: SpikeGuard | None = None,
) -> None:
    """Trains the module where it is, up to settings.max_steps optimizer steps.

    Where torch.distributed has a process group, its processes train together, each on loaders of its own: equally many
    batches, or they wait for each other for ever.
    scaler: in place of the usual one for 16-mixed   start: a checkpoint to go on from; the training loader begins with
    the micro-batch that follows   should_stop: asked after each step; where it is true, observer.on_stop may save
    spikes: goes back where the loss jumps
    """
    device = device_of(module)
    if scaler is None:
        scaler = GradScaler(device.type, enabled=scales_gradients(settings.precision))
    dtype = dtype_of(PRECISIONS[settings.precision].autocast)
    # Without a cache of casted weights, as Lightning has it: see accelerate_loop.py.
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
    optimizer, schedule = optimizer_and_schedule(module)
    parameters = clipping_order(optimizer)
    scaler = scaler_beside(parameters, scaler, device)
    distributed = dist.is_available() and dist.is_initialized()
    replica = DistributedDataParallel(module) if distributed else module
    parts = Parts(module, optimizer, schedule, scaler if scaler.is_enabled() else None)
    start_elastic(
        module,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        scaler=parts.scaler,
        device=device,
        say=say,
        fallback=None if start is None else start.elastic,
    )
    rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    batches = step = 0
    if start is not None:
        if spikes is not None:
            spikes.load_state_dict(start.spikes)
        restore(parts, start)
        batches, step = batches_done(start, module, settings.accumulate_grad_batches, processes), start.step
    skipped = SkippedInARow(schedule)
    observer.on_train_start(parts)
    set_for_process(module, device, settings.deterministic)
    seed_dropout(settings.seed, rank)
    if start is not None:
        restore_random_state(start.random, rank, device)
    module.train()
    while step < settings.max_steps:
        for in_epoch, (batch, is_last) in enumerate(with_last(train_loader), start=1):
            tokens, targets = (send(tensor, device) for tensor in batch)
            closes_window = in_epoch % settings.accumulate_grad_batches == 0 or is_last
            # Processes exchange their gradients once a window, in its last backward.
            exchanges = closes_window or not distributed
            with nullcontext() if exchanges else replica.no_sync():  # type: ignore[operator]  # nn.Module has none
                with autocast:
                    loss = replica(tokens, targets)
                scaler.scale(loss / settings.accumulate_grad_batches).backward()
            batches += 1
            if spikes is not None:
                spikes.add_batch(loss / settings.accumulate_grad_batches)
            observer.on_batch_end(loss.detach(), tokens.numel())
            if closes_window:
                scaler.unscale_(optimizer)
                # An infinite limit measures the norm and leaves the gradients alone.
                grad_norm = nn.utils.clip_grad_norm_(parameters, settings.gradient_clip_val or math.inf)
                drop_unless_finite(parameters, grad_norm)
                lr = optimizer.param_groups[0]["lr"]
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                optimizer.zero_grad()
                end_step(module)
                step += 1
                if spikes is not None:
                    spikes.end_step(step, parts)
                observer.on_step_end(step, lr, grad_norm)
                skipped.add(step, parts.loss_scale)
            if settings.validates_after(batches, step):
                observer.on_validation_start()
                with autocast:
                    loss = validate(module, val_loader, settings.limit_val_batches, device)
                observer.on_validation_end(step, loss)
            if step == settings.max_steps:
                break
            if closes_window and should_stop():
                stop_elastic(module)
                observer.on_stop(step)
                return
    stop_elastic(module)
    observer.on_train_end()


@torch.no_grad()
def validate(module: nn.Module, loader: Iterable[Batch], limit: int | None, device: torch.device) -> Tensor:
    """The mean loss over the first `limit` batches of every process, in eval mode."""
    mean = MeanLoss()
    module.eval()
    for batch in itertools.islice(loader, limit):
        tokens, targets = (send(tensor, device) for tensor in batch)
        mean.add(module(tokens, targets), tokens.size(0))
    module.train()
    total, sequences = torch.as_tensor(mean.total, device=device), torch.tensor(mean.sequences, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(sequences)
    return total / sequences


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """As both frameworks do: a card copies pinned memory while this process goes on."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def with_last(loader: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether the loader ends with it. Raises UserError for a loader that has none."""
    batches = iter(loader)
    batch = next(batches, None)
    if batch is None:
        raise UserError("the training loader is empty; its data needs at least one batch.")
    for following in batches:
        yield batch, False
        batch = following
    yield batch, True
