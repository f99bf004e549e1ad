"""What `accelerate config`, `accelerate launch` and torchrun ask for, held against the YAML.

They speak through environment variables, some of which win over the arguments of Accelerator and some of which lose,
without a word either way. Here a contradiction is an error that names both sides.
"""

from collections.abc import Mapping

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.environment import whole_number
from nanogpt_lit.runtime.precision import IN_ACCELERATE, OF_ACCELERATE

ENGINES = (
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_SAGEMAKER",
)  # fmt: skip
NARROWER_FLOATS = ("ACCELERATE_DOWNCAST_BF16", "XLA_DOWNCAST_BF16", "XLA_USE_BF16")
"""On a TPU they make float32 mean bfloat16."""
HEARD = {
    *ENGINES, *NARROWER_FLOATS, "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY",  # these change no number
}  # fmt: skip
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Of torchrun and of three kinds of mpirun."""


def check_environment(
    precision: str, accumulate_grad_batches: int, device: str, environ: Mapping[str, str]
) -> str | None:
    """Raises UserError where the environment contradicts the YAML; a sentence where it yields to it.

    precision: of the YAML, before any fallback   device: that will be used
    """
    for variable in ENGINES:
        if is_true(environ.get(variable)):
            raise UserError(
                f"accelerate's environment asks for {variable}={environ[variable]}, and this loop runs one device or "
                "DDP; run `accelerate config` again for distributed_type: NO or MULTI_GPU."
            )
    for variable in NARROWER_FLOATS:
        if environ.get(variable, "0") not in ("", "0"):  # accelerate takes "no" for a yes here
            raise UserError(
                f"accelerate's environment asks for {variable}={environ[variable]}, and trainer.precision decides how "
                "wide numbers are; take downcast_bf16 out of accelerate's file, or unset the variable."
            )
    chosen = environ.get("ACCELERATE_TORCH_DEVICE", "")
    if chosen and chosen.partition(":")[0] != device:
        raise UserError(
            f"accelerate's environment asks for ACCELERATE_TORCH_DEVICE={chosen}, and trainer.accelerator comes to "
            f"{device}; unset the variable, or set trainer.accelerator."
        )
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(
            f"accelerate's environment asks for ACCELERATE_DYNAMO_BACKEND={backend}, and the YAML decides that by "
            "model.compile; answer no to dynamo in `accelerate config` and set model.compile=true."
        )
    if is_true(environ.get("ACCELERATE_USE_CPU")) and device != "cpu":
        raise UserError(
            f"accelerate's environment asks for ACCELERATE_USE_CPU={environ['ACCELERATE_USE_CPU']}, and "
            f"trainer.accelerator comes to {device}; set trainer.accelerator=cpu, or leave --cpu out."
        )
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if steps is not None and steps != str(accumulate_grad_batches):
        raise UserError(
            f"accelerate's environment asks for ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}, and the YAML for "
            f"trainer.accumulate_grad_batches={accumulate_grad_batches}; set one to the other."
        )
    remarks = [_precision_remark(precision, environ.get("ACCELERATE_MIXED_PRECISION")), _unheard(environ)]
    return "\n".join(remark for remark in remarks if remark) or None


def _precision_remark(precision: str, theirs: str | None) -> str | None:
    ours = IN_ACCELERATE.get(precision)
    if theirs is None or theirs == ours:
        return None
    if theirs == "no":  # also what accelerate launch says when nobody was asked
        return (
            f"precision: accelerate's environment says no mixed precision, the YAML says {precision}: {precision} it is"
        )
    works = f"set trainer.precision={OF_ACCELERATE[theirs]}, or " if theirs in OF_ACCELERATE else ""
    raise UserError(
        f"accelerate's environment asks for ACCELERATE_MIXED_PRECISION={theirs}, and the YAML for "
        f"trainer.precision={precision}; {works}`accelerate launch --mixed_precision {ours or 'no'}`."
    )


def _unheard(environ: Mapping[str, str]) -> str | None:
    """What else accelerate's file or a shell asks for: shown, so that nobody believes that it is obeyed."""
    asked = [
        f"{name}={value}"
        for name, value in sorted(environ.items())
        # accelerate launch says how to compile also where it says not to.
        if name.startswith("ACCELERATE_") and name not in HEARD and not name.startswith("ACCELERATE_DYNAMO_")
    ]
    return f"accelerate's environment also says {', '.join(asked)}: this loop does not follow that" if asked else None


def launched_processes(environ: Mapping[str, str]) -> int:
    """As many as accelerate launch, torchrun or mpirun say that they started. Raises UserError for no number."""
    name = next((name for name in PROCESSES if name in environ), None)
    if name is None:
        return 1
    return whole_number(name, environ, least=1) or 1


def check_processes(asked: int | None, launched: int) -> None:
    """Raises UserError when the launcher has started another number of processes than the YAML asks for.

    To be called before any process waits for another: one that is refused is gone before the others have met it.
    asked: trainer.devices times trainer.num_nodes, None when the YAML leaves it open
    """
    if asked is not None and asked != launched:
        raise UserError(
            f"trainer.devices and trainer.num_nodes ask for {asked} processes, and accelerate runs {launched}; start "
            f"it with `accelerate launch --multi_gpu --num_processes {asked}`, on processors with `torchrun "
            f"--nproc_per_node {asked}` (accelerate launch --cpu starts only one), or set trainer.devices={launched}."
        )


def check_running(launched: int, running: int) -> None:
    """Raises UserError when accelerate runs another number of processes than the launcher says that it started.

    `accelerate launch --cpu --num_processes 2` starts one process, and says nothing.
    """
    if launched != running:
        raise UserError(
            f"the launcher asks for WORLD_SIZE={launched} processes, and accelerate runs {running}: each would train "
            "alone; on processors set trainer.accelerator=cpu."
        )


def is_true(value: str | None) -> bool:
    return value is not None and value.lower() in ("1", "true", "yes", "on", "y", "t")
