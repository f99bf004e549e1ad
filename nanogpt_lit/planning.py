"""From the settings of a run to its plan."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.shards import ready_format
from nanogpt_lit.data.tokenizer import parse_tokenizer, tokenizer_from_file
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops.trainer_section import full_precision_name
from nanogpt_lit.memory.budget import Budget
from nanogpt_lit.memory.ladder import Rung
from nanogpt_lit.memory.plan import Plan, make_plan
from nanogpt_lit.memory.step import StepShape
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig

TOKENIZER_SIZES = {"gpt2": 50257, "byte": 257}


def plan_run(settings: Any, budget: Budget, lightning: bool = True) -> Plan:
    """settings: the sections of the YAML, as fit reads them   lightning: whether its Trainer drives, or accelerate

    Raises ValueError for settings that cannot be, and where the vocabulary is not known before the text is read.
    """
    model, trainer, data = settings.model, settings.trainer, settings.data
    gpt = GPTConfig(**{**model.gpt, "vocab_size": vocab_size(settings)})
    own = Rung(
        "as configured", MemoryConfig(**(model.get("memory") or {})), data.batch_size, trainer.accumulate_grad_batches
    )
    shape = StepShape(
        batch_size=data.batch_size,
        block_size=gpt.block_size,
        vocab_size=gpt.vocab_size or 0,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        precision=full_precision_name(trainer.precision),
        clips=bool(trainer.gradient_clip_val),
        zeroes_after_forward=lightning,
        validates=trainer.limit_val_batches != 0,
    )

    def build(memory: MemoryConfig) -> LitNanoGPT:
        techniques: dict[str, Any] = {"memory": memory} if "memory" in inspect.signature(LitNanoGPT).parameters else {}
        # Without torch.compile: a trace sees what the network does, and a compiled one does no more.
        return LitNanoGPT(gpt, AdamWConfig(**model.optim), ScheduleConfig(**model.schedule), **techniques)

    return make_plan(build, own, shape, trainer.max_steps, budget)


def vocab_size(settings: Any) -> int:
    """Rows of the embedding: what the YAML says, else what its tokenizer has, else what ready shards were made with."""
    if settings.model.gpt.vocab_size is not None:
        return settings.model.gpt.vocab_size
    data: Mapping[str, Any] = settings.data
    kind, argument = parse_tokenizer(data["tokenizer"])
    if kind in TOKENIZER_SIZES:
        return TOKENIZER_SIZES[kind]
    if kind == "file":
        return tokenizer_from_file(Path(argument)).vocab_size
    shards_dir = data["shards_dir"] or str(Path(settings.trainer.default_root_dir) / "shards")
    module = TokenDataModule(**{**data, "shards_dir": shards_dir})
    if ready_format(module.folder):
        return module.vocab_size
    if kind == "bpe":
        return int(argument)  # at most: a short text has fewer pairs to merge
    raise ValueError(
        f"data.tokenizer={data['tokenizer']} has as many tokens as the text has characters, and {module.folder} has no "
        "shards yet; run `prepare` with the same YAML first, or give --model.gpt.vocab_size 100."
    )
