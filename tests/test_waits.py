"""How often a step waits for its device: each reading of a number from a tensor is a wait on a GPU."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from nanogpt_lit.loops import accelerate, reference
from nanogpt_lit.loops.contract import LoopSettings, send
from nanogpt_lit.loops.lightning_run import LightningRun
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.runs import HalfOnCpu, lightning_precision
from nanogpt_lit.run.observers import RunObservers

STEPS, ACCUMULATE = 5, 3


class Waits(TorchDispatchMode):
    """Counts what item(), float(), bool() and tolist() of a tensor all come to, by micro-batch."""

    def __init__(self, module):
        super().__init__()
        self.by_batch = []
        module.register_forward_pre_hook(lambda *args: self.by_batch.append(0))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and self.by_batch:
            self.by_batch[-1] += 1
        return func(*args, **(kwargs or {}))


FEATURES = {"log_every_n_steps": 100, "shows_progress": True}  # the first and the last step are logged all the same


def features():
    """What every run of ours has."""
    return RunObservers(**FEATURES)


def plain(module, loader, settings, folder):
    reference.train(module, loader, [], settings, features().in_order())


def accelerated(module, loader, settings, folder):
    accelerator = HalfOnCpu(**accelerate.accelerator_options(settings, "cpu"))
    accelerate.train(accelerator, module, loader, loader, settings, features().in_order())


def lightning(module, loader, settings, folder):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        plugins=[lightning_precision(settings.precision, {})],
        logger=False,
        callbacks=[LightningRun(saves=False, **FEATURES)],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, loader)


# Under float16 the fused optimizer skips inside its kernel, and the schedule asks whether it did.
WAITS = {"32-true": 1, "bf16-mixed": 1, "16-mixed": 2}


@pytest.mark.parametrize("precision", WAITS)
@pytest.mark.parametrize("train", [plain, accelerated, lightning])
def test_a_step_waits_to_see_that_its_gradients_are_finite_and_a_micro_batch_never(
    train, precision, tiny_gpt, tmp_path
):
    module = LitNanoGPT(tiny_gpt, AdamWConfig(), ScheduleConfig(warmup_steps=2, total_steps=STEPS))
    windows = torch.randint(0, 11, (STEPS * ACCUMULATE, 2, 9), generator=torch.Generator().manual_seed(1))
    loader = DataLoader([(w[:, :-1], w[:, 1:]) for w in windows], batch_size=None)
    settings = LoopSettings(STEPS, ACCUMULATE, gradient_clip_val=0.5, precision=precision)
    with Waits(module) as waits:
        train(module, loader, settings, tmp_path)
    assert len(waits.by_batch) == STEPS * ACCUMULATE
    between = waits.by_batch[ACCUMULATE:-ACCUMULATE]  # the first and the last step are drawn
    assert between == ([0] * (ACCUMULATE - 1) + [WAITS[precision]]) * (STEPS - 2)


class Noted:
    """In the place of a tensor: how it was sent."""

    def to(self, device, non_blocking):
        return device.type, non_blocking


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_card_copies_a_batch_while_the_process_goes_on(kind):
    assert send(Noted(), torch.device(kind)) == (kind, kind == "cuda")
    options = accelerate.accelerator_options(LoopSettings(1), kind)
    assert options["dataloader_config"].non_blocking is (kind == "cuda")
