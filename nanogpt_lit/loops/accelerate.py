"""The same module under raw accelerate, in accelerate's own idiom.

It is handed a module and knows nothing of Lightning. Where a line departs from accelerate's tutorial, the comment says
what breaks without it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.data_loader import DataLoaderShard  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.accelerate_sharded import ShardingAccelerator as ShardingAccelerator
from nanogpt_lit.loops.accelerate_sharded import deepspeed, fsdp2
from nanogpt_lit.loops.contract import (
    EMPTY_LOADER,
    LoopSettings,
    MeanLoss,
    Observer,
    Training,
    any_sharded,
    check_precision,
    clipping_order,
    optimizer_and_schedule,
    running,
    scaler_beside,
    whole,
)
from nanogpt_lit.loops.sharded import ZeroStep
from nanogpt_lit.runtime.precision import IN_ACCELERATE

PLANNED: dict[str, Literal["single", "ddp", "fsdp2"]] = {
    DistributedType.NO: "single",
    DistributedType.MULTI_GPU: "ddp",
    DistributedType.MULTI_CPU: "ddp",
    DistributedType.FSDP: "fsdp2",
}
"""Names, in a plan, of the ways in which accelerate spreads a module, where a plan knows them."""

# accelerate leaves autocast's cache of casted weights on, Lightning 2.6 turns it off. With it, the gradients of a
# weight that a forward uses twice (a head that takes the loss in chunks) are summed in 16 bits; without it, in float32.
AUTOCAST = AutocastKwargs(cache_enabled=False)


def accelerator_options(
    settings: LoopSettings, device: str, shards: bool = False, zero: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of Accelerator. device: "cpu" keeps to the CPU, also under torchrun, where accelerate would
    otherwise start no process group, and every process would train alone.
    shards: by FSDP2, of a module that is sharded before it is trained

    Raises UserError for a precision that needs Lightning.
    """
    check_precision(settings)
    # accelerate would keep whole gradients until a window ends, which FSDP2 is there to save, and adds them up in
    # another order than Lightning, which shares them out after each micro-batch.
    accumulation = GradientAccumulationPlugin(num_steps=settings.accumulate_grad_batches, sync_each_batch=shards)
    return {
        "mixed_precision": IN_ACCELERATE[settings.precision] if zero is None else "no",
        "gradient_accumulation_plugin": accumulation,
        "kwargs_handlers": [AUTOCAST],
        # accelerate would repeat samples until every process has as many batches; ours are dealt out evenly already,
        # and a repeated window would count twice in the validation loss.
        # As Lightning does, a GPU copies a batch out of pinned memory while this process goes on.
        "dataloader_config": DataLoaderConfiguration(even_batches=False, non_blocking=device == "cuda"),
        "cpu": device == "cpu",
        "fsdp_plugin": fsdp2() if shards else None,
        "deepspeed_plugin": None if zero is None else deepspeed(settings, zero),
    }


def train(
    accelerator: Accelerator,
    module: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    settings: LoopSettings,
    observers: Sequence[Observer] = (),
) -> None:
    """Trains up to settings.max_steps optimizer steps.

    The loaders are those of one process: accelerate deals their batches out, one to each process in turn. It must come
    out even, or the processes wait for each other for ever.
    """
    optimizer, schedule = optimizer_and_schedule(module)
    if accelerator.scaler is not None:
        module.to(accelerator.device)  # as prepare would; weights that stay in host memory do not follow
        accelerator.scaler = scaler_beside(clipping_order(optimizer), accelerator.scaler, accelerator.device)
    rank, processes = accelerator.process_index, accelerator.num_processes
    training = Training(
        module,
        optimizer,
        schedule,
        accelerator.scaler,
        settings,
        accelerator.device,
        rank,
        processes,
        strategy=PLANNED.get(accelerator.distributed_type),
    )
    own = [group["params"][:] for group in optimizer.param_groups] if any_sharded(module.parameters()) else []
    zero: Any = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = ZeroStep(module, optimizer, settings.precision, accelerator.device)
        training.optimizer = zero
    # Without the schedule: a prepared one steps once per process, so that on two processes the rate falls twice as
    # fast, and it looks for skipped steps where a fused optimizer does not show them. Ours holds still by itself.
    module, optimizer, train_loader, val_loader = accelerator.prepare(module, optimizer, train_loader, val_loader)
    if zero is not None:
        zero.connect(accelerator.deepspeed_engine_wrapped.engine)
    # accelerate knows parameters by their addresses, and those of which this process has an empty share have the same.
    for group, parameters in zip(optimizer.param_groups, own, strict=False):
        group["params"] = parameters
    # Not module.parameters(): the norm would be summed in another order than Lightning's.
    parameters = clipping_order(optimizer)
    with running(training, observers) as observer:
        if zero is not None:
            zero.listeners = observer.listeners("on_before_step")
        module.train()
        while training.step < settings.max_steps and not training.is_stopped:
            for tokens, targets in train_loader:
                with accelerator.accumulate(module):
                    with accelerator.autocast():  # in which prepare wraps any module but that of FSDP2
                        loss = module(tokens, targets)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and zero is not None:
                        grad_norm = zero.stepped()
                        lr = optimizer.param_groups[0]["lr"]
                    elif accelerator.sync_gradients:
                        # An infinite limit measures the norm and leaves the gradients alone.
                        # Not accelerator.clip_grad_norm_, which under FSDP2 knows no order but the module's.
                        accelerator.unscale_gradients()
                        grad_norm = whole(nn.utils.clip_grad_norm_(parameters, settings.gradient_clip_val or math.inf))
                        observer.on_before_step(grad_norm)
                        lr = optimizer.param_groups[0]["lr"]
                    optimizer.step()
                    if accelerator.sync_gradients:
                        schedule.step()
                    optimizer.zero_grad()
                training.batches += 1
                observer.on_batch_end(loss.detach(), tokens.numel())
                if accelerator.sync_gradients:
                    training.step += 1
                    observer.on_step_end(training.step, lr, grad_norm)
                if settings.validates_after(training.batches, training.step):
                    observer.on_validation_start()
                    val_loss = validate(accelerator, module, val_loader, settings.limit_val_batches)
                    observer.on_validation_end(training.step, val_loss)
                if training.step == settings.max_steps:
                    break
                if accelerator.sync_gradients and observer.between_steps(training.step):
                    training.is_stopped = True
                    break
            if training.batches == 0:
                raise UserError(EMPTY_LOADER)
        end(train_loader)


@torch.no_grad()
def validate(accelerator: Accelerator, module: nn.Module, loader: DataLoader, limit: int | None) -> Tensor:
    """The mean loss over the first `limit` batches of each process's loader, in eval mode."""
    mean = MeanLoss()
    module.eval()
    for tokens, targets in itertools.islice(loader, limit):
        with accelerator.autocast():
            mean.add(module(tokens, targets), tokens.size(0))
    end(loader)
    module.train()
    total, sequences = accelerator.reduce((torch.as_tensor(mean.total), torch.tensor(mean.sequences)), "sum")
    return total / sequences


def end(loader: DataLoader) -> None:
    """Tell accelerate that a loader is done with, though it was not read to its end.

    accelerate asks the loader that was started last whether its batches end. One that was left half-way is asked for
    ever: a ragged window at the end of the training loader then takes no step.
    """
    if isinstance(loader, DataLoaderShard):
        loader.end()
