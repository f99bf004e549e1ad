"""nanoGPT's ckpt.pt, to and from a RunState: weights, AdamW's state and the step, so that a run goes on.

Its parameters have our names and stand in the optimizer in our order. Its GELU is the exact one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nanogpt_lit.checkpoint.exchange import (
    chosen_tokenizer,
    gpt2_config,
    measured_effect,
    network,
    network_of,
    new_run,
    with_moments,
)
from nanogpt_lit.checkpoint.foreign_files import read_torch_file
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files
from nanogpt_lit.errors import UserError, in_brief
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.optim.schedule import ScheduleConfig, WarmupDecay
from nanogpt_lit.runtime.durable import durable_file

SUFFIX = ".pt"
COMPILED = "_orig_mod."
"""torch.compile puts it before the names of what it compiled."""
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
MARKS = {"model_args", "iter_num", "model"}
"""Keys that tell its files from others of torch.save."""


def read(path: Path, tokenizer: str | None = None) -> RunState:
    """The run, as far as nanoGPT keeps it. tokenizer: its name, which the file does not hold

    Raises UserError, naming the file, for one that is damaged, holds more than data, or lies about its shapes.
    """
    try:
        checkpoint = read_torch_file(path)
        arguments, config = checkpoint["model_args"], dict(checkpoint.get("config", {}))
        sizes = {name: arguments[name] for name in SIZES}
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size < 2**31:
                raise TypeError(f"model_args[{name!r}]={size!r}")
        step = checkpoint["iter_num"]
        if type(step) is not int or step < 0:
            raise TypeError(f"iter_num={step!r}")
        weights = {name.removeprefix(COMPILED): tensor for name, tensor in checkpoint["model"].items()}
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}
        # The mask of nanoGPT on a torch without flash attention has that name, and four dimensions.
        gpt = GPTConfig(**sizes, bias=bool(arguments["bias"]), dropout=float(arguments.get("dropout", 0.0)), gelu="erf")
        optim, schedule = optim_of(config), schedule_of(config)
        accumulate = int(config.get("gradient_accumulation_steps", 1))
        batch_size, block_size = int(config.get("batch_size", 1)), gpt.block_size
        best = float(checkpoint.get("best_val_loss", math.inf))
    except Exception as error:  # what the readers of zip, of pickle and of a dictionary raise is not one family
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is a damaged checkpoint of nanoGPT ({in_brief(error)}).") from error
    assert gpt.vocab_size is not None
    begun = new_run(path, weights, gpt, chosen_tokenizer(path, gpt.vocab_size, tokenizer), optim, schedule)
    return replace(
        begun,
        optimizer=with_moments(path, begun, optim, checkpoint.get("optimizer")),
        schedule={**begun.schedule, "last_epoch": step, "_step_count": step + 1},
        step=step,
        batches=step * accumulate,
        accumulate_grad_batches=max(1, accumulate),
        tokens=step * accumulate * batch_size * block_size,
        validations={"latest": None, "best": (step, best) if math.isfinite(best) and step else None},
    )


def optim_of(config: Mapping[str, Any]) -> AdamWConfig:
    theirs = {"learning_rate": "lr", "weight_decay": "weight_decay", "beta1": "beta1", "beta2": "beta2"}
    known: dict[str, Any] = {ours: float(config[name]) for name, ours in theirs.items() if name in config}
    return AdamWConfig(**known)


def schedule_of(config: Mapping[str, Any]) -> ScheduleConfig:
    if not config:
        return ScheduleConfig(total_steps=1000)
    decays = config.get("decay_lr", True)
    return ScheduleConfig(
        warmup_steps=int(config.get("warmup_iters", 0)) if decays else 0,
        min_lr_ratio=float(config.get("min_lr", 0.0)) / float(config["learning_rate"]) if decays else 1.0,
        total_steps=int(config.get("lr_decay_iters", 1000)),
    )


def fit_options(state: RunState) -> str:
    """The options with which `fit` goes on as nanoGPT would: its network, its rates, its batches."""
    gpt, optim, schedule = (state.hyper_parameters[name] for name in ("gpt", "optim", "schedule"))
    options = {f"model.gpt.{name}": gpt[name] for name in ("n_layer", "n_head", "n_embd", "bias", "gelu", "vocab_size")}
    options["data.block_size"] = gpt["block_size"]
    options |= {f"model.optim.{name}": optim[name] for name in ("lr", "weight_decay", "beta1", "beta2")}
    options |= {f"model.schedule.{name}": schedule[name] for name in ("warmup_steps", "min_lr_ratio")}
    options |= {
        "trainer.max_steps": schedule["total_steps"],
        "trainer.accumulate_grad_batches": state.accumulate_grad_batches,
    }
    return " ".join(f"--{name}={json.dumps(value).strip(chr(34))}" for name, value in options.items())


def write(target: Path, state: RunState, source: Path) -> list[str]:
    """Write what nanoGPT's `--init_from=resume` and its sample.py read, and return remarks about it.

    Raises UserError for a network that nanoGPT lacks.
    """
    gpt = network_of(source, state)
    config = gpt2_config(source, gpt, "nanoGPT")
    if not config.tied_head:
        raise UserError(f"{source} has model.gpt.tied_head=False, and nanoGPT ties the head; --to hf carries it.")
    notes = []
    tokenizer = tokenizer_from_files(state.data["tokenizer"])
    if tokenizer.kind != "gpt2":
        notes.append(
            f"nanoGPT keeps no tokenizer in a checkpoint, and its sample.py takes GPT-2's, or the characters of a "
            f"meta.pkl: the tokenizer {tokenizer.name} stays behind; --to hf carries it."
        )
    if config.gelu != "erf":
        there = network(source, gpt.state_dict(), replace(config, gelu="erf"))
        effect = measured_effect(gpt, there, tokenizer)
        notes.append(
            f"nanoGPT computes GELU exactly and this network was trained with its tanh approximation: {effect}."
        )
    optim = AdamWConfig(**state.hyper_parameters.get("optim", {}))
    schedule = ScheduleConfig(**state.hyper_parameters.get("schedule", {}))
    if optim.matrices == "adamw" and optim.state_moves:
        moments = state.optimizer["state"]
    else:
        moments = {}
        notes.append("The state of its optimizer, which nanoGPT lacks, stays behind: AdamW begins anew there.")
    alone = replace(optim, matrices="adamw", muon_lr=None, state_bits=32, class_path=None, init_args={})
    fresh = build_optimizer(gpt.named_parameters(), alone)
    WarmupDecay(fresh, schedule)  # gives each group its initial_lr
    # None leaves the kernel to torch, as nanoGPT does; a state that is loaded brings its own choice along.
    groups = [{**group, "foreach": None, "fused": None} for group in fresh.state_dict()["param_groups"]]
    best = state.validations.get("best")
    with durable_file(target) as file:
        torch.save(
            {
                "model": gpt.state_dict(),
                "optimizer": {"state": moments, "param_groups": groups},
                "model_args": {name: asdict(config)[name] for name in (*SIZES, "bias", "dropout")},
                "iter_num": state.step,
                "best_val_loss": 1e9 if best is None else float(best[1]),
                "config": {
                    "learning_rate": optim.lr,
                    "weight_decay": optim.weight_decay,
                    "beta1": optim.beta1,
                    "beta2": optim.beta2,
                    "warmup_iters": schedule.warmup_steps,
                    "lr_decay_iters": schedule.total_steps,
                    "min_lr": optim.lr * schedule.min_lr_ratio,
                    "gradient_accumulation_steps": state.accumulate_grad_batches * state.processes,
                    "batch_size": state.data.get("batch_size", 1),
                    "block_size": config.block_size,
                },
            },
            file,
        )
    return notes
