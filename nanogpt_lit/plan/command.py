"""The plan of a run from its settings."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.prepare import stale_reason
from nanogpt_lit.data.tokenizer_files import parse_tokenizer, tokenizer_from_file, with_special_tokens
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.network import NetworkConfig
from nanogpt_lit.gpt.networks import config_of, described, section_of
from nanogpt_lit.loops.compatibility import FSDP2
from nanogpt_lit.loops.trainer_section import PLANNED, asked_processes, named_strategy
from nanogpt_lit.memory.ladder import Rung
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.plan.budget import Budget
from nanogpt_lit.plan.many import Step, growth, machines, step_of
from nanogpt_lit.plan.plan import Footprint, Plan, make_plan, measure
from nanogpt_lit.plan.step import StepShape
from nanogpt_lit.runtime.gpus import Gpu
from nanogpt_lit.runtime.precision import full_precision_name

TOKENIZER_SIZES = {"gpt2": 50257, "byte": 257}


DDP_OPTIONS = ("gradient_as_bucket_view", "bucket_cap_mb")


def plan_run(settings: Any, budget: Budget, lightning: bool = True) -> Plan:
    """The plan of a run.

    settings: the sections of the YAML, as fit reads them   lightning: whether its Trainer drives, or accelerate

    Raises UserError for settings that cannot be, and where the vocabulary is not known before the text is read.
    """
    gpt = network(settings)
    own, shape = own_rung(settings), step_shape(settings, gpt, lightning)
    return make_plan(lambda memory: module(settings, gpt, memory), own, shape, settings.trainer.max_steps, budget)


def plan_rung(settings: Any, rung: Rung, gpu: Gpu, lightning: bool = True) -> Footprint:
    """The footprint of one way to train the network of the YAML, in a part of the time that a whole plan takes."""
    of_yaml = network(settings)
    shape = step_shape(settings, of_yaml, lightning)
    return measure(partial(module, settings, of_yaml), rung, shape, gpu)


def growth_of(settings: Any, plan: Plan, interconnect: str | None) -> tuple[Step, list[Step]]:
    """A step of the run on its own machines, and on 1 to 512 devices."""
    nodes = settings.trainer.num_nodes
    where = machines(nodes, plan.shape.devices // nodes, plan.budget.gpu, interconnect)
    of_yaml, rung = network(settings), plan.own.rung

    def measured(shape: StepShape) -> Footprint:
        sized = replace(rung, accumulate_grad_batches=shape.accumulate_grad_batches)
        return measure(partial(module, settings, of_yaml), sized, shape, plan.budget.gpu)

    own = step_of(where, plan.shape, plan.own.footprint)
    return own, growth(own, plan.shape, measured)


def own_rung(settings: Any) -> Rung:
    """The YAML as it is."""
    memory = MemoryConfig(**(settings.model.get("memory") or {}))
    optim = AdamWConfig(**settings.model.optim)
    return Rung(
        "as configured",
        memory,
        settings.data.batch_size,
        settings.trainer.accumulate_grad_batches,
        optim.state_bits,
        optim.state_moves,
    )


def network(settings: Any) -> NetworkConfig:
    # The mask of separate documents takes as much memory whichever id they begin with.
    document_start = None if settings.data.documents == "joined" else 0
    return config_of(settings.model, vocab_size=vocab_size(settings), document_start=document_start)


def module(settings: Any, gpt: NetworkConfig, memory: MemoryConfig) -> LitNanoGPT:
    # Without torch.compile: a trace sees what the network does, and a compiled one does no more.
    optim, schedule = AdamWConfig(**settings.model.optim), ScheduleConfig(**settings.model.schedule)
    return LitNanoGPT(optim=optim, schedule=schedule, memory=memory, **described(gpt))


def step_shape(settings: Any, gpt: NetworkConfig, lightning: bool) -> StepShape:
    trainer = settings.trainer
    precision = full_precision_name(trainer.precision)
    if not lightning and precision.endswith("-true") and precision != "32-true":
        raise UserError(
            f"trainer.precision={precision} is for Lightning's Trainer only; 32-true, bf16-mixed and 16-mixed run in "
            "every loop."
        )
    return StepShape(
        batch_size=settings.data.batch_size,
        block_size=gpt.block_size,
        vocab_size=gpt.vocab_size or 0,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        precision=precision,
        clips=bool(trainer.gradient_clip_val),
        zeroes_after_forward=lightning,
        validates=trainer.limit_val_batches != 0,
        tf32=settings.model.get("tf32", False),
        deterministic=bool(trainer.deterministic),
        **spread_over(trainer),
    )


def spread_over(trainer: Any) -> dict[str, Any]:
    """StepShape's fields of the strategy and the devices in the trainer section; none for one device.

    Raises UserError for a strategy whose memory is not known here.
    """
    devices = asked_processes(vars(trainer)) or 1
    strategy = PLANNED.get(named_strategy(trainer.strategy, devices) or "")
    if devices == 1:
        return {}
    if strategy is None:
        name = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
        raise UserError(
            f"trainer.strategy={name} on {devices} devices cannot be planned: what it allocates is not known here; "
            f"ddp and {FSDP2} (--strategy fsdp2) are."
        )
    given = {} if isinstance(trainer.strategy, str) else vars(trainer.strategy.get("init_args") or Namespace())
    options = tuple((name, given[name]) for name in DDP_OPTIONS if given.get(name) is not None)
    return {"strategy": strategy, "devices": devices, "strategy_options": options if strategy == "ddp" else ()}


def vocab_size(settings: Any) -> int:
    """Rows of the embedding: what the YAML says, else what its tokenizer has, else what ready shards were made with."""
    section = section_of(settings.model)
    shape = settings.model[section]
    if shape["vocab_size"] is not None:
        return shape["vocab_size"]
    data: Mapping[str, Any] = settings.data
    kind, argument = parse_tokenizer(data["tokenizer"])
    special_tokens = dict.fromkeys(data.get("special_tokens") or [])
    if data.get("documents") == "conversations":
        from nanogpt_lit.data.conversations import CHATML_TOKENS, able_to_chat  # few runs learn from them

        if kind == "file":
            return able_to_chat(with_special_tokens(tokenizer_from_file(Path(argument)), [*special_tokens])).vocab_size
        special_tokens |= dict.fromkeys(CHATML_TOKENS)
    if kind in TOKENIZER_SIZES:
        return TOKENIZER_SIZES[kind] + len(special_tokens)
    if kind == "file":
        return with_special_tokens(tokenizer_from_file(Path(argument)), [*special_tokens]).vocab_size
    shards_dir = data["shards_dir"] or str(Path(settings.trainer.default_root_dir) / "shards")
    datamodule = TokenDataModule(**{**data, "shards_dir": shards_dir})
    made = datamodule.folder != datamodule.shards_dir or not stale_reason(
        datamodule.prepare_config, datamodule.shards_dir
    )
    if made:
        return datamodule.vocab_size
    if kind == "bpe":
        return int(argument) + len(special_tokens)  # at most: a short text has fewer pairs to merge
    raise UserError(
        f"data.tokenizer={data['tokenizer']} has as many tokens as the text has characters, and {shards_dir} has no "
        f"shards yet; run `prepare` with the same YAML first, or give --model.{section}.vocab_size 100."
    )
