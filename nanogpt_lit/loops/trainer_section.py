"""The YAML's trainer section: its strategy, its devices, and its settings for a loop that is not Lightning's Trainer.

A strategy is known here by the name of its class in lightning.pytorch.strategies, which is not imported.
"""

import difflib
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import DDP, DEEPSPEED, FSDP, FSDP2, SINGLE, TEXT_SAMPLES
from nanogpt_lit.runtime.launch import RANKS, SIZES, whole_number
from nanogpt_lit.runtime.precision import full_precision_name

if TYPE_CHECKING:  # whose torch takes a second to import, and the section can be read without
    from nanogpt_lit.loops.contract import LoopSettings

TRAINER_DEFAULTS = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    # The order of samples is endless and already split by rank (data/sampler.py): there is no epoch to wait for, and
    # Lightning's own sampler would replay or skip samples after a resume.
    "use_distributed_sampler": False,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
"""Defaults of `fit` that differ from those of Lightning's Trainer."""
CHOICES = {
    "gradient_clip_algorithm": ("norm", "value"),
    "profiler": ("simple", "advanced", "pytorch"),
}
"""The names that some settings of the Trainer may have."""
FEW_PROCESSES = 8
"""Processes that may be started on CPUs with fewer cores, to try what several do."""
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


PLANNED: Mapping[str, Literal["single", "ddp", "fsdp2"]] = {SINGLE: "single", DDP: "ddp", FSDP2: "fsdp2"}
"""Strategies of which a plan knows what each device holds, in its words."""


def named_strategy(strategy: Any, processes: int | None = 1) -> str | None:
    """The class that trainer.strategy names: by a short name, a class path with its arguments, or an object of it.

    None for a class path of the user's own. processes: what "auto" depends on
    """
    if isinstance(strategy, str):
        if strategy == "auto":
            return SINGLE if processes == 1 else DDP
        if strategy in SHORT_NAMES:
            return SHORT_NAMES[strategy][0]
        return FSDP2 if strategy == FSDP2 else None
    if hasattr(strategy, "get"):
        names = [str(strategy.get("class_path")).rpartition(".")[2]]
    else:
        names = [kind.__name__ for kind in type(strategy).__mro__]
    return next((name for name in names if name in STRATEGIES), None)


def writes_run_files(trainer: Namespace) -> bool:
    """Tell whether checkpoints are in the format of every loop; FSDP 1 writes them its own way."""
    return named_strategy(trainer.strategy) in (SINGLE, DDP, FSDP2, DEEPSPEED)


def strategy_arguments(strategy: Any) -> dict[str, Any]:
    """The arguments of the class that trainer.strategy names, or those that a short name stands for."""
    if isinstance(strategy, str):
        return dict(SHORT_NAMES[strategy][1]) if strategy in SHORT_NAMES else {}
    return {**(strategy.get("init_args") or {}), **(strategy.get("dict_kwargs") or {})}


def strategy_settings(trainer: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Collect what compatibility.py asks of the trainer section. device: "cuda", "mps" or "cpu"

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
    arguments = strategy_arguments(strategy)
    if isinstance(config := arguments.get("config"), Mapping):
        arguments["stage"] = config.get("zero_optimization", {}).get("stage", 0)
    return {
        "trainer.strategy": name,
        "trainer.accelerator": device,
        "trainer.precision": full_precision_name(trainer["precision"]),
        "trainer.gradient_clip_val": trainer["gradient_clip_val"],
        **{
            f"trainer.strategy.{key}": arguments[key]
            for key in ("start_method", "tensor_parallel_size", "offload_optimizer", "stage")
            if key in arguments
        },
    }


def check_started(trainer: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
    """Raises UserError for other processes than torchrun or srun has started, and other machines than anything has."""
    asked = asked_processes(trainer)
    if trainer["num_nodes"] > 1 and not any(name in environ for name in (*SIZES, *RANKS)):
        raise UserError(
            f"trainer.num_nodes={trainer['num_nodes']} waits for other machines, and nothing says which one this is; "
            "start fit by torchrun or srun, or set NODE_RANK, MASTER_ADDR and MASTER_PORT on each."
        )
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


def check_choices(trainer: Mapping[str, Any]) -> None:
    """Raises UserError for a name that Lightning does not know; it would say so once the data is made."""
    for key, known in CHOICES.items():
        if isinstance(name := trainer[key], str) and name not in known:
            raise UserError(f"trainer.{key}={name} is not known; {' and '.join(known)} are.")


def check_devices(devices: Any, device: str) -> None:
    """Raises UserError for what names no devices. device: "cuda", "mps" or "cpu"; GPUs may also be named by number"""
    text = ",".join(map(str, devices)) + "," * (len(devices) == 1) if isinstance(devices, list) else str(devices)
    is_number = re.fullmatch(r"[1-9][0-9]{0,3}", text) is not None
    most = max(FEW_PROCESSES, os.cpu_count() or 1)
    if device == "cpu" and is_number and int(text) > most:
        raise UserError(f"trainer.devices={text} starts {text} processes on {os.cpu_count()} CPU cores; {most} may be.")
    if text == "auto" or is_number:
        return
    if device == "cpu":
        raise UserError(f"trainer.devices={devices} is no number of processes on CPUs; auto and 1 to 9,999 work.")
    if not re.fullmatch(r"-1|[0-9]{1,4}(,[0-9]{1,4})*,?", text):
        raise UserError(f"trainer.devices={devices} names no GPUs; auto, 2, [0, 1] and -1, which is all, work.")


def complete_sizes(trainer: Namespace) -> None:
    """Shards over all processes where ModelParallelStrategy's sizes are left at "auto".

    Lightning's auto would shard over nodes and divide every matrix over the GPUs of one.
    """
    if named_strategy(trainer.strategy) != FSDP2:
        return
    if isinstance(trainer.strategy, str):  # Lightning knows no short name of it
        arguments = Namespace(data_parallel_size="auto", tensor_parallel_size=1)
        trainer.strategy = Namespace(class_path=f"lightning.pytorch.strategies.{FSDP2}", init_args=arguments)
    arguments = trainer.strategy.init_args
    arguments.tensor_parallel_size = 1  # check_together refuses another
    processes = asked_processes(vars(trainer)) or whole_number("WORLD_SIZE", os.environ, least=1)
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


# For a loop that is not Lightning's Trainer.


def loop_settings(trainer: Mapping[str, Any], val_batches: int, seed: int | None) -> "LoopSettings":
    """The settings of a run. val_batches: that there are, of which limit_val_batches may be a share"""
    from nanogpt_lit.loops.contract import LoopSettings

    interval, limit = trainer["val_check_interval"], trainer["limit_val_batches"]
    if isinstance(limit, float):  # a share, as Lightning counts it
        limit = int(val_batches * limit)
    if limit == 0:
        interval, limit = None, None
    return LoopSettings(
        max_steps=trainer["max_steps"],
        accumulate_grad_batches=trainer["accumulate_grad_batches"],
        gradient_clip_val=trainer["gradient_clip_val"],
        precision=full_precision_name(trainer["precision"]),
        val_check_interval=interval,
        limit_val_batches=limit,
        seed=seed,
        deterministic=trainer["deterministic"],
    )


def text_samples(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the text samples in the YAML: prompt, tokens, temperature, seed."""
    of_samples = (c for c in trainer["callbacks"] or [] if c["class_path"].endswith(TEXT_SAMPLES))
    return {key: value for c in of_samples for key, value in vars(c["init_args"]).items()}


def asked_processes(trainer: Mapping[str, Any]) -> int | None:
    """trainer.devices times trainer.num_nodes; None when the YAML leaves it open."""
    devices = trainer["devices"]
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    return devices * trainer["num_nodes"] if isinstance(devices, int) and devices > 0 else None
