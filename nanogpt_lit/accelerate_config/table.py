"""What a key is called in Lightning's Trainer and in accelerate's file: names only, neither framework is imported."""

from dataclasses import dataclass
from typing import Any

from nanogpt_lit.loops.compatibility import DDP, DEEPSPEED, FSDP, FSDP2, SINGLE

DISTRIBUTED_TYPES = {
    SINGLE: ("NO",), DDP: ("MULTI_GPU", "MULTI_CPU"), FSDP: ("FSDP",), FSDP2: ("FSDP",), DEEPSPEED: ("DEEPSPEED",)
}  # fmt: skip
"""Of each strategy; where there are two, on GPUs and on CPUs."""
LAYER = "nanogpt_lit.gpt.model.Block"  # what FSDP gathers at a time

OUR_SCRIPT = "scripts/train_accelerate.py"
FSDP_STATE_DICTS = {"FULL_STATE_DICT": "full", "SHARDED_STATE_DICT": "sharded"}
RENDEZVOUS = {"machine_rank": "NODE_RANK", "main_process_ip": "MASTER_ADDR", "main_process_port": "MASTER_PORT"}


@dataclass(frozen=True)
class Row:
    lightning: str | None
    """The key in our YAML, or an environment variable; None where Lightning has no name for it."""
    accelerate: str | None
    """The key in accelerate's file; None where that has no name for it."""
    default: Any = None
    """The value that asks for nothing: it needs no counterpart."""
    instead: str = ""
    """What to do about another value where there is no counterpart."""
    refused: bool = False
    """Another value would train something else: no file is made from it."""


_ARGUMENT, _KEYWORD = "trainer.strategy.init_args.", "trainer.strategy.dict_kwargs."
_FSDP, _DEEPSPEED, _PARALLEL = "fsdp_config.fsdp_", "deepspeed_config.", "parallelism_config.parallelism_config_"
_NO_SUCH_SWITCH = "leave it out: FSDP2 has no such switch"
_FROM_YAML = f"{OUR_SCRIPT} takes it from the YAML"

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
    # FSDP
    Row("trainer.strategy", _FSDP + "version"),
    Row(_ARGUMENT + "sharding_strategy", _FSDP + "reshard_after_forward", True,
        "the module gives every block's weights back after its forward; change fully_shard in nanogpt_lit/module.py"),
    Row(_ARGUMENT + "sharding_strategy", _FSDP + "sharding_strategy"),
    Row(_ARGUMENT + "cpu_offload", _FSDP + "offload_params", False, "set fsdp_version: 1, whose strategy offloads"),
    Row(_ARGUMENT + "auto_wrap_policy", _FSDP + "auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
        "the network is wrapped block by block instead, as TRANSFORMER_BASED_WRAP with Block does"),
    Row(_ARGUMENT + "auto_wrap_policy", _FSDP + "transformer_layer_cls_to_wrap", "Block",
        "the network's layers are of class Block"),
    Row(None, _FSDP + "backward_prefetch", "BACKWARD_PRE", "Lightning keeps torch's BACKWARD_PRE"),
    Row(_KEYWORD + "forward_prefetch", _FSDP + "forward_prefetch", False, _NO_SUCH_SWITCH),
    Row(_KEYWORD + "use_orig_params", _FSDP + "use_orig_params", True, "leave it out: FSDP2 always keeps them"),
    Row(_KEYWORD + "sync_module_states", _FSDP + "sync_module_states", True, _NO_SUCH_SWITCH),
    Row(_ARGUMENT + "state_dict_type", _FSDP + "state_dict_type", None,
        "choose FULL_STATE_DICT or SHARDED_STATE_DICT"),
    Row(_ARGUMENT + "activation_checkpointing_policy", _FSDP + "activation_checkpointing", False,
        "FSDP2 leaves it to the module, which keeps its activations"),
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
    # what only our YAML says, and what it is called in code under accelerate
    *(
        Row(f"trainer.{name}", None, default, _FROM_YAML)
        for name, default in {
            "callbacks": None, "default_root_dir": None, "deterministic": None, "enable_checkpointing": None,
            "enable_progress_bar": None, "limit_val_batches": None, "log_every_n_steps": None, "max_steps": -1,
            "max_time": None, "val_check_interval": None,
        }.items()
    ),
    *(
        Row(f"trainer.{name}", None, None, "without effect under accelerate")
        for name in ("barebones", "enable_model_summary", "num_sanity_val_steps", "use_distributed_sampler")
    ),
    Row("trainer.gradient_clip_algorithm", None, None, "accelerator.clip_grad_value_(parameters, ...) clips by value"),
    Row("trainer.logger", None, None, "Accelerator(log_with=...)"),
    Row("trainer.plugins", None, None, "Accelerator(kwargs_handlers=[...]), where there is one of the kind"),
    Row("trainer.profiler", None, None, "Accelerator(kwargs_handlers=[ProfileKwargs(...)])"),
)  # fmt: skip
ROW_OF = {row.accelerate: row for row in TABLE if row.accelerate is not None}
