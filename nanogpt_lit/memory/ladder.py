"""The ways to need less memory, from none to all, and what each costs."""

import json
import traceback
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from nanogpt_lit.memory.oom import CPU_ALLOCATOR
from nanogpt_lit.memory.techniques import FREE_OF_COST, PLACES, MemoryConfig

CHUNK_TOKENS = 256
RECOMPUTE = ("none", "selective", "full")
"""Kinds of recomputation, from weak to strong."""

# Each adds to those before it: what it does, and the fields of MemoryConfig that do it.
TECHNIQUES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("the loss in chunks", {"loss_chunk_tokens": CHUNK_TOKENS}),
    ("+ weights cast again in backward", {"recast_weights": True}),
    ("+ norms and activations computed again", {"recompute": "selective"}),
    ("+ the optimizer's state in host memory", {"optimizer_state": "host"}),
    ("+ every second block computed again", {"recompute": "full", "recompute_every": 2}),
    ("+ every block computed again", {"recompute_every": 1}),
    ("+ the inputs of blocks in host memory", {"block_inputs": "host"}),
    ("+ weights, gradients, optimizer in host memory", {"weights": "host"}),
    ("+ weights streamed, matrix by matrix", {"weights": "streamed"}),
)


@dataclass(frozen=True)
class Rung:
    """One way to train the network of a YAML, with the same tokens per optimizer step."""

    name: str
    memory: MemoryConfig
    batch_size: int
    accumulate_grad_batches: int
    state_bits: int = 32
    """model.optim.state_bits. 8 changes the numerics: no rung proposes it, all keep it."""
    state_moves: bool = True
    """True where the optimizer's state may live in host memory."""

    def same_training(self, other: "Rung") -> bool:
        return replace(self, name="") == replace(other, name="")

    def same_bits(self, other: "Rung") -> bool:
        """Tell whether both train to the same bits. All is exact but the order in which the loss is summed, and the
        arithmetic of the CPU where the weights live with it."""
        return (
            self.state_bits == other.state_bits
            and self.batch_size == other.batch_size
            and self.memory.loss_chunk_tokens == other.memory.loss_chunk_tokens
            and (self.memory.weights == "device") == (other.memory.weights == "device")
        )

    def last_resort(self, own: "Rung") -> bool:
        """Tell whether it is of use only where nothing else fits, since it keeps the GPU waiting."""
        return self.memory.weights not in ("device", own.memory.weights) or self.batch_size < own.batch_size

    def yaml(self, own: "Rung") -> list[str]:
        """The lines that turn the user's own YAML into this; none when it is the same."""
        lines = yaml_lines(self.memory, own.memory)
        if self.batch_size != own.batch_size:
            lines += ["data:", f"  batch_size: {self.batch_size}"]
            lines += ["trainer:", f"  accumulate_grad_batches: {self.accumulate_grad_batches}"]
        return lines


def ladder(own: Rung, block_size: int, casts_weights: bool, stays: Collection[str] = ()) -> Iterator[Rung]:
    """Yield the rungs from the plain step upwards; the user's own setting is among them.

    casts_weights: whether autocast copies the weights to 16 bits   stays: fields of MemoryConfig that no rung moves
    """
    in_8_bits = own.state_bits == 8
    rung = replace(own, name="the optimizer's state in 8 bits" if in_8_bits else "nothing", memory=MemoryConfig())
    tokens = own.batch_size * block_size
    rungs = [rung]
    for name, changes in TECHNIQUES:
        if "recast_weights" in changes and not casts_weights:
            continue
        if changes.keys() & {"optimizer_state", "weights"} and not own.state_moves:
            continue
        if changes.keys() & set(stays):
            continue
        if "loss_chunk_tokens" in changes:
            changes = {"loss_chunk_tokens": chunk_tokens(tokens)}
        rung = replace(rung, name=name, memory=replace(rung.memory, **changes))
        rungs.append(rung)
    # Last, because small products leave a GPU idle, and what each micro-batch does to all weights is done more often.
    while rung.batch_size % 2 == 0:
        rung = replace(
            rung,
            name=f"+ micro-batches of {rung.batch_size // 2}",
            batch_size=rung.batch_size // 2,
            accumulate_grad_batches=rung.accumulate_grad_batches * 2,
        )
        rungs.append(rung)
    if not any(own.same_training(rung) for rung in rungs):
        yield own
    yield from rungs


def chunk_tokens(tokens: int) -> int:
    """Tokens per chunk of the loss for a micro-batch of so many: a chunk as large would save little."""
    return min(CHUNK_TOKENS, max(1, tokens // 4))


def yaml_lines(memory: MemoryConfig, own: MemoryConfig) -> list[str]:
    """The lines that turn a YAML with `own` into one with `memory`; none when they are the same."""
    if memory == own:
        return []
    defaults, theirs, wanted = asdict(MemoryConfig()), asdict(own), asdict(memory)
    fields = [name for name in wanted if wanted[name] != defaults[name] or wanted[name] != theirs[name]]
    return ["model:", "  memory:", *(f"    {name}: {_scalar(wanted[name])}" for name in fields)]


def next_technique(memory: MemoryConfig, idle: Collection[str] = ()) -> tuple[str, MemoryConfig] | None:
    """The lowest technique that is not in force: what it does, and the settings with it. None when all are.

    idle: fields of MemoryConfig that would do nothing
    """
    for name, changes in TECHNIQUES:
        if changes.keys() & set(idle) or (memory.loss_chunk_tokens is not None and "loss_chunk_tokens" in changes):
            continue
        if RECOMPUTE.index(changes.get("recompute", memory.recompute)) < RECOMPUTE.index(memory.recompute):
            continue
        more = replace(memory, **changes)
        if levels(more) != levels(memory) and at_least(more, memory):
            return name.removeprefix("+ "), more
    return None


def at_least(memory: MemoryConfig, other: MemoryConfig) -> bool:
    """Tell whether memory has every technique of other, or a stronger one of its kind."""
    return all(a >= b for a, b in zip(levels(memory), levels(other), strict=True))


def levels(memory: MemoryConfig) -> tuple[Any, ...]:
    """Rank how far each kind of technique goes."""
    recompute = RECOMPUTE.index(memory.recompute)
    weights = ("device", "host", "streamed").index(memory.weights)
    return (
        memory.loss_chunk_tokens is not None,
        # What is computed again keeps no copies of weights.
        memory.recast_weights or (memory.recompute, memory.recompute_every) == ("full", 1) or weights > 0,
        (recompute, -memory.recompute_every),
        memory.block_inputs == "host",
        memory.optimizer_state == "host" or weights > 0,
        weights,
    )


def free_of_cost(memory: MemoryConfig, casts_weights: bool, tokens: int) -> dict[str, Any]:
    """The fields that need less and cost no time, as far as they are not in force. tokens: of a micro-batch"""
    idle = vars(memory).keys() - FREE_OF_COST | (set() if casts_weights else {"recast_weights"})
    less = memory
    while (found := next_technique(less, idle)) is not None:
        less = found[1]
    changes = {key: value for key, value in vars(less).items() if value != getattr(memory, key)}
    return changes | ({"loss_chunk_tokens": chunk_tokens(tokens)} if "loss_chunk_tokens" in changes else {})


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# What to say of a run whose memory has ended.


def phase_of(error: BaseException) -> str:
    """The innermost part of a step that the error's traceback goes through."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if isinstance(frame.f_locals.get("self"), Optimizer):
            return "the optimizer"
        if frame.f_code is torch.autograd.backward.__code__:
            return "backward"
        if frame.f_code is nn.Module._call_impl.__code__:
            return "forward"
    return "training"


def advice(module: Any, casts_weights: bool, phase: str, reported: str, in_force: MemoryConfig | None = None) -> str:
    """One sentence: where memory ended, and the next technique of the ladder, with its lines for the YAML.

    in_force: where the run uses techniques that its YAML does not have
    """
    own: MemoryConfig = module.memory_config
    memory = in_force or own
    ended = f"memory ended in {phase} ({reported})"
    kept = [f"model.memory.{name}={where}" for name in PLACES if (where := getattr(memory, name)) != "device"]
    if CPU_ALLOCATOR in reported and kept:
        return f"host {ended}; close other programs, or set =device what can be of {', '.join(kept)}."
    idle = useless(module, casts_weights, on_cpu=CPU_ALLOCATOR in reported or "MPS" in reported)
    if phase == "the optimizer":
        idle |= vars(memory).keys() - {"optimizer_state", "weights"}
    found = next_technique(memory, idle)
    if found is None:
        return f"{ended}, and no technique is left; set a smaller data.block_size or model.gpt, or take a larger GPU."
    name, less = found
    lines = "\n".join(f"    {line}" for line in yaml_lines(less, own))
    return f"{ended}; what needs less is {name}, with these lines in the YAML:\n\n{lines}\n"


def useless(module: Any, casts_weights: bool, on_cpu: bool) -> set[str]:
    """The fields of model.memory that do nothing in a run, or are refused in it."""
    fields = set() if casts_weights else {"recast_weights"}
    if on_cpu:  # where host memory is all there is
        return {*fields, *PLACES}
    if not module.optim_config.state_moves or module.device_mesh is not None:
        return {*fields, "optimizer_state", "weights"}
    has_others = dist.is_available() and dist.is_initialized()  # DDP exchanges gradients between GPUs
    return {*fields, "weights"} if has_others or module.hparams["compile"] else fields
