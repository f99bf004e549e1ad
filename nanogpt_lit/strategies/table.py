"""What a choice is called in Lightning's Trainer and in accelerate's file, key by key.

Names only: neither framework is imported. `from_accelerate.py` and `into_accelerate.py` translate by this table, tests
hold it against the keys of both installed frameworks, and `check.py` says before a run what a strategy needs.
"""

from dataclasses import dataclass
from typing import Any

LAYER = "nanogpt_lit.gpt.model.Block"  # what FSDP gathers at a time

PRECISIONS = {"32-true": "no", "16-mixed": "fp16", "bf16-mixed": "bf16", "transformer-engine": "fp8"}
OUR_SCRIPT = "scripts/train_accelerate.py"
FSDP_STATE_DICTS = {"FULL_STATE_DICT": "full", "SHARDED_STATE_DICT": "sharded"}
RENDEZVOUS = {"machine_rank": "NODE_RANK", "main_process_ip": "MASTER_ADDR", "main_process_port": "MASTER_PORT"}


@dataclass(frozen=True)
class Strategy:
    lightning: str
    """The class in lightning.pytorch.strategies."""
    accelerate: tuple[str, ...]
    """distributed_type in accelerate's file; where there are two, on cards and on processors."""
    fsdp_version: int | None = None
    needs_cuda: bool = False
    package: str | None = None
    """That must be installed besides Lightning."""
    precisions: tuple[str, ...] | None = None
    """That Lightning takes; None takes all."""
    clips: bool = True
    """Whether Lightning can clip the gradients' norm."""


SINGLE = Strategy("SingleDeviceStrategy", ("NO",))
DDP = Strategy("DDPStrategy", ("MULTI_GPU", "MULTI_CPU"))
FSDP = Strategy("FSDPStrategy", ("FSDP",), fsdp_version=1, needs_cuda=True, clips=False)
FSDP2 = Strategy(
    "ModelParallelStrategy", ("FSDP",), fsdp_version=2, precisions=("32-true", "bf16-mixed", "bf16-true", "16-true")
)
DEEPSPEED = Strategy("DeepSpeedStrategy", ("DEEPSPEED",), needs_cuda=True, package="deepspeed")
XLA = Strategy("XLAStrategy", ("XLA",), package="torch_xla")
STRATEGIES = (SINGLE, DDP, FSDP, FSDP2, DEEPSPEED, XLA)

# Lightning's short names, and the arguments that they stand for.
_DDP_STARTS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
_OFFLOAD = {"offload_optimizer": True, "offload_parameters": True}
_NVME = {"remote_device": "nvme", "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}
SHORT_NAMES: dict[str, tuple[Strategy, dict[str, Any]]] = {
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
    "xla": (XLA, {}),
    "xla_debug": (XLA, {"debug": True}),
    "single_xla": (XLA, {}),
    "single_tpu": (XLA, {}),
}


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


def _only_accelerate(section: str, defaults: dict[str, Any], instead: str, refused: bool = False) -> tuple[Row, ...]:
    return tuple(Row(None, section + name, default, instead, refused) for name, default in defaults.items())


def _only_lightning(defaults: dict[str, Any], instead: str) -> tuple[Row, ...]:
    return tuple(Row(f"trainer.{name}", None, default, instead) for name, default in defaults.items())


_ARGUMENT, _KEYWORD = "trainer.strategy.init_args.", "trainer.strategy.dict_kwargs."
_FSDP, _DEEPSPEED, _PARALLEL = "fsdp_config.fsdp_", "deepspeed_config.", "parallelism_config.parallelism_config_"
_ON_EVERY_NODE = "start fit on every node by torchrun or srun, with CUDA_VISIBLE_DEVICES for a choice of cards"
_COMPILE = "model.compile=true is torch.compile as it comes; give the argument to its call in nanogpt_lit/module.py"
_RECIPE = "give it to lightning.pytorch.plugins.TransformerEnginePrecision(recipe=...) under trainer.plugins"
_SEQUENCES = "leave it out: no sequence is split over processes here"
_LIGHTNING_ONLY = "only Lightning's Trainer has it: train with fit, or take it out"

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
    Row(None, "debug", False, "the nearest is TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment of fit"),
    Row(None, "enable_cpu_affinity", False, "start fit under numactl --cpunodebind=N --membind=N"),
    Row(None, "main_training_function", "main", "leave it out: fit is a command and names no function"),
    Row(None, "mpirun_config.mpirun_hostfile", None, "start fit under mpirun --hostfile {value}"),
    Row(None, "downcast_bf16", False, "set XLA_DOWNCAST_BF16=1 in the environment of fit"),
    *_only_accelerate(
        "",
        {"tpu_name": None, "tpu_zone": None, "tpu_vm": None, "tpu_env": None, "tpu_use_cluster": False,
         "tpu_use_sudo": False, "command_file": None, "commands": None},
        "start fit on every host of the pod yourself (gcloud compute tpus tpu-vm ssh --worker=all --command=...)",
    ),
    # torch.compile
    Row("model.compile", "dynamo_config.dynamo_backend", "NO", _COMPILE),
    *_only_accelerate(
        "dynamo_config.dynamo_",
        {"mode": "default", "use_fullgraph": False, "use_dynamic": False, "use_regional_compilation": False},
        _COMPILE,
    ),
    # FSDP
    Row("trainer.strategy", _FSDP + "version"),
    Row(_ARGUMENT + "sharding_strategy", _FSDP + "reshard_after_forward", True,
        "the module gives every block's weights back after its forward; change fully_shard in nanogpt_lit/module.py"),
    Row(_ARGUMENT + "sharding_strategy", _FSDP + "sharding_strategy"),
    Row(_ARGUMENT + "cpu_offload", _FSDP + "offload_params", False, "set fsdp_version: 1, whose strategy offloads"),
    Row(_ARGUMENT + "auto_wrap_policy", _FSDP + "auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
        "fit wraps block by block; choose TRANSFORMER_BASED_WRAP with Block"),
    Row(_ARGUMENT + "auto_wrap_policy", _FSDP + "transformer_layer_cls_to_wrap", "Block",
        "the network's layers are of class Block"),
    Row(None, _FSDP + "min_num_params", 100_000_000, "fit wraps block by block, of whatever size"),
    Row(None, _FSDP + "backward_prefetch", "BACKWARD_PRE", "Lightning keeps torch's BACKWARD_PRE"),
    Row(_KEYWORD + "forward_prefetch", _FSDP + "forward_prefetch", False, "leave it out: FSDP2 has no such switch"),
    Row(_KEYWORD + "use_orig_params", _FSDP + "use_orig_params", True, "leave it out: FSDP2 always keeps them"),
    Row(_KEYWORD + "sync_module_states", _FSDP + "sync_module_states", True, "leave it out: FSDP2 has no such switch"),
    Row(_ARGUMENT + "state_dict_type", _FSDP + "state_dict_type", None,
        "choose FULL_STATE_DICT or SHARDED_STATE_DICT"),
    Row(_ARGUMENT + "activation_checkpointing_policy", _FSDP + "activation_checkpointing", False,
        "FSDP2 leaves it to the module, which keeps its activations"),
    Row(None, _FSDP + "cpu_ram_efficient_loading", False, "leave it out: only transformers' from_pretrained reads it"),
    Row(None, _FSDP + "activation_checkpointing_offload", False, "leave it out: Lightning offloads no activations"),
    *_only_accelerate(
        _PARALLEL,
        {"dp_replicate_size": 1, "tp_size": 1, "cp_size": 1, "sp_size": 1},
        "this network is sharded over all processes alike, and in no other way; set it to 1",
        refused=True,
    ),
    Row(_ARGUMENT + "data_parallel_size", _PARALLEL + "dp_shard_size", 1),
    *_only_accelerate(
        _PARALLEL,
        {"cp_backend": "torch", "cp_comm_strategy": "allgather", "sp_backend": "deepspeed", "sp_seq_length": None,
         "sp_seq_length_is_variable": True, "sp_attn_implementation": "sdpa"},
        _SEQUENCES,
    ),
    # DeepSpeed
    Row(_ARGUMENT + "config", _DEEPSPEED + "deepspeed_config_file"),
    Row(_ARGUMENT + "stage", _DEEPSPEED + "zero_stage"),
    Row(_ARGUMENT + "offload_optimizer_device", _DEEPSPEED + "offload_optimizer_device"),
    Row(_ARGUMENT + "offload_params_device", _DEEPSPEED + "offload_param_device"),
    Row(_ARGUMENT + "nvme_path", _DEEPSPEED + "offload_optimizer_nvme_path"),
    Row(_ARGUMENT + "nvme_path", _DEEPSPEED + "offload_param_nvme_path"),
    Row("trainer.accumulate_grad_batches", _DEEPSPEED + "gradient_accumulation_steps", 1,
        f"Accelerator(gradient_accumulation_steps={{value}}); {OUR_SCRIPT} takes it from the YAML"),
    Row("trainer.gradient_clip_val", _DEEPSPEED + "gradient_clipping", None,
        f"accelerator.clip_grad_norm_(parameters, {{value}}); {OUR_SCRIPT} takes it from the YAML"),
    Row(None, _DEEPSPEED + "zero3_init_flag", False, "leave it out: fit builds the whole network before it is sharded"),
    Row(None, _DEEPSPEED + "zero3_save_16bit_model", False,
        "afterwards: lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"),
    *_only_accelerate(
        _DEEPSPEED,
        {"deepspeed_hostfile": None, "deepspeed_exclusion_filter": None, "deepspeed_inclusion_filter": None,
         "deepspeed_multinode_launcher": None},
        _ON_EVERY_NODE,
    ),
    Row(None, _DEEPSPEED + "deepspeed_moe_layer_cls_names", None, "this network has no experts", refused=True),
    # float8
    Row(None, "fp8_config.fp8_backend", "TE", "Lightning has Transformer Engine (TE) alone", refused=True),
    *_only_accelerate(
        "fp8_config.fp8_",
        {"use_autocast_during_eval": False, "margin": 0, "interval": 1, "format": "HYBRID", "amax_history_len": 1024,
         "amax_compute_algo": "most_recent", "override_linear_precision": [False, False, False]},
        _RECIPE,
    ),
    *_only_accelerate(
        "fp8_config.fp8_",
        {"opt_level": "O2", "enable_fsdp_float8_all_gather": True, "pad_inner_dim": True},
        "leave it out: MSAMP and AO read it, and Lightning has neither",
    ),
    *_only_accelerate(
        "megatron_lm_config.megatron_lm_",
        dict.fromkeys((
            "tp_degree", "pp_degree", "num_micro_batches", "gradient_clipping", "use_custom_fsdp", "no_load_optim",
            "no_save_optim", "eod_mask_loss", "overlap_cpu_optimizer_d2h_h2d", "optimizer_cpu_offload",
            "use_precision_aware_optimizer", "decoder_last_pipeline_num_layers", "sequence_parallelism",
            "recompute_activations", "recompute_granularity", "recompute_method", "recompute_num_layers",
            "use_distributed_optimizer", "attention_backend", "expert_model_parallel_size", "context_parallel_size",
            "attention_dropout", "hidden_dropout", "attention_softmax_in_fp32", "expert_tensor_parallel_size",
            "calculate_per_token_loss", "use_rotary_position_embeddings",
        )),
        "Lightning has no Megatron-LM",
        refused=True,
    ),
    # what only our YAML says, and what it is called in code under accelerate
    *_only_lightning(
        {"callbacks": None, "default_root_dir": None, "enable_checkpointing": None, "enable_progress_bar": None,
         "limit_val_batches": None, "log_every_n_steps": None, "max_steps": -1, "max_time": None,
         "val_check_interval": None},
        f"{OUR_SCRIPT} takes it from the YAML",
    ),
    *_only_lightning(
        dict.fromkeys(("barebones", "enable_model_summary", "num_sanity_val_steps", "use_distributed_sampler")),
        "without effect under accelerate",
    ),
    Row("trainer.gradient_clip_algorithm", None, None, "accelerator.clip_grad_value_(parameters, ...) clips by value"),
    Row("trainer.benchmark", None, None, "torch.backends.cudnn.benchmark = {value}"),
    Row("trainer.deterministic", None, None, "accelerate.utils.set_seed(..., deterministic=True)"),
    Row("trainer.detect_anomaly", None, False, "torch.autograd.set_detect_anomaly(True)"),
    Row("trainer.logger", None, None, "Accelerator(log_with=...)"),
    Row("trainer.plugins", None, None, "Accelerator(kwargs_handlers=[...]), where there is one of the kind"),
    Row("trainer.profiler", None, None, "Accelerator(kwargs_handlers=[ProfileKwargs(...)])"),
    Row("trainer.sync_batchnorm", None, False, "without effect: this network has no batch norm"),
    *_only_lightning(
        {"check_val_every_n_epoch": None, "enable_autolog_hparams": True, "fast_dev_run": False, "inference_mode": True,
         "limit_predict_batches": None, "limit_test_batches": None, "limit_train_batches": None, "max_epochs": None,
         "min_epochs": None, "min_steps": None, "model_registry": None, "overfit_batches": 0.0,
         "reload_dataloaders_every_n_epochs": 0},
        _LIGHTNING_ONLY,
    ),
)  # fmt: skip
ROW_OF = {row.accelerate: row for row in TABLE if row.accelerate is not None}
