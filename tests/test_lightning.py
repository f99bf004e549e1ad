import copy

import pytest
import torch
from lightning.pytorch import Trainer, strategies
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.utils.data import DataLoader, TensorDataset

from nanogpt_lit.loops.lightning import FullPrecision, MixedPrecision, precision_plugin
from nanogpt_lit.loops.lightning_plugins import RunFileIO, run_plugins
from nanogpt_lit.loops.lightning_sharded import ShardedStrategy
from nanogpt_lit.loops.trainer_section import PLANNED, named_strategy
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig

STEPS, ACCUMULATE = 8, 2


def make(tiny_gpt, implementation):
    torch.manual_seed(0)
    optim = AdamWConfig(lr=0.05, implementation=implementation)
    module = LitNanoGPT(tiny_gpt, optim, ScheduleConfig(warmup_steps=2, total_steps=STEPS))
    windows = torch.randint(0, 11, (STEPS * ACCUMULATE * 2, 9), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()), batch_size=2)
    return module, loader


def fit(module, loader, plugin, clip):
    norms = []

    class Norms(LitNanoGPT):
        def on_train_batch_end(self, *args):
            norms.append(plugin.grad_norm)

    module.on_train_batch_end = Norms.on_train_batch_end.__get__(module)
    Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=clip, plugins=[plugin],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader)  # fmt: skip
    return norms[ACCUMULATE - 1 :: ACCUMULATE]


def plain_loop(module, loader, dtype, scaler, clip):
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    norms = []
    for k, batch in enumerate(loader, start=1):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            loss = module(*batch) / ACCUMULATE
        (scaler.scale(loss) if scaler else loss).backward()
        if k % ACCUMULATE == 0:
            if scaler:
                scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip))
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return norms, schedule


@pytest.mark.parametrize("implementation", ["for-loop", "fused"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_clipping_works_with_every_optimizer_and_gives_the_bits_of_a_plain_loop(tiny_gpt, precision, implementation):
    module, loader = make(tiny_gpt, implementation)
    plain = copy.deepcopy(module)
    dtype = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    # A real scaler on the processor. This scale overflows float16 at first, so that steps are skipped.
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**21, growth_interval=3) for _ in range(2)]
    if precision == "16-mixed":
        plugin = MixedPrecision("16-mixed", "cpu", scalers[0])
    else:
        plugin = precision_plugin(precision, "cpu")
        scalers = [None, None]
    norms = fit(module, loader, plugin, clip=0.5)
    plain_norms, schedule = plain_loop(plain, loader, dtype, scalers[1], clip=0.5)

    for (name, ours), theirs in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs[1]), name
    norms, plain_norms = torch.stack(norms), torch.stack(plain_norms)
    assert torch.equal(norms.nan_to_num(-1), plain_norms.nan_to_num(-1))  # nan: the gradients of a skipped step
    assert norms.nan_to_num(-1).max() > 0.5  # something was clipped
    if precision == "16-mixed":
        assert 0 < schedule.skipped_steps < STEPS
        assert scalers[0].state_dict() == scalers[1].state_dict()


def test_lightning_still_refuses_what_the_plugin_is_there_for(tiny_gpt):
    # When this goes green the other way, the plugin has lost one of its reasons.
    module, loader = make(tiny_gpt, "fused")
    plugin = LightningMixedPrecision("bf16-mixed", "cpu")
    plugin.grad_norm = None
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(module, loader, plugin, clip=0.5)


def test_a_stock_trainer_finds_the_scaler_state_in_our_checkpoint():
    assert MixedPrecision.__qualname__ == LightningMixedPrecision.__qualname__


def test_precisions_that_lightning_handles_alone_are_left_to_it():
    assert isinstance(precision_plugin("32-true", "cpu"), FullPrecision)
    assert precision_plugin("64-true", "cpu") is None
    assert precision_plugin("bf16-true", "cpu") is None


def test_a_run_adds_to_the_users_plugins_a_precision_and_a_writer_where_they_have_none():
    own_writer, own_precision = TorchCheckpointIO(), LightningMixedPrecision("bf16-mixed", "cpu")
    for given, kinds in (
        (None, [MixedPrecision, RunFileIO]),
        (own_writer, [TorchCheckpointIO, MixedPrecision]),
        ([own_precision], [LightningMixedPrecision, RunFileIO]),
        ([own_precision, own_writer], [LightningMixedPrecision, TorchCheckpointIO]),
    ):
        assert [type(plugin) for plugin in run_plugins(given, "bf16-mixed", "cpu")["plugins"]] == kinds
    assert run_plugins(None, "bf16-mixed", "cpu")["precision"] is None  # Lightning refuses it beside a plugin
    assert run_plugins(None, "bf16-true", "cpu")["precision"] == "bf16-true"


@pytest.mark.parametrize(
    ("strategy", "planned"),
    [
        (strategies.SingleDeviceStrategy("cpu"), "single"),
        (strategies.DDPStrategy(), "ddp"),
        (ShardedStrategy(), "fsdp2"),
        (strategies.FSDPStrategy(), None),
        (object.__new__(strategies.DeepSpeedStrategy), None),  # a DDPStrategy, that allocates otherwise
    ],
)
def test_a_run_is_planned_by_the_strategy_that_its_trainer_has(strategy, planned):
    assert PLANNED.get(named_strategy(strategy) or "") == planned


def test_lightning_keeps_the_arguments_of_ddp_where_the_plan_of_a_run_looks_for_them():
    assert strategies.DDPStrategy(bucket_cap_mb=5)._ddp_kwargs == {"bucket_cap_mb": 5}
