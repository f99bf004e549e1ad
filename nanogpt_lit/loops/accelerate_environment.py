"""Checks of what `accelerate launch`, torchrun and mpirun ask for against the YAML.

They speak through environment variables, some of which win over the arguments of Accelerator and some of which lose,
without a word either way. Here a contradiction is an error that names both sides.
"""

from collections.abc import Callable, Mapping
from functools import partial
from operator import ne
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import FSDP2
from nanogpt_lit.runtime.launch import whole_number
from nanogpt_lit.runtime.precision import IN_ACCELERATE, OF_ACCELERATE

NO_OTHER_ENGINE = (
    "this loop runs one device, DDP, FSDP2 or DeepSpeed; run `accelerate config` again for distributed_type: NO, "
    "MULTI_GPU, FSDP or DEEPSPEED"
)
UNLIKE_FSDP2 = f"trainer.strategy={FSDP2} does not; `python -m nanogpt_lit accelerate-config` writes what it does"
HEARD = {
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
}  # fmt: skip
"""Variables that are heard besides those that are held against the YAML; none but the first changes a number."""
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of torchrun and of three kinds of mpirun."""
YES = ("1", "true", "yes", "on", "y", "t")


def check_environment(
    precision: str,
    accumulate_grad_batches: int,
    device: str,
    environ: Mapping[str, str],
    shards: bool = False,
    zero: Mapping[str, Any] | None = None,
) -> str | None:
    """Check the environment against the YAML: UserError where they contradict, a sentence where it yields.

    precision: of the YAML, before any fallback   device: that will be used   shards: whether by FSDP2
    zero: arguments of DeepSpeedStrategy, and gradient_clip_val; None for another strategy
    """

    def says_yes(value: str) -> bool:
        return value.lower() in YES

    # Variable: whether its value contradicts the YAML, and how the two come together.
    contradictions = {
        **{
            f"ACCELERATE_USE_{engine}": (says_yes, NO_OTHER_ENGINE)
            for engine in ("MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
        },
        "ACCELERATE_USE_DEEPSPEED": (
            lambda value: says_yes(value) and zero is None,
            "the YAML for another strategy; set trainer.strategy=deepspeed_stage_2, or run `accelerate config` again",
        ),
        **(_of_deepspeed(zero or {}) if says_yes(environ.get("ACCELERATE_USE_DEEPSPEED", "")) else {}),
        "ACCELERATE_USE_FSDP": (
            lambda value: says_yes(value) and not shards,
            f"the YAML for another strategy; set trainer.strategy={FSDP2}, or run `accelerate config` again",
        ),
        **(
            {
                "FSDP_VERSION": (lambda value: value != "2", UNLIKE_FSDP2),
                "FSDP_RESHARD_AFTER_FORWARD": (lambda value: not says_yes(value), UNLIKE_FSDP2),
                "FSDP_OFFLOAD_PARAMS": (says_yes, UNLIKE_FSDP2),
                "FSDP_ACTIVATION_CHECKPOINTING": (
                    says_yes,
                    "model.memory.recompute decides that; answer no, and set model.memory.recompute=full",
                ),
            }
            if says_yes(environ.get("ACCELERATE_USE_FSDP", ""))
            else {}
        ),
        "ACCELERATE_TORCH_DEVICE": (
            lambda value: value and value.partition(":")[0] != device,
            f"trainer.accelerator comes to {device}; unset the variable, or set trainer.accelerator",
        ),
        "ACCELERATE_DYNAMO_BACKEND": (
            lambda value: value.lower() != "no",
            "model.compile decides that; answer no to dynamo in `accelerate config` and set model.compile=true",
        ),
        "ACCELERATE_USE_CPU": (
            lambda value: says_yes(value) and device != "cpu",
            f"trainer.accelerator comes to {device}; set trainer.accelerator=cpu, or leave --cpu out",
        ),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            lambda value: value != str(accumulate_grad_batches),
            f"the YAML for trainer.accumulate_grad_batches={accumulate_grad_batches}; set one to the other",
        ),
    }
    for variable, (contradicts, works) in contradictions.items():
        if variable in environ and contradicts(environ[variable]):
            raise UserError(f"accelerate's environment asks for {variable}={environ[variable]}, and {works}.")
    unheard = [
        f"{name}={value}"
        for name, value in sorted(environ.items())
        # accelerate launch says how to compile also where it says not to.
        if name.startswith("ACCELERATE_") and not name.startswith("ACCELERATE_DYNAMO_")
        if name not in HEARD and name not in contradictions
    ]
    remarks = [_precision_remark(precision, environ.get("ACCELERATE_MIXED_PRECISION"))]
    if unheard:
        remarks.append(f"accelerate's environment also says {', '.join(unheard)}: this loop does not follow that")
    return "\n".join(remark for remark in remarks if remark) or None


def _of_deepspeed(zero: Mapping[str, Any]) -> dict[str, tuple[Callable[[str], bool], str]]:
    """Variables of accelerate launch beside DeepSpeed: a test for what contradicts the YAML, and what works."""
    expected = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("stage", zero.get("stage", 2)),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("config", zero.get("config")),
        **{
            f"ACCELERATE_DEEPSPEED_OFFLOAD_{theirs}_DEVICE": (
                ours,
                zero.get(f"offload_{kind}_device", "cpu") if zero.get(ours) else "none",
            )
            for theirs, ours, kind in (
                ("OPTIMIZER", "offload_optimizer", "optimizer"),
                ("PARAM", "offload_parameters", "params"),
            )
        },
    }
    clip = zero.get("gradient_clip_val") or 0.0
    contradictions: dict[str, tuple[Callable[[str], bool], str]] = {
        variable: (
            partial(ne, str(value)),
            f"the YAML for trainer.strategy.{key}={value}; set one to the other",
        )
        for variable, (key, value) in expected.items()
    }
    contradictions["ACCELERATE_GRADIENT_CLIPPING"] = (
        lambda value: value != "auto" and float(value) != clip,
        f"the YAML for trainer.gradient_clip_val={clip}; set one to the other",
    )
    return contradictions


def _precision_remark(precision: str, theirs: str | None) -> str | None:
    ours = IN_ACCELERATE.get(precision)
    if theirs is None or theirs == ours:
        return None
    if theirs == "no":  # also what accelerate launch says when nobody was asked
        return f"precision: accelerate's environment says no mixed precision; the YAML's {precision} is used"
    works = f"set trainer.precision={OF_ACCELERATE[theirs]}, or " if theirs in OF_ACCELERATE else ""
    raise UserError(
        f"accelerate's environment asks for ACCELERATE_MIXED_PRECISION={theirs}, and the YAML for "
        f"trainer.precision={precision}; {works}`accelerate launch --mixed_precision {ours or 'no'}`."
    )


def launched_processes(environ: Mapping[str, str]) -> int:
    """The number of processes that a launcher says it started. Raises UserError where that is no number."""
    name = next((name for name in PROCESSES if name in environ), None)
    return 1 if name is None else whole_number(name, environ, least=1) or 1


def check_processes(asked: int | None, launched: int) -> None:
    """Raises UserError when the launcher has started another number of processes than the YAML asks for.

    To be called before any process waits for another: one that is refused is gone before the others have met it.
    asked: trainer.devices times trainer.num_nodes, None when the YAML leaves it open
    """
    if asked is not None and asked != launched:
        raise UserError(
            f"trainer.devices and trainer.num_nodes ask for {asked} processes, and accelerate runs {launched}; start "
            f"it with `accelerate launch --multi_gpu --num_processes {asked}`, on CPUs with `torchrun "
            f"--nproc_per_node {asked}` (accelerate launch --cpu starts only one), or set trainer.devices={launched}."
        )


def check_sharding(launched: int) -> None:
    """Raises UserError where a process is alone: accelerate forms no group of one, and would shard nothing."""
    if launched == 1:
        raise UserError(
            "trainer.strategy shares the network out over several processes, and accelerate runs 1; start two with "
            "`torchrun --nproc_per_node 2` and trainer.devices=2, or set trainer.strategy=auto."
        )


def check_running(launched: int, running: int) -> None:
    """Raises UserError when accelerate runs another number of processes than the launcher says that it started.

    `accelerate launch --cpu --num_processes 2` starts one process, and says nothing.
    """
    if launched != running:
        raise UserError(
            f"the launcher asks for WORLD_SIZE={launched} processes, and accelerate runs {running}: each would train "
            "alone; on CPUs set trainer.accelerator=cpu."
        )
