"""The plan of a run from its settings, and the largest batch, sequence and network that fit."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.prepare import stale_reason
from nanogpt_lit.data.tokenizer_files import parse_tokenizer, tokenizer_from_file, with_special_tokens
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.network import NetworkConfig
from nanogpt_lit.gpt.networks import config_of, described, section_of
from nanogpt_lit.loops.compatibility import FSDP2
from nanogpt_lit.loops.trainer_section import PLANNED, asked_processes, named_strategy
from nanogpt_lit.memory.ladder import Rung, ladder
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.plan.allocator import MIB
from nanogpt_lit.plan.budget import Budget
from nanogpt_lit.plan.many import Step, growth, machines, step_of
from nanogpt_lit.plan.plan import STAYS, Footprint, Plan, make_plan, measure, reserved_mib
from nanogpt_lit.plan.step import StepShape
from nanogpt_lit.runtime.gpus import Gpu
from nanogpt_lit.runtime.precision import PRECISIONS, dtype_of, full_precision_name

TOKENIZER_SIZES = {"gpt2": 50257, "byte": 257}


# Layers, heads and channels of the networks that were published as GPT-2.
FAMILY = {
    "GPT-2 small": (12, 12, 768),
    "GPT-2 medium": (24, 16, 1024),
    "GPT-2 large": (36, 20, 1280),
    "GPT-2 XL": (48, 25, 1600),
}

# Of GPT-3's, whose table 2.1 these are (Brown et al., arXiv:2005.14165): for many devices.
LARGER = {
    "GPT-3 2.7B": (32, 32, 2560),
    "GPT-3 6.7B": (32, 32, 4096),
    "GPT-3 13B": (40, 40, 5120),
    "GPT-3 175B": (96, 96, 12288),
}

SHAPED_BY_HAND = {"n_kv_head", "head_size", "n_hidden"}
"""Sizes of a Llama that follow from the others where they are None, as they are in a network of another size."""

DDP_OPTIONS = ("gradient_as_bucket_view", "bucket_cap_mb")

SHALLOW = 2
"""Layers of a network that stands for a deeper one."""
QUICK_TOLERANCE = 0.1
"""Share of the usable memory: nearer to it than this, a line through two shallow networks does not decide what
fits."""
NEAR = 0.985
"""Share of the size that a line leads to, at which to look: what fits there, and hardly more, ends the search."""
FURTHEST = 8
"""A line through two small sizes may be wrong about the slope: so many times the larger of them is not gone beyond."""


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


def largest_that_fits(settings: Any, budget: Budget, lightning: bool = True) -> list[dict[str, Any]]:
    """The largest that fits the budget with the memory techniques of the YAML, and with all that there are.

    The largest batch_size and the longest block_size, each with all else as it is, the latter for a single sequence,
    and the largest network of GPT-2's family. "yaml" has the lines that a rung needs, none for the YAML's own; where
    that has all techniques, it is the only answer.
    """
    own, shape = own_rung(settings), step_shape(settings, network(settings), lightning)
    casts_weights = PRECISIONS[shape.precision].autocast is not None
    *_, leanest = (
        rung
        for rung in ladder(own, shape.block_size, casts_weights, STAYS[shape.strategy])
        if rung.batch_size == own.batch_size
    )
    rungs = [own] if own.same_training(leanest) else [own, leanest]
    return [
        {"rung": rung.name, "yaml": rung.yaml(own), **_largest_of(settings, rung, budget, lightning)} for rung in rungs
    ]


def _largest_of(settings: Any, rung: Rung, budget: Budget, lightning: bool) -> dict[str, Any]:
    gpt, usable_mib = network(settings), budget.usable_mib
    shape = step_shape(settings, gpt, lightning)
    by_themselves = dict.fromkeys(SHAPED_BY_HAND & gpt.__dataclass_fields__.keys())

    @cache
    def needed_mib(batch_size: int, **changes: int) -> float:
        changed = replace(gpt, **changes)  # type: ignore[arg-type]
        changed_shape, resized = step_shape(settings, changed, lightning), replace(rung, batch_size=batch_size)
        return reserved_mib(partial(module, settings, changed), resized, changed_shape, budget.gpu)

    def of_batch(size: int, **depth: int) -> float:
        return needed_mib(size, block_size=gpt.block_size, **depth)

    def of_block(size: int, **depth: int) -> float:
        return needed_mib(1, block_size=size, **depth)

    def searched(needed: Callable[..., float], small: int, large: int, unit: int = 1) -> int | None:
        """The largest size. Where weights are on the host, depth adds little: two layers find what the network then is
        asked for. What two layers have no room for, more of them have not."""
        if rung.memory.weights == "device" or gpt.n_layer <= SHALLOW:
            return largest(needed, small, large, usable_mib, unit)
        found = largest(partial(needed, n_layer=SHALLOW), small, large, usable_mib, unit)
        if found is None or (deep_mib := needed(found)) <= usable_mib:
            return found
        return largest(needed, int(NEAR * found * usable_mib / deep_mib), found, usable_mib, unit)

    def network_fits(sizes: dict[str, Any]) -> bool:
        """Memory grows in a line with depth: two shallow networks tell of the deep one, to a few percent."""
        weights_mib = 0.0
        if rung.memory.weights == "device":
            weights_mib = weights_alone_mib(settings, replace(gpt, **sizes), rung.memory, shape.precision)
            if shape.strategy == "fsdp2":
                weights_mib /= shape.devices
        if 2 * weights_mib > usable_mib:
            return False  # with their gradients, and without a trace
        if sizes["n_layer"] > 2 * SHALLOW:
            two, four = (needed_mib(1, **{**sizes, "n_layer": shallow}) for shallow in (SHALLOW, 2 * SHALLOW))
            quick_mib = two + (four - two) / SHALLOW * (sizes["n_layer"] - SHALLOW)
            if abs(quick_mib / usable_mib - 1) > QUICK_TOLERANCE:
                return quick_mib <= usable_mib
        return needed_mib(1, **sizes) <= usable_mib

    networks = (
        (name, {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **by_themselves})
        for name, (n_layer, n_head, n_embd) in reversed((FAMILY | (LARGER if shape.devices > 1 else {})).items())
    )
    name, sizes = next(((name, sizes) for name, sizes in networks if network_fits(sizes)), (None, None))
    twice = 2 * rung.batch_size
    batch_size = searched(of_batch, twice, twice)
    tokens = int(NEAR * gpt.block_size * (batch_size or 1))  # a single sequence may have about as many
    block_size = searched(of_block, tokens, tokens, unit=64)
    return {
        "batch_size": batch_size,
        "block_size": block_size,
        "network": name,
        "gpt": sizes,
    }


def network(settings: Any) -> NetworkConfig:
    # The mask of separate documents takes as much memory whichever id they begin with.
    document_start = None if settings.data.documents == "joined" else 0
    return config_of(settings.model, vocab_size=vocab_size(settings), document_start=document_start)


def module(settings: Any, gpt: NetworkConfig, memory: MemoryConfig) -> LitNanoGPT:
    # Without torch.compile: a trace sees what the network does, and a compiled one does no more.
    optim, schedule = AdamWConfig(**settings.model.optim), ScheduleConfig(**settings.model.schedule)
    return LitNanoGPT(optim=optim, schedule=schedule, memory=memory, **described(gpt))


def weights_alone_mib(settings: Any, gpt: NetworkConfig, memory: MemoryConfig, precision: str) -> float:
    dtype = dtype_of(PRECISIONS[precision].weights)
    assert dtype is not None
    with torch.device("meta"):
        return sum(weights.numel() for weights in module(settings, gpt, memory).parameters()) * dtype.itemsize / MIB


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


def largest(needed_mib: Callable[[int], float], small: int, large: int, usable_mib: float, unit: int = 1) -> int | None:
    """The largest multiple of `unit`, to within 3 percent, that needs no more than usable_mib; None where not even
    `unit` does.

    needed_mib: of a size, growing with it, in a line or faster   small, large: sizes to begin with
    Memory grows nearly in a line with the batch and the sequence: a line through two sizes leads to the third.
    """
    known: dict[int, float] = {}
    fitting, too_large = 0, None
    size = max(unit, small // unit * unit)
    while True:
        known[size] = needed_mib(size)
        if known[size] <= usable_mib:
            fitting = max(fitting, size)
        elif too_large is None or size < too_large:
            too_large = size
        enough = max(unit, int(0.03 * fitting) // unit * unit)
        if too_large is not None and too_large - fitting <= enough:
            return fitting or None
        # Of a line of which one size is known: what is left, shared out as if all that is needed grew with the size.
        in_proportion = int(NEAR * size * usable_mib / known[size])
        if fitting == 0:
            size = in_proportion if len(known) == 1 else size // 2
        elif len(known) == 1:
            size = max(fitting + unit, large, in_proportion)
        else:
            lower = max((size for size in known if size < fitting), default=None)
            if lower is not None:
                slope = (known[fitting] - known[lower]) / (fitting - lower)
                if slope > 0 and known[fitting] + slope * enough > usable_mib:
                    return fitting  # and a line from below promises no less room than there is
            other = lower if too_large is None else too_large
            assert other is not None, "one of two sizes that fit is the lower one"
            slope = (known[other] - known[fitting]) / (other - fitting)
            size = fitting + int((usable_mib - known[fitting]) / slope) if slope > 0 else FURTHEST * fitting
            size = int(NEAR * size) if too_large is None else size
        # Each step is so large that it ends the search if it leads too far.
        size = max(size // unit * unit, fitting + enough)
        if too_large is not None:
            size = min(size, max(fitting + enough, too_large - enough))
        elif len(known) > 1:
            size = min(size, FURTHEST * fitting)
