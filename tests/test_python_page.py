"""The programs of docs/python.md, beside `fit` with the same settings."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from page_commands import blocks_of, run_script
from small_runs import curves, fit

import nanogpt_lit
from nanogpt_lit import GPTConfig, LitNanoGPT, ScheduleConfig, TokenDataModule, trainer_options
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.errors import UserError
from nanogpt_lit.optim.schedule import warmup_decay
from nanogpt_lit.run.stops import Stopped

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
WITH_TRAINER, WITH_ACCELERATOR = (text for language, text in blocks_of(PAGE) if language == "python")
UNLESS_WARNED = "import warnings; warnings.filterwarnings('error', message='.*masks of dropout')\n"
SAVE = "\nimport torch; torch.save(module.state_dict(), 'runs/mine.pt')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("python_page")
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "a.txt").write_text(text.read_text())
    (folder / "my_texts" / "b.txt").write_text(text.read_text().upper())
    return folder


def run(program, folder):
    run_script(UNLESS_WARNED + program, folder, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")


def weights_of_fit(folder, *more):
    root = folder / "fit"
    options = [
        f"--data.source={folder / 'my_texts'}", "--data.tokenizer=byte", f"--data.shards_dir={folder / 'runs/shards'}",
        "--data.block_size=64", "--data.batch_size=8", "--model.gpt.n_layer=2", "--model.gpt.n_head=2",
        "--model.gpt.n_embd=64", "--model.schedule.warmup_steps=5", "--trainer.max_steps=20",
        "--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=20",
        f"--trainer.default_root_dir={root}", *more,
    ]  # fmt: skip
    assert fit(*options) == 0
    newest = max(root.glob("version_*"), key=lambda version: version.stat().st_mtime_ns)
    return load_run(newest / "checkpoints" / "last.safetensors").weights


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def of_a_trainer(folder):
    """The weights of the page's first program."""
    run(WITH_TRAINER, folder)
    return load_run(folder / "runs" / "mine.safetensors").weights


def test_a_trainer_of_ones_own_trains_to_the_bits_of_fit(folder, of_a_trainer):
    assert_same(of_a_trainer, weights_of_fit(folder, "--trainer.precision=bf16-mixed", "--model.gpt.dropout=0.1"))


def test_a_trainer_of_ones_own_resumes_to_the_bit(folder, of_a_trainer):
    first_half = WITH_TRAINER.replace("max_steps=20", "max_steps=10")
    run(first_half.replace("ScheduleConfig(", "ScheduleConfig(total_steps=20, "), folder)
    half = load_run(folder / "runs" / "mine.safetensors")
    assert half.step == 10
    resumed = WITH_TRAINER.replace(
        "trainer.fit(module, data)", "trainer.fit(module, data, ckpt_path='runs/mine.safetensors')"
    )
    run(resumed, folder)
    assert_same(load_run(folder / "runs" / "mine.safetensors").weights, of_a_trainer)


def test_an_accelerator_of_ones_own_trains_to_the_bits_of_fit(folder):
    run(WITH_ACCELERATOR + SAVE, folder)
    assert_same(torch.load(folder / "runs" / "mine.pt"), weights_of_fit(folder))


def test_a_trainer_that_would_not_end_is_refused(folder):
    data, module = small(folder)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="the order of samples is endless; give it max_steps=1000"):
        trainer.fit(module, data)


def test_a_trainer_that_would_validate_nothing_warns(folder):
    data, module = small(folder)
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="check_val_every_n_epoch=None and val_check_interval"):
        trainer.fit(module, data)


def test_a_network_that_lacks_tokens_is_refused_before_the_first_step(folder):
    data, module = small(folder, vocab_size=100)
    trainer = Trainer(**trainer_options(accelerator="cpu", max_steps=1, logger=False, default_root_dir=folder))
    with pytest.raises(UserError, match="vocab_size=100 is smaller than the 257"):
        trainer.fit(module, data)


def test_the_learning_rate_decays_over_the_steps_of_whichever_trainer_it_is(folder):
    data, module = small(folder)
    stock = {"accelerator": "cpu", "logger": False, "limit_val_batches": 0, "enable_checkpointing": False}
    data.prepare_data()
    data.setup()
    own_data = [data.train_dataloader()]
    ours = trainer_options(max_steps=4, default_root_dir=folder, **stock)
    for steps, options, given in ((3, {"max_steps": 3, **stock}, [data]), (4, ours, own_data)):
        trainer = Trainer(**options)
        trainer.fit(module, *given)
        (schedule,) = (config.scheduler for config in trainer.lr_scheduler_configs)
        wanted = warmup_decay(steps, ScheduleConfig(warmup_steps=1, total_steps=steps))
        assert schedule.get_last_lr() == [module.optim_config.lr * wanted] * len(trainer.optimizers[0].param_groups)
        assert module.hparams["schedule"]["total_steps"] == steps  # in the checkpoint


def test_a_schedule_of_another_length_than_the_run_stays_and_warns(folder):
    data, module = small(folder, schedule=ScheduleConfig(total_steps=1000))
    trainer = Trainer(**trainer_options(accelerator="cpu", max_steps=2, logger=False, default_root_dir=folder))
    with pytest.warns(UserWarning, match="total_steps=1000 and the Trainer max_steps=2"):
        trainer.fit(module, data)
    assert module.schedule_config.total_steps == 1000


def test_a_stock_trainer_says_that_it_resumes_with_other_masks_of_dropout(folder, tmp_path):
    stock = {"accelerator": "cpu", "logger": False, "limit_val_batches": 0, "default_root_dir": tmp_path}

    def trained(dropout):
        data, module = small(folder, dropout=dropout)
        Trainer(max_steps=1, enable_checkpointing=False, **stock).fit(module, data)
        module.trainer.save_checkpoint(tmp_path / "stock.ckpt")
        Trainer(max_steps=2, **stock).fit(module, data, ckpt_path=tmp_path / "stock.ckpt")

    with pytest.warns(UserWarning, match=r"other masks of dropout=0\.1 .*trainer_options"):
        trained(0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*masks of dropout")
        trained(0.0)


def test_a_trainer_of_ones_own_draws_as_often_as_it_is_asked_to_and_keeps_its_plugins(folder):
    data, module = small(folder)
    writer = TorchCheckpointIO()
    options = trainer_options(
        accelerator="cpu", max_steps=3, log_every_n_steps=1, plugins=[writer], default_root_dir=folder / "often"
    )
    trainer = Trainer(**options)
    trainer.fit(module, data)
    assert [step for tag, step in curves(Path(trainer.log_dir)) if tag == "train/loss"] == [1, 2, 3]
    assert trainer.strategy.checkpoint_io is writer


def test_a_trainer_of_ones_own_ends_by_max_time_between_two_steps_and_saves_what_it_has(folder):
    data, module = small(folder)
    root = folder / "short"
    options = trainer_options(
        accelerator="cpu", max_steps=9, accumulate_grad_batches=2, max_time={"seconds": 0}, default_root_dir=root
    )
    with pytest.raises(Stopped, match=r"trainer\.max_time"):
        Trainer(**options).fit(module, data)
    (last,) = root.rglob("last.safetensors")
    state = load_run(last)
    assert (state.step, state.batches) == (1, 2)


def test_the_package_shows_what_it_exports():
    assert set(nanogpt_lit.__all__) <= set(dir(nanogpt_lit))
    assert all(getattr(nanogpt_lit, name).__doc__ for name in nanogpt_lit.__all__ if name != "__version__")


def small(folder, vocab_size=257, dropout=0.0, schedule=ScheduleConfig(warmup_steps=1)):  # noqa: B008 - frozen
    data = TokenDataModule(
        str(folder / "my_texts"), tokenizer="byte", shards_dir=str(folder / "small"), block_size=16, batch_size=2
    )
    shape = GPTConfig(block_size=16, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8, dropout=dropout)
    return data, LitNanoGPT(shape, schedule=schedule)
