import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig

STEPS, ACCUMULATE, CLIP = 6, 3, 0.5


@pytest.fixture
def module(tiny_gpt):
    torch.manual_seed(0)
    return LitNanoGPT(tiny_gpt, AdamWConfig(lr=0.05), ScheduleConfig(warmup_steps=2, total_steps=STEPS))


@pytest.fixture
def batches():
    windows = torch.randint(0, 11, (STEPS * ACCUMULATE * 2, 9), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()), batch_size=2)


def quiet_trainer(**settings):
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


def test_forward_and_configure_optimizers_need_no_trainer(module, batches):
    tokens, targets = next(iter(batches))
    loss = module(tokens, targets)
    loss.backward()
    configured = module.configure_optimizers()
    configured["optimizer"].step()
    configured["lr_scheduler"]["scheduler"].step()
    assert loss.shape == ()
    assert torch.equal(module.training_step((tokens, targets), 0), module(tokens, targets))


def test_the_trainer_gives_the_bits_of_a_plain_loop(module, batches):
    plain = copy.deepcopy(module)
    configured = plain.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for k, batch in enumerate(batches, start=1):
        (plain(*batch) / ACCUMULATE).backward()
        if k % ACCUMULATE == 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=CLIP)
    trainer.fit(module, batches)

    assert trainer.global_step == STEPS
    for (name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_validation_loss_is_the_mean_over_sequences_even_when_the_last_batch_is_short(module):
    windows = torch.randint(0, 11, (5, 9), generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()), batch_size=2)
    (measured,) = quiet_trainer().validate(module, loader, verbose=False)
    module.eval()
    with torch.no_grad():
        one_by_one = torch.stack([module(w[None, :-1], w[None, 1:]) for w in windows]).mean()
    # The same mean summed in another order, in float32.
    assert measured["val/loss"] == pytest.approx(one_by_one.item(), rel=1e-6)


def test_a_checkpoint_loads_with_plain_weights_only_and_with_lightning(module, batches, tmp_path):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, batches)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]["gpt"]["n_embd"] == 8
    loaded = LitNanoGPT.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.gpt.config == module.gpt.config
    assert all(map(torch.equal, loaded.parameters(), module.parameters()))


def test_a_checkpoint_of_a_compiled_network_has_the_same_keys_and_loads_without(tiny_gpt, module):
    compiled = LitNanoGPT(tiny_gpt, compile=True)
    assert compiled.state_dict().keys() == module.state_dict().keys()
    module.load_state_dict(compiled.state_dict())
    assert all(map(torch.equal, compiled.parameters(), module.parameters()))


def test_a_checkpoint_of_another_network_is_refused_by_name(module, tiny_gpt, batches, tmp_path):
    other = LitNanoGPT(replace(tiny_gpt, n_embd=16), module.optim_config, module.schedule_config)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(other, batches)
    trainer.save_checkpoint(tmp_path / "wide.ckpt")
    with pytest.raises(ValueError, match=r"model\.gpt\.n_embd is 16 there and 8 here"):
        quiet_trainer(max_epochs=2).fit(module, batches, ckpt_path=tmp_path / "wide.ckpt")
