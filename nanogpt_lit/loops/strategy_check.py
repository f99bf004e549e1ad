"""What a strategy of the trainer section needs, said before anything is built or started."""

import difflib
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from jsonargparse import Namespace

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.strategy_table import DDP, FSDP2, SHORT_NAMES, SINGLE, STRATEGIES, Strategy
from nanogpt_lit.loops.trainer_section import asked_processes, full_precision_name
from nanogpt_lit.runtime.environment import whole_number


def named_strategy(strategy: Any, processes: int | None = 1) -> Strategy | None:
    """The row of trainer.strategy: a short name, a class path with its arguments, or Lightning's object.

    None for a class of the user's own. processes: what "auto" depends on
    """
    if isinstance(strategy, str):
        if strategy == "auto":
            return SINGLE if processes == 1 else DDP
        if strategy in SHORT_NAMES:
            return SHORT_NAMES[strategy][0]
        return FSDP2 if strategy == FSDP2.lightning else None
    path = strategy.get("class_path") if hasattr(strategy, "get") else type(strategy).__name__
    return next((row for row in STRATEGIES if row.lightning == str(path).rpartition(".")[2]), None)


def check_strategy(trainer: Mapping[str, Any], device: str) -> None:
    """Raises UserError when trainer.strategy lacks something here. device: "cuda", "mps" or "cpu"

    Lightning would say so only after the data is made, or with a traceback, or at the first step.
    """
    strategy = named_strategy(trainer["strategy"])
    if strategy is None and isinstance(trainer["strategy"], str):
        nearest = difflib.get_close_matches(trainer["strategy"], [*SHORT_NAMES, FSDP2.lightning], n=1)
        raise UserError(
            f"trainer.strategy={trainer['strategy']} is no strategy that is known here; "
            + (
                f"did you mean {nearest[0]}?"
                if nearest
                else "auto, ddp, fsdp, deepspeed and ModelParallelStrategy are."
            )
        )
    if strategy is None:
        return
    name = trainer["strategy"] if isinstance(trainer["strategy"], str) else strategy.lightning
    check_start_method(name, trainer["strategy"])
    if strategy.package is not None and find_spec(strategy.package) is None:
        raise UserError(
            f"trainer.strategy={name} needs the package {strategy.package}; pip install {strategy.package}, or set "
            "trainer.strategy=ddp."
        )
    if strategy.needs_cuda and device != "cuda":
        raise UserError(
            f"trainer.strategy={name} needs CUDA cards, and trainer.accelerator comes to {device} here; "
            "ddp and ModelParallelStrategy run on processors too."
        )
    check_combination(strategy, trainer["precision"], trainer["gradient_clip_val"])


def check_start_method(name: str, strategy: Any) -> None:
    """Raises UserError for a strategy that trains in copies of this process.

    Lightning brings the weights back out of them, and no checkpoints, no curves and no reason to stop.
    """
    if isinstance(strategy, str):
        arguments = SHORT_NAMES[name][1] if name in SHORT_NAMES else {}
        works = "trainer.strategy=" + re.sub("_(spawn|fork|notebook)", "", name)
    else:
        arguments, works = getattr(strategy, "init_args", {}), "start_method=popen"
    method = arguments.get("start_method", "popen")
    if method != "popen":
        raise UserError(
            f"trainer.strategy={name} trains in copies of this process (start_method={method}), which hand back no "
            f"checkpoints and no curves; set {works}, which starts processes too."
        )


def check_weights(trainer: Mapping[str, Any], where: str, device: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raises UserError for weights in host memory and more than one card: DistributedDataParallel exchanges gradients
    between cards, and these are not on one. Processes without cards exchange them where they are.

    where: model.memory.weights
    """
    if where == "card" or device != "cuda":
        return
    import torch  # late: what only translates files needs none

    processes = asked_processes(trainer) or whole_number("WORLD_SIZE", environ, least=1) or torch.cuda.device_count()
    if processes > 1:
        raise UserError(
            f"model.memory.weights={where} keeps the gradients in host memory, where {processes} processes with a card "
            "each cannot exchange them; set trainer.devices=1, or model.memory.weights=card."
        )


def check_started(trainer: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
    """Raises UserError when torchrun or srun has started another number of processes than the section asks for."""
    asked = asked_processes(trainer)
    for launcher, sign, count in (
        ("torchrun", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"),
        ("srun", "SLURM_STEP_ID", "SLURM_NTASKS"),
    ):
        started = whole_number(count, environ, least=1) if sign in environ else None
        if asked is not None and started is not None and started != asked:
            raise UserError(
                f"trainer.devices={trainer['devices']} and trainer.num_nodes={trainer['num_nodes']} ask for {asked} "
                f"processes, and {launcher} has started {started}; set one to the other."
            )


def check_combination(strategy: Strategy, precision: Any, gradient_clip_val: float | None) -> None:
    """Raises UserError for a setting that Lightning refuses together with the strategy, on any machine."""
    precision = full_precision_name(precision)
    if strategy.precisions is not None and precision not in strategy.precisions:
        raise UserError(
            f"trainer.precision={precision} does not go with {strategy.lightning}, which has no gradient scaler; set "
            f"trainer.precision to one of {', '.join(strategy.precisions)}, or trainer.strategy=ddp."
        )
    if gradient_clip_val and not strategy.clips:
        raise UserError(
            f"trainer.gradient_clip_val={gradient_clip_val} does not go with {strategy.lightning}, where "
            f"Lightning cannot clip the norm; set it to null, or trainer.strategy={FSDP2.lightning}."
        )


def complete_sizes(trainer: Namespace, environ: Mapping[str, str] = os.environ) -> None:
    """Shards over all processes where ModelParallelStrategy's sizes are left at "auto".

    Lightning's auto would shard over nodes and divide every matrix over a node's cards. Given by its name alone, the
    strategy also saves whole checkpoints, which everything here can read, and not a folder of shards.
    environ: what torchrun says of the processes that it has started
    """
    if named_strategy(trainer.strategy) is not FSDP2:
        return
    if isinstance(trainer.strategy, str):  # Lightning knows no short name of it
        arguments = Namespace(data_parallel_size="auto", tensor_parallel_size="auto", save_distributed_checkpoint=False)
        trainer.strategy = Namespace(class_path=f"lightning.pytorch.strategies.{FSDP2.lightning}", init_args=arguments)
    arguments = trainer.strategy.init_args
    if arguments.tensor_parallel_size == "auto":
        arguments.tensor_parallel_size = 1
    if arguments.tensor_parallel_size != 1:
        raise UserError(
            f"trainer.strategy.tensor_parallel_size={arguments.tensor_parallel_size} would divide single matrices, "
            "which this network does not; leave it out."
        )
    processes = asked_processes(vars(trainer)) or whole_number("WORLD_SIZE", environ, least=1)
    if arguments.data_parallel_size == "auto":
        if processes is None:
            raise UserError(
                f"trainer.devices={trainer['devices']} leaves open over how many processes {FSDP2.lightning} shards; "
                "set a number, for example trainer.devices=2."
            )
        arguments.data_parallel_size = processes
    if processes is not None and arguments.data_parallel_size != processes:
        raise UserError(
            f"trainer.strategy.data_parallel_size={arguments.data_parallel_size} should be the {processes} processes "
            "of trainer.devices and trainer.num_nodes; leave it out."
        )
