"""A trainer section as the file that `accelerate config` would write."""

from collections.abc import Mapping
from typing import Any

from nanogpt_lit.accelerate_config.accelerate_file import (
    BLOCKS,
    CPU_OPTIMIZER,
    DISTRIBUTED_TYPES,
    OURS,
    RENDEZVOUS,
    TABLE,
    Translation,
)
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import (
    DDP,
    DEEPSPEED,
    FOLLOWED,
    FSDP,
    FSDP2,
    SINGLE,
    WITHOUT_EFFECT,
    check_together,
)
from nanogpt_lit.loops.trainer_section import asked_processes, named_strategy, strategy_arguments
from nanogpt_lit.runtime.launch import whole_number
from nanogpt_lit.runtime.precision import IN_ACCELERATE, full_precision_name

# What accelerate config writes whatever the answers are.
ALWAYS = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "machine_rank": 0, "main_training_function": "main",
    "rdzv_backend": "static", "same_network": True,
}  # fmt: skip
PLUGINS = {
    DDP: "DistributedDataParallelKwargs",
    FSDP2: "FullyShardedDataParallelPlugin",
    DEEPSPEED: "DeepSpeedPlugin",
}


def into_accelerate(
    trainer: Mapping[str, Any],
    changed: Mapping[str, Any],
    compiles: bool,
    environ: Mapping[str, str],
    network: str = "gpt2",
) -> Translation:
    """accelerate's file for a trainer section.

    trainer: the whole section, as plain data (null may be left out)   changed: what in it is not fit's default
    compiles: model.compile   environ: where the first node of several is (MASTER_ADDR, MASTER_PORT, NODE_RANK)
    network: model.network
    Raises UserError for what accelerate has no name for and without which it would train another thing.
    """
    remarks: list[str] = []
    processes = asked_processes(trainer)
    use_cpu = trainer["accelerator"] == "cpu"
    strategy = named_strategy(trainer["strategy"], processes or 1)
    strategy = _checked(strategy, trainer, processes, use_cpu)
    if processes is None:
        processes = 1
        remarks.append(f"trainer.devices={trainer['devices']}: accelerate wants a number, and 1 is written here")
    if strategy == DDP and processes == 1:
        strategy = SINGLE  # accelerate starts no group of one
    content: dict[str, Any] = {
        **ALWAYS,
        "distributed_type": DISTRIBUTED_TYPES[strategy][0],
        "mixed_precision": IN_ACCELERATE[full_precision_name(trainer.get("precision"))],
        "num_machines": trainer["num_nodes"],
        "num_processes": processes,
        "use_cpu": use_cpu,
    }
    if strategy in (SINGLE, DDP) and not use_cpu:
        devices = trainer["devices"]
        content["gpu_ids"] = ",".join(map(str, devices)) if isinstance(devices, list) else "all"
    if use_cpu and processes > 1:
        needs = "InitProcessGroupKwargs(backend='gloo')" if strategy == DEEPSPEED else "Accelerator(cpu=True)"
        script = (
            f"in a script of your own Accelerator() then trains DDP in place of FSDP2; {OURS} trains FSDP2"
            if strategy == FSDP2
            else f"a script of your own needs {needs}, or each process trains alone; {OURS} knows"
        )
        remarks.append(
            f"use_cpu=True: `accelerate launch` starts {processes} processes without telling them of CPUs; {script}"
        )
    if compiles:
        content["dynamo_config"] = {"dynamo_backend": "INDUCTOR"}
        remarks.append(f"model.compile=True: {OURS} compiles by itself; take dynamo_config out for it")
    if trainer["num_nodes"] > 1:
        remarks += _rendezvous(content, environ)
    arguments = strategy_arguments(trainer["strategy"])
    section, carried = _section(strategy, arguments, trainer, BLOCKS[network])
    if arguments.get("offload_optimizer"):
        remarks.append(f"offload_optimizer_device: needs {CPU_OPTIMIZER} for an optimizer, also in your script")
    content |= section
    for name in sorted(strategy_arguments(changed.get("strategy", "auto")).keys() - carried):
        plugin = PLUGINS.get(strategy, "Accelerator")
        remarks.append(f"trainer.strategy's {name}={arguments[name]}: in code, by accelerate's {plugin}")
    remarks += _remarks(trainer, changed, strategy)
    return Translation(content, [*remarks, f"model, data, seed_everything: {OURS} takes them from the YAML"])


def _checked(strategy: str | None, trainer: Mapping[str, Any], processes: int | None, use_cpu: bool) -> str:
    accelerator, precision = trainer["accelerator"], full_precision_name(trainer.get("precision"))
    if accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
        raise UserError(f"trainer.accelerator={accelerator} is not translated; auto, cpu, gpu, cuda and mps are.")
    if strategy in (None, FSDP):
        raise UserError(
            f"trainer.strategy={trainer['strategy']} is not translated; auto, ddp, ModelParallelStrategy (FSDP, "
            "version 2) and deepspeed are."
        )
    assert strategy is not None
    if precision not in IN_ACCELERATE:
        raise UserError(f"trainer.precision={precision} has no name in accelerate; {', '.join(IN_ACCELERATE)} have.")
    clip, device = trainer.get("gradient_clip_val"), "cpu" if use_cpu else "cuda"
    chosen = {"trainer.strategy": strategy, "trainer.precision": precision, "trainer.gradient_clip_val": clip}
    chosen |= {f"trainer.strategy.{k}": v for k, v in strategy_arguments(trainer["strategy"]).items() if k == "stage"}
    check_together(chosen | {"trainer.accelerator": device})
    if processes is None and strategy != SINGLE:
        raise UserError(
            f"trainer.devices={trainer['devices']} leaves the number of processes open, which accelerate's file "
            "names; set for example trainer.devices=2."
        )
    return strategy


def _rendezvous(content: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    for key, variable in RENDEZVOUS.items():
        if variable in environ:
            content[key] = environ[variable] if key == "main_process_ip" else whole_number(variable, environ)
    missing = [key for key, variable in RENDEZVOUS.items() if variable not in environ]
    return [f"{', '.join(missing)}: add them, on each node its own machine_rank (0 is the first)"] if missing else []


def _section(
    strategy: str, arguments: Mapping[str, Any], trainer: Mapping[str, Any], block: str
) -> tuple[dict, set[str]]:
    """The section of the file that speaks of the strategy, and the arguments that it carries. block: the class"""
    if strategy == DEEPSPEED:
        return {"deepspeed_config": _deepspeed(arguments, trainer)}, {
            "config", "stage", "offload_optimizer", "offload_optimizer_device", "offload_parameters",
            "offload_params_device", "nvme_path",
        }  # fmt: skip
    if strategy != FSDP2:
        return {}, {"start_method"}  # accelerate launch always starts processes anew
    values = {
        "version": 2,
        "reshard_after_forward": True,
        "offload_params": False,
        "activation_checkpointing": False,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT",  # as fit-accelerate saves
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": block,
    }
    # The last changes nothing: each process saves its own share, as the file says.
    carried = {"data_parallel_size", "tensor_parallel_size", "save_distributed_checkpoint"}
    return {"fsdp_config": {f"fsdp_{name}": value for name, value in values.items()}}, carried


def _deepspeed(arguments: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    if arguments.get("config") is not None:
        return {"deepspeed_config_file": arguments["config"], "zero3_init_flag": False}
    devices = {
        "optimizer": arguments.get("offload_optimizer_device", "cpu") if arguments.get("offload_optimizer") else "none",
        "param": arguments.get("offload_params_device", "cpu") if arguments.get("offload_parameters") else "none",
    }
    section = {"zero_stage": arguments.get("stage", 2), "zero3_init_flag": False}
    section["gradient_accumulation_steps"] = trainer["accumulate_grad_batches"]
    if clip := trainer.get("gradient_clip_val"):
        section["gradient_clipping"] = float(clip)
    if section["zero_stage"] >= 2:
        section |= {f"offload_{what}_device": device for what, device in devices.items()}
    for what, device in devices.items():
        if device == "nvme":
            section[f"offload_{what}_nvme_path"] = arguments.get("nvme_path", "/local_nvme")
    return section


def _remarks(trainer: Mapping[str, Any], changed: Mapping[str, Any], strategy: str) -> list[str]:
    """A line for each key of the section without a place in the file, keys with the same answer on one line."""
    rows, keys_of = {row.lightning: row for row in TABLE}, dict[str, list[str]]()
    for key, value in trainer.items():
        if row := rows.get(f"trainer.{key}"):
            # DeepSpeed's section carries them.
            advice = row.instead.format(value=value) if value != row.default and strategy != DEEPSPEED else ""
        elif key in FOLLOWED:
            advice = f"from the YAML, in {OURS}"
        elif key in WITHOUT_EFFECT:
            advice = "without effect under accelerate"
        else:
            advice = "only Lightning's Trainer has it: train with fit, or take it out"
        if advice and (row or key in changed):
            keys_of.setdefault(advice, []).append(f"trainer.{key}")
    return [f"{', '.join(keys)}: {advice}" for advice, keys in keys_of.items()]
