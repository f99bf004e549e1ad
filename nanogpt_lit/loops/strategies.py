"""Lightning's strategies by the names a YAML may give them, and how many processes a trainer section asks for.

A strategy is known here by the name of its class in lightning.pytorch.strategies, which is not imported.
"""

import difflib
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from jsonargparse import Namespace

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import DDP, DEEPSPEED, FSDP, FSDP2, SINGLE
from nanogpt_lit.loops.trainer_section import asked_processes
from nanogpt_lit.runtime.environment import whole_number
from nanogpt_lit.runtime.precision import full_precision_name

STRATEGIES = (SINGLE, DDP, FSDP, FSDP2, DEEPSPEED)

# Lightning's short names, and the arguments that they stand for.
_DDP_STARTS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
_OFFLOAD = {"offload_optimizer": True, "offload_parameters": True}
_NVME = {"remote_device": "nvme", "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}
SHORT_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "single_device": (SINGLE, {}),
    **{name: (DDP, {"start_method": start}) for name, start in _DDP_STARTS.items()},
    **{
        f"{name}_find_unused_parameters_{str(find).lower()}": (
            DDP,
            {"start_method": start, "find_unused_parameters": find},
        )
        for name, start in _DDP_STARTS.items()
        for find in (False, True)
    },
    "fsdp": (FSDP, {}),
    "fsdp_cpu_offload": (FSDP, {"cpu_offload": True}),
    "deepspeed": (DEEPSPEED, {}),
    "deepspeed_stage_1": (DEEPSPEED, {"stage": 1}),
    "deepspeed_stage_2": (DEEPSPEED, {"stage": 2}),
    "deepspeed_stage_2_offload": (DEEPSPEED, {"stage": 2, "offload_optimizer": True}),
    "deepspeed_stage_3": (DEEPSPEED, {"stage": 3}),
    "deepspeed_stage_3_offload": (DEEPSPEED, {"stage": 3, **_OFFLOAD}),
    "deepspeed_stage_3_offload_nvme": (DEEPSPEED, {"stage": 3, **_OFFLOAD, **_NVME}),
}


def named_strategy(strategy: Any, processes: int | None = 1) -> str | None:
    """The class that trainer.strategy names: by a short name, a class path with its arguments, or Lightning's object.

    None for a class of the user's own. processes: what "auto" depends on
    """
    if isinstance(strategy, str):
        if strategy == "auto":
            return SINGLE if processes == 1 else DDP
        if strategy in SHORT_NAMES:
            return SHORT_NAMES[strategy][0]
        return FSDP2 if strategy == FSDP2 else None
    path = strategy.get("class_path") if hasattr(strategy, "get") else type(strategy).__name__
    name = str(path).rpartition(".")[2]
    return name if name in STRATEGIES else None


def strategy_settings(trainer: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What compatibility.py asks of the trainer section. device: "cuda", "mps" or "cpu"

    Raises UserError for a short name that is not known, and for a package that is missing.
    """
    strategy = trainer["strategy"]
    name = named_strategy(strategy)
    if name is None and isinstance(strategy, str):
        nearest = difflib.get_close_matches(strategy, [*SHORT_NAMES, FSDP2], n=1)
        works = f"did you mean {nearest[0]}?" if nearest else f"auto, ddp, fsdp, deepspeed and {FSDP2} are."
        raise UserError(f"trainer.strategy={strategy} is no strategy that is known here; {works}")
    if name == DEEPSPEED and find_spec("deepspeed") is None:
        raise UserError(
            f"trainer.strategy={strategy} needs the package deepspeed: pip install deepspeed, or set "
            "trainer.strategy=ddp."
        )
    given = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    arguments = SHORT_NAMES[strategy][1] if isinstance(strategy, str) and strategy in SHORT_NAMES else given
    return {
        "trainer.strategy": name,
        "trainer.accelerator": device,
        "trainer.precision": full_precision_name(trainer["precision"]),
        "trainer.gradient_clip_val": trainer["gradient_clip_val"],
        **{
            f"trainer.strategy.{key}": arguments[key]
            for key in ("start_method", "tensor_parallel_size", "offload_optimizer")
            if key in arguments
        },
    }


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


def check_devices(devices: Any, device: str) -> None:
    """Raises UserError for what names no devices. device: "cuda", "mps" or "cpu"; GPUs may also be named by number"""
    text = ",".join(map(str, devices)) + "," * (len(devices) == 1) if isinstance(devices, list) else str(devices)
    if text == "auto" or re.fullmatch(r"[1-9][0-9]{0,3}", text):
        return
    if device == "cpu":
        raise UserError(f"trainer.devices={devices} is no number of processes on CPUs; auto and 1 to 9,999 work.")
    if not re.fullmatch(r"-1|[0-9]{1,4}(,[0-9]{1,4})*,?", text):
        raise UserError(f"trainer.devices={devices} names no GPUs; auto, 2, [0, 1] and -1, which is all, work.")


def complete_sizes(trainer: Namespace, environ: Mapping[str, str] = os.environ) -> None:
    """Shards over all processes where ModelParallelStrategy's sizes are left at "auto".

    Lightning's auto would shard over nodes and divide every matrix over the GPUs of one. Given by its name alone, the
    strategy also saves whole checkpoints, which everything here can read, and not a folder of shards.
    environ: what torchrun says of the processes that it has started
    """
    if named_strategy(trainer.strategy) != FSDP2:
        return
    if isinstance(trainer.strategy, str):  # Lightning knows no short name of it
        arguments = Namespace(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False)
        trainer.strategy = Namespace(class_path=f"lightning.pytorch.strategies.{FSDP2}", init_args=arguments)
    arguments = trainer.strategy.init_args
    arguments.tensor_parallel_size = 1  # check_together refuses another
    processes = asked_processes(vars(trainer)) or whole_number("WORLD_SIZE", environ, least=1)
    if arguments.data_parallel_size == "auto":
        if processes is None:
            raise UserError(
                f"trainer.devices={trainer['devices']} leaves open over how many processes {FSDP2} shards; "
                "set a number, for example trainer.devices=2."
            )
        arguments.data_parallel_size = processes
    if processes is not None and arguments.data_parallel_size != processes:
        raise UserError(
            f"trainer.strategy.data_parallel_size={arguments.data_parallel_size} should be the {processes} processes "
            "of trainer.devices and trainer.num_nodes; leave it out."
        )
