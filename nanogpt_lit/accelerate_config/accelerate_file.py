"""accelerate's default_config.yaml: its keys, what Lightning's Trainer calls them, and how it is read.

Neither framework is imported.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import DDP, DEEPSPEED, FSDP2, SINGLE
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

DISTRIBUTED_TYPES = {
    SINGLE: ("NO",), DDP: ("MULTI_GPU", "MULTI_CPU"), FSDP2: ("FSDP",), DEEPSPEED: ("DEEPSPEED",)
}  # fmt: skip
"""distributed_type of each strategy. The first is written, for CPUs too: of MULTI_CPU `accelerate launch` starts one
process, whatever num_processes says."""
BLOCKS = {"gpt2": "GPTBlock", "llama": "LlamaBlock"}
"""The layers that FSDP gathers one at a time, by model.network; accelerate looks for the name of a module's class."""
CPU_OPTIMIZER = "deepspeed.ops.adam.DeepSpeedCPUAdam"
"""The optimizer without which DeepSpeed does not offload."""

OURS = "fit-accelerate"
RENDEZVOUS = {"machine_rank": "NODE_RANK", "main_process_ip": "MASTER_ADDR", "main_process_port": "MASTER_PORT"}


@dataclass
class Translation:
    content: dict[str, Any]
    """Content of the other framework's file."""
    remarks: list[str] = field(default_factory=list)
    """Settings that have no place in it: `key=value: what to do`."""

    def text(self, title: str) -> str:
        """YAML, with the remarks as comments at its end, under their title."""
        text: str = yaml.safe_dump(self.content)
        comments = [title, *("  " + remark for remark in self.remarks)] if self.remarks else []
        return text + "".join(f"# {line}\n" for comment in comments for line in comment.splitlines())


@dataclass(frozen=True)
class Row:
    lightning: str | None
    """The key in our YAML, or an environment variable; None where Lightning has no name for it."""
    accelerate: str
    """The key in accelerate's file."""
    default: Any = None
    """The value that asks for nothing: it needs no counterpart."""
    instead: str = ""
    """The advice for another value where there is no counterpart."""
    refused: bool = False
    """Another value would train something else: no file is made from it."""


_ARGUMENT = "trainer.strategy.init_args."
_FSDP, _DEEPSPEED, _PARALLEL = "fsdp_config.fsdp_", "deepspeed_config.", "parallelism_config.parallelism_config_"
_FROM_YAML = f"{OURS} takes it from the YAML"

TABLE: tuple[Row, ...] = (
    # machine and processes
    Row(None, "compute_environment", "LOCAL_MACHINE", "only LOCAL_MACHINE has a Trainer to go to", refused=True),
    Row("trainer.strategy", "distributed_type"),
    Row("trainer.precision", "mixed_precision"),
    Row("trainer.accelerator", "use_cpu"),
    Row("trainer.devices", "num_processes"),
    Row("trainer.devices", "gpu_ids"),
    Row("trainer.num_nodes", "num_machines"),
    *(Row(variable, key) for key, variable in RENDEZVOUS.items()),
    Row(None, "rdzv_backend", "static", "start fit by torchrun --rdzv_backend={value}"),
    Row(None, "same_network", True, "start fit by torchrun with --rdzv_endpoint=HOST:PORT, reachable from every node"),
    Row(None, "main_training_function", "main", "leave it out: fit is a command and names no function"),
    Row("model.compile", "dynamo_config.dynamo_backend", "NO", "model.compile=true is torch.compile with inductor"),
    # FSDP, version 2
    Row("trainer.strategy", _FSDP + "version"),
    Row(None, _FSDP + "reshard_after_forward", True,
        "each block's weights are given back after its forward; change shard in nanogpt_lit/loops/sharded.py"),
    Row(None, _FSDP + "offload_params", False, "model.memory.recompute=full takes less of a GPU"),
    Row(None, _FSDP + "auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
        "the network is wrapped block by block instead, as TRANSFORMER_BASED_WRAP with GPTBlock does"),
    Row(None, _FSDP + "transformer_layer_cls_to_wrap", None,
        "the network's layers are of class GPTBlock or LlamaBlock"),
    Row(None, _FSDP + "state_dict_type", "SHARDED_STATE_DICT",
        "each process saves its own share; convert makes one file of them"),
    Row(None, _FSDP + "activation_checkpointing", False, "model.memory.recompute=full is the same in the YAML"),
    *(
        Row(None, _PARALLEL + name, 1, "this network is only sharded over all processes alike; set it to 1", True)
        for name in ("dp_replicate_size", "tp_size", "cp_size", "sp_size")
    ),
    Row(_ARGUMENT + "data_parallel_size", _PARALLEL + "dp_shard_size", 1),
    # DeepSpeed
    Row(_ARGUMENT + "config", _DEEPSPEED + "deepspeed_config_file"),
    Row(_ARGUMENT + "stage", _DEEPSPEED + "zero_stage"),
    Row(_ARGUMENT + "offload_optimizer_device", _DEEPSPEED + "offload_optimizer_device"),
    Row(_ARGUMENT + "offload_params_device", _DEEPSPEED + "offload_param_device"),
    Row(_ARGUMENT + "nvme_path", _DEEPSPEED + "offload_optimizer_nvme_path"),
    Row(_ARGUMENT + "nvme_path", _DEEPSPEED + "offload_param_nvme_path"),
    Row("trainer.accumulate_grad_batches", _DEEPSPEED + "gradient_accumulation_steps", 1,
        f"Accelerator(gradient_accumulation_steps={{value}}); {_FROM_YAML}"),
    Row("trainer.gradient_clip_val", _DEEPSPEED + "gradient_clipping", None,
        f"accelerator.clip_grad_norm_(parameters, {{value}}); {_FROM_YAML}"),
)  # fmt: skip
ROW_OF = {row.accelerate: row for row in TABLE}
# Sections, and what their keys begin with, which accelerate lets one leave out.
SECTIONS = {
    "deepspeed_config": "",
    "dynamo_config": "dynamo_",
    "fsdp_config": "fsdp_",
    "parallelism_config": "parallelism_config_",
}
# The distributed_type without which accelerate does not read a section.
READ_FOR = {"deepspeed_config": "DEEPSPEED", "fsdp_config": "FSDP", "parallelism_config": "FSDP"}
NUMBERS = {
    **dict.fromkeys(
        ("num_processes", "num_machines", "machine_rank", "main_process_port", "fsdp_config.fsdp_version",
         "deepspeed_config.zero_stage", "deepspeed_config.gradient_accumulation_steps",
         "parallelism_config.parallelism_config_dp_shard_size"), int),
    "deepspeed_config.gradient_clipping": float,
}  # fmt: skip
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_accelerate_file(path: Path) -> dict[str, Any]:
    """Read the keys of accelerate's file, those of a section as `section.key`.

    Raises UserError for what accelerate would ignore, or read as something else, without a word.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--to-trainer={path} is no file; `accelerate config` writes one and says where.")
    content = load_yaml_file(path)
    if not isinstance(content, dict):
        raise UserError(f"--to-trainer={path} holds no keys; `accelerate config` writes one a line.")
    values = {key: _value(key, value) for key, value in _flat(content)}
    values.setdefault("mixed_precision", "no")
    kind, kinds = values.get("distributed_type"), [name for names in DISTRIBUTED_TYPES.values() for name in names]
    if kind not in kinds:
        raise UserError(
            f"accelerate's distributed_type={kind} is no strategy of Lightning; {', '.join(dict.fromkeys(kinds))} are."
        )
    for section, asked in READ_FOR.items():
        inside = next((name for name in values if name.startswith(section + ".")), None)
        if inside is not None and kind != asked:
            raise UserError(
                f"accelerate does not read {inside} beside distributed_type={kind}; "
                f"set distributed_type: {asked}, or take {section} out."
            )
    return values


def _flat(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if key not in SECTIONS:
            yield _printable(key), value
            continue
        if not isinstance(value, dict | None):
            raise UserError(f"accelerate's {key} should hold keys of its own; `accelerate config` indents them.")
        for name, inner in (value or {}).items():
            full = name if str(name).startswith(SECTIONS[key]) else f"{SECTIONS[key]}{name}"
            yield _printable(f"{key}.{full}"), inner


def _printable(key: Any) -> str:
    return str(key)[:100] if str(key).isprintable() else ascii(str(key)[:100])


def _value(key: str, value: Any) -> Any:
    """The value as a bool, number or string; that of a key without a counterpart as it is."""
    if key not in ROW_OF or value is None:
        return value
    if not isinstance(value, str | int | float):
        raise UserError(f"accelerate's {key} should be one value; `accelerate config` writes no more.")
    if isinstance(value, str) and not value.isprintable():
        raise UserError(f"accelerate's {key} holds characters that a terminal would obey; write it in plain ones.")
    if key == "distributed_type" and value is False:
        raise UserError("accelerate's distributed_type is false: YAML reads a bare NO so; write 'NO' in quotes.")
    if key == "mixed_precision" and value is False:
        return "no"
    if isinstance(ROW_OF[key].default, bool) or key == "use_cpu":
        return {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}.get(str(value).lower(), value)
    if key in NUMBERS:
        try:
            return NUMBERS[key](str(value))
        except ValueError:
            raise UserError(f"accelerate's {key}={str(value)[:100]} should be a number, for example 1.") from None
    return value
