"""Every YAML is parsed and built, so that none goes stale."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.networks import config_of, described
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))

# The sizes that the file headers and nanoGPT's configuration files promise, with nanoGPT's count of parameters
# (positions left out) where it publishes one.
EXPECTED = {
    "rtx2050": (12, 768, 1024, 4, 4, 50304),
    "finetune_rtx2050": (12, 768, 1024, 2, 4, 50257),
    "smollm2_rtx2050": (30, 576, 1024, 2, 4, 49152),
    "rtx2050_medium": (24, 1024, 1024, 2, 8, 50304),
    "rtx2050_large": (36, 1280, 1024, 4, 4, 50304),
    "rtx2050_xl": (48, 1600, 1024, 2, 8, 50304),
    "course": (12, 768, 256, 4, 4, 32000),
    "day25": (12, 768, 256, 4, 4, 32000),
    "shakespeare_char": (6, 384, 256, 64, 1, 66),
    "shakespeare_char_cpu": (4, 128, 64, 12, 1, 66),
    "modern_char_cpu": (4, 128, 64, 12, 1, 66),
    "shakespeare_char_2cores": (4, 256, 256, 16, 1, 66),
    "modern_rtx2050": (12, 768, 1024, 4, 4, 50304),
    "tinystories_cpu": (4, 256, 256, 16, 1, 4096),
    "limited_char_cpu": (4, 128, 128, 16, 1, 66),
    "limited_cpu": (4, 192, 128, 16, 1, 2048),
}


def parse(path, *options):
    return SettingsCLI(args=["--config", str(path), *options]).settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_the_module_and_the_data(path):
    settings = parse(path)
    TokenDataModule(**settings.data)
    gpt = config_of(settings.model)
    if gpt.vocab_size is None:  # from the text, which this test has not; Shakespeare has 65 characters
        sizes = {"char": 66, "byte": 257, "bpe:2048": 2048, "bpe:4096": 4096, "bpe:32000": 32000}
        gpt = replace(gpt, vocab_size=sizes[settings.data.tokenizer])
    with torch.device("meta"):
        module = LitNanoGPT(
            **described(gpt),
            optim=AdamWConfig(**settings.model.optim),
            schedule=ScheduleConfig(**settings.model.schedule),
        )
    if path.stem in EXPECTED:
        assert EXPECTED[path.stem] == (
            module.gpt.config.n_layer,
            module.gpt.config.n_embd,
            module.gpt.config.block_size,
            settings.data.batch_size,
            settings.trainer.accumulate_grad_batches,
            module.gpt.config.vocab_size,
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_root_of_its_own_and_validates_at_its_last_step(path):
    trainer = parse(path).trainer
    assert trainer.default_root_dir == f"runs/{path.stem}"
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    assert batches % trainer.val_check_interval == 0
    assert trainer.val_check_interval % trainer.accumulate_grad_batches == 0  # never inside an accumulation window


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_number_that_two_sections_need_is_written_once(path):
    settings = parse(path, "--data.block_size=32", "--trainer.max_steps=7")
    assert settings.model.gpt.block_size == 32
    assert settings.model.schedule.total_steps == 7
