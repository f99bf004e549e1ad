"""The contract driven by plain PyTorch: what a training loop is, what both frameworks are measured against, and what to
copy to have neither."""

import itertools
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from nanogpt_lit.loops import contract
from nanogpt_lit.loops.contract import Batch, LoopSettings, MeanLoss, Observer, Training, send, with_last


def train(
    module: nn.Module,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch],
    settings: LoopSettings,
    observers: Sequence[Observer] = (),
    scaler: GradScaler | None = None,
) -> None:
    """Trains the module where it is, up to settings.max_steps optimizer steps.

    Where torch.distributed has a process group, its processes train together, each on loaders of its own: equally many
    batches, or they wait for each other for ever.   scaler: in place of the usual one for 16-mixed
    """
    device = contract.device_of(module)
    autocast = contract.autocast_for(settings, device)
    optimizer, schedule = contract.optimizer_and_schedule(module)
    parameters = contract.clipping_order(optimizer)
    scaler = contract.scaler_beside(parameters, scaler or contract.scaler_for(settings, device), device)
    distributed = dist.is_available() and dist.is_initialized()
    # Processes exchange their gradients once a window, in its last backward, or after each, where each keeps a share.
    replica = (
        DistributedDataParallel(module) if distributed and not contract.any_sharded(module.parameters()) else module
    )
    rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    used_scaler = scaler if scaler.is_enabled() else None
    training = Training(module, optimizer, schedule, used_scaler, settings, device, rank, processes)
    with contract.running(training, observers) as observer:
        module.train()
        while training.step < settings.max_steps and not training.is_stopped:
            for in_epoch, (batch, is_last) in enumerate(with_last(train_loader), start=1):
                tokens, targets = (send(tensor, device) for tensor in batch)
                closes_window = in_epoch % settings.accumulate_grad_batches == 0 or is_last
                exchanges = closes_window or replica is module
                with nullcontext() if exchanges else replica.no_sync():  # type: ignore[operator]  # nn.Module has none
                    with autocast:
                        loss = replica(tokens, targets)
                    scaler.scale(loss / settings.accumulate_grad_batches).backward()
                training.batches += 1
                observer.on_batch_end(loss.detach(), tokens.numel())
                if closes_window:
                    scaler.unscale_(optimizer)
                    # An infinite limit measures the norm and leaves the gradients alone.
                    grad_norm = nn.utils.clip_grad_norm_(parameters, settings.gradient_clip_val or math.inf)
                    grad_norm = contract.whole(grad_norm)
                    observer.on_before_step(grad_norm)
                    lr = optimizer.param_groups[0]["lr"]
                    scaler.step(optimizer)
                    scaler.update()
                    schedule.step()
                    optimizer.zero_grad()
                    training.step += 1
                    observer.on_step_end(training.step, lr, grad_norm)
                if settings.validates_after(training.batches, training.step):
                    observer.on_validation_start()
                    with autocast:
                        val_loss = validate(module, val_loader, settings.limit_val_batches, device)
                    observer.on_validation_end(training.step, val_loss)
                if training.step == settings.max_steps:
                    break
                if closes_window and observer.between_steps(training.step):
                    training.is_stopped = True
                    break


@torch.no_grad()
def validate(module: nn.Module, loader: Iterable[Batch], limit: int | None, device: torch.device) -> Tensor:
    """The mean loss over the first `limit` batches of each process's loader, in eval mode."""
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
