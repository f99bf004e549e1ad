"""accelerate's default_config.yaml, which may come from anywhere, as a trainer section."""

import difflib
from collections.abc import Mapping
from typing import Any

from nanogpt_lit.accelerate_config.accelerate_file import (
    BLOCKS,
    CPU_OPTIMIZER,
    RENDEZVOUS,
    ROW_OF,
    Translation,
)
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import DDP, DEEPSPEED, FSDP2, SINGLE, check_together
from nanogpt_lit.runtime.precision import OF_ACCELERATE

WRAPPED = "fsdp_config.fsdp_transformer_layer_cls_to_wrap"


class Source:
    """The keys of accelerate's file; those that nobody took are left over."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.left = dict(values)

    def take(self, key: str, default: Any = None) -> Any:
        value = self.left.pop(key, None)
        return default if value is None else value

    def remarks(self) -> list[str]:
        """One for each key left over that asks for something. Raises UserError where the run would be another one
        without it."""
        return [remark for key, value in self.left.items() if (remark := _remark(key, value)) is not None]


def _remark(key: str, value: Any) -> str | None:
    row = ROW_OF.get(key)
    if value in (row.default if row else False, None, "", "none", "no", "default", [], [""], {}):
        return None
    if row is None:
        section, _, _ = key.rpartition(".")
        nearest = difflib.get_close_matches(key, [known for known in ROW_OF if known.startswith(section)], 1, 0.9)
        return f"{key}: " + (f"did you mean {nearest[0]}?" if nearest else "Lightning's Trainer has no such key")
    advice = row.instead.format(value=value) or "leave it out: nothing reads it here"
    if row.refused:
        raise UserError(f"accelerate's {key}={value} has no counterpart: {advice}.")
    return f"{key}={value}: {advice}"


def to_trainer(values: Mapping[str, Any]) -> Translation:
    """The trainer section for what read_accelerate_file read. Raises UserError for values at odds with each other."""
    source = Source(values)
    if source.left.get(WRAPPED) in BLOCKS.values():
        source.take(WRAPPED)
    kind, use_cpu = source.take("distributed_type"), source.take("use_cpu", values["distributed_type"] == "MULTI_CPU")
    processes, machines = source.take("num_processes", 1), source.take("num_machines", 1)
    strategy = _strategy(kind, source.take("fsdp_config.fsdp_version", 1), use_cpu)
    gpu_ids = _gpu_ids(source.take("gpu_ids", "all"))
    _check_processes(strategy, processes, machines, gpu_ids)
    remarks = _rendezvous(source, machines)
    if gpu_ids and machines > 1:
        remarks.append(f"gpu_ids={','.join(map(str, gpu_ids))}: set CUDA_VISIBLE_DEVICES on every node")
    if (mixed_precision := source.take("mixed_precision", "no")) not in OF_ACCELERATE:
        raise UserError(f"accelerate's mixed_precision={mixed_precision} is not known; {', '.join(OF_ACCELERATE)} are.")
    trainer: dict[str, Any] = {
        "accelerator": "cpu" if use_cpu else "auto" if strategy == SINGLE and not gpu_ids else "gpu",
        "devices": gpu_ids if gpu_ids and machines == 1 else processes // machines,
        "num_nodes": machines,
        "precision": OF_ACCELERATE[mixed_precision],
    }
    check_together({"trainer.strategy": strategy, "trainer.precision": trainer["precision"]})
    trainer |= _strategy_section(strategy, source, processes)
    content: dict[str, Any] = {"trainer": trainer}
    if str(source.left.get("dynamo_config.dynamo_backend")).upper() == "INDUCTOR":
        del source.left["dynamo_config.dynamo_backend"]
        content["model"] = {"compile": True}
    if strategy != DEEPSPEED:
        remarks.append(
            "trainer.accumulate_grad_batches, trainer.gradient_clip_val: accelerate keeps both in your script "
            "(Accelerator(gradient_accumulation_steps=...), clip_grad_norm_); take them over from there"
        )
    elif trainer["strategy"].get("init_args", {}).get("offload_optimizer"):
        remarks.append(
            "deepspeed_config.offload_optimizer_device: DeepSpeed offloads its own optimizer only; start fit with "
            f"--model.optim.class_path={CPU_OPTIMIZER} --trust deepspeed"
        )
    return Translation(content, remarks + source.remarks())


def _strategy(kind: str, fsdp_version: int, use_cpu: bool) -> str:
    if kind == "FSDP" and fsdp_version != 2:
        raise UserError(
            f"accelerate's fsdp_config.fsdp_version={fsdp_version} is not translated, 2 is; `accelerate to-fsdp2 "
            "--config_file FILE --output_file NEW` writes it, and fit has version 1 by trainer.strategy: fsdp."
        )
    strategy = {"NO": SINGLE, "MULTI_GPU": DDP, "MULTI_CPU": DDP, "FSDP": FSDP2, "DEEPSPEED": DEEPSPEED}[kind]
    if kind == "MULTI_CPU" and not use_cpu:
        raise UserError(f"accelerate's use_cpu={use_cpu} contradicts distributed_type={kind}; it goes with true.")
    return strategy


def _gpu_ids(value: Any) -> list[int]:
    """The numbers of the GPUs; [] for all."""
    try:
        return [] if value == "all" else [int(item) for item in str(value).split(",")]
    except ValueError:
        raise UserError(f"accelerate's gpu_ids={value} should be all, or numbers such as 0,1.") from None


def _check_processes(strategy: str, processes: int, machines: int, gpu_ids: list[int]) -> None:
    if machines < 1 or processes < 1 or processes % machines:
        raise UserError(
            f"accelerate's num_processes={processes} does not divide over num_machines={machines}; it counts the "
            "processes of all machines together."
        )
    if strategy == SINGLE and processes > 1:
        raise UserError(
            f"accelerate's num_processes={processes} contradicts distributed_type=NO, which starts one; "
            "MULTI_GPU and MULTI_CPU start more."
        )
    if gpu_ids and len(gpu_ids) != processes // machines:
        raise UserError(
            f"accelerate's gpu_ids={','.join(map(str, gpu_ids))} contradicts num_processes={processes}: "
            f"{processes // machines} on each machine; write as many numbers, or all."
        )


def _rendezvous(source: Source, machines: int) -> list[str]:
    rank, address, port = (source.take(key) for key in RENDEZVOUS)
    if machines == 1:
        for key in ("rdzv_backend", "same_network"):  # which say how several machines find each other
            source.take(key)
        return []
    if rank is not None and rank >= machines:
        raise UserError(f"accelerate's machine_rank={rank} is not below num_machines={machines}; the first is 0.")
    if address is None or port is None:
        raise UserError(
            f"accelerate's num_machines={machines} needs main_process_ip and main_process_port, the address of the "
            "machine whose machine_rank is 0."
        )
    where = f"NODE_RANK={rank or 0} MASTER_ADDR={address} MASTER_PORT={port}"
    return [f"machine_rank, main_process_ip, main_process_port: start this node with {where} python -m nanogpt_lit fit"]


def _strategy_section(strategy: str, source: Source, processes: int) -> dict[str, Any]:
    """trainer.strategy, and the keys beside it that accelerate keeps with the strategy."""
    if strategy in (SINGLE, DDP):
        return {"strategy": "auto" if strategy == SINGLE else "ddp"}
    beside: dict[str, Any] = {}
    section: dict[str, Any] = {"class_path": f"lightning.pytorch.strategies.{strategy}"}
    if strategy == DEEPSPEED:
        section["init_args"], beside = _deepspeed_arguments(source)
    else:
        section["init_args"] = _fsdp2_arguments(source, processes)
    return {"strategy": {key: value for key, value in section.items() if value}, **beside}


def _fsdp2_arguments(source: Source, processes: int) -> dict[str, Any]:
    shards = source.take("parallelism_config.parallelism_config_dp_shard_size", 1)
    if shards not in (1, processes):
        raise UserError(
            f"accelerate's parallelism_config_dp_shard_size={shards} leaves some of num_processes={processes} "
            "without a share; set one to the other."
        )
    return {"data_parallel_size": processes, "tensor_parallel_size": 1}


def _deepspeed_arguments(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [key.partition(".")[2] for key in ROW_OF if key.startswith("deepspeed_config.")]
    given = {name: source.take(f"deepspeed_config.{name}") for name in names}
    given = {name: value for name, value in given.items() if value not in (None, "none", "")}
    config = given.pop("deepspeed_config_file", None)
    if config is not None and given:
        raise UserError(
            f"accelerate's deepspeed_config_file={config} and {', '.join(given)} both configure DeepSpeed; keep one."
        )
    paths = {given[name] for name in ("offload_optimizer_nvme_path", "offload_param_nvme_path") if name in given}
    if len(paths) > 1:
        raise UserError(
            f"accelerate's two nvme paths are {' and '.join(sorted(paths))}, and Lightning has one nvme_path."
        )
    arguments: dict[str, Any] = {"config": config} if config is not None else {"stage": given.get("zero_stage", 2)}
    check_together({f"trainer.strategy.{name}": value for name, value in arguments.items()})
    if "offload_optimizer_device" in given:
        arguments |= {"offload_optimizer": True, "offload_optimizer_device": given["offload_optimizer_device"]}
    if "offload_param_device" in given:
        arguments |= {"offload_parameters": True, "offload_params_device": given["offload_param_device"]}
    if paths:
        arguments["nvme_path"] = paths.pop()
    beside = {"gradient_accumulation_steps": "accumulate_grad_batches", "gradient_clipping": "gradient_clip_val"}
    return arguments, {ours: given[theirs] for theirs, ours in beside.items() if theirs in given}
