"""Networks that run out of memory where a test says so, under each of the three loops."""

import weakref

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradScalerKwargs
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.loss import IGNORE_INDEX
from nanogpt_lit.gpt.networks import described
from nanogpt_lit.loops import accelerate, reference
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.loops.lightning_plugins import RunFileIO
from nanogpt_lit.loops.lightning_run import LightningRun
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.runs import Case, HalfOnCpu, quiet, trainer_options
from nanogpt_lit.run.observers import RunObservers

B, T, V = 4, 8, 11
ACCUMULATE, STEPS = 2, 3
MICRO_BATCHES = ACCUMULATE * STEPS
GPT = GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=8)
SETTINGS = LoopSettings(
    max_steps=STEPS, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=1.0, val_check_interval=4, seed=5
)
SHORTAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4.00 GiB"


class Fault:
    """A network that computes so many sequences at a time from micro-batch `at` on, and no more."""

    def __init__(self, phase, at=0, fits=2, error=None, until=None):
        self.phase, self.at, self.fits, self.until = phase, at, fits, until
        self.error = error
        self.calls = self.failures = 0
        self.activations = None

    def into(self, module):
        gpt, loss = module.gpt, module.loss

        def faulty(tokens, targets):
            assert self.activations is None or self.activations() is None, "what failed still holds memory"
            grads = torch.is_grad_enabled()
            call = self.calls
            self.calls += grads == (self.phase != "validation")
            fails = call >= self.at and tokens.size(0) > self.fits and not (self.until and self.until(gpt))
            if not fails or grads == (self.phase == "validation"):
                return loss(tokens, targets)
            hook = gpt.blocks[0].register_forward_hook(self._strike)
            try:
                return loss(tokens, targets)
            finally:
                hook.remove()

        module.loss = faulty
        return module

    def _strike(self, block, inputs, output):
        self.activations = weakref.ref(output.untyped_storage())
        if self.phase != "backward":
            self._fail(None)
        # The second block and the head have their gradients then, the first does not.
        output.register_hook(self._fail)

    def _fail(self, gradient):
        self.failures += 1
        raise self.error or torch.OutOfMemoryError(SHORTAGE)


class Diary(Observer):
    def __init__(self):
        self.losses, self.norms, self.validations = [], [], []

    def on_batch_end(self, loss, tokens):
        self.losses.append(loss.item())

    def on_step_end(self, step, lr, grad_norm):
        self.norms.append(grad_norm.item())

    def on_validation_end(self, step, loss):
        self.validations.append(float(loss))


def make_module(gpt=GPT, optim=None, **options):
    torch.manual_seed(0)
    return LitNanoGPT(
        **described(gpt),
        optim=AdamWConfig(lr=0.01, **(optim or {})),
        schedule=ScheduleConfig(warmup_steps=1, total_steps=STEPS),
        **options,
    )


def make_loader(batches, seed, ignored=False):
    windows = torch.randint(0, V, (batches * B, T + 1), generator=torch.Generator().manual_seed(seed))
    tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if ignored:
        targets[1, :5] = IGNORE_INDEX
        targets[4:6] = IGNORE_INDEX  # two whole sequences
    # Without a generator of its own a loader draws from dropout's.
    return DataLoader(TensorDataset(tokens, targets), batch_size=B, generator=torch.Generator())


def run(loop, module, settings=SETTINGS, train=None, val=None, start=None, **scaler):
    """start: the checkpoint that it goes on from, with the loader from its start   scaler: GradScaler's arguments"""
    train, val, diary = train or make_loader(MICRO_BATCHES, 1), val or make_loader(2, 2), Diary()
    quiet()
    observers = [*RunObservers(start=start and load_run(start)).in_order(), diary]
    if loop == "reference":
        grad_scaler = torch.amp.GradScaler("cpu", **scaler) if settings.precision == "16-mixed" else None
        reference.train(module, train, val, settings, observers, grad_scaler)
    elif loop == "accelerate":
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        options = accelerate.accelerator_options(settings, "cpu")
        options["kwargs_handlers"].append(GradScalerKwargs(**scaler))
        accelerator = HalfOnCpu(**options)
        accelerate.train(accelerator, module, train, val, settings, observers)
    else:
        options = trainer_options(Case(settings, GPT, AdamWConfig(), ScheduleConfig(), scaler))
        options["plugins"].append(RunFileIO())
        observed = LightningRun(seed=settings.seed, saves=False, observers=[diary])
        Trainer(**options, callbacks=[observed]).fit(module, train, val, ckpt_path=start)
    return diary


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def near(diary, undisturbed):
    """float32 sums in another order: a loss near 2.4 has steps of 2.4e-7."""
    return (
        diary.losses == pytest.approx(undisturbed.losses, abs=1e-6)
        and diary.norms == pytest.approx(undisturbed.norms, rel=1e-5)
        and diary.validations == pytest.approx(undisturbed.validations, abs=1e-6)
    )
