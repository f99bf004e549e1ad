"""What `accelerate config`, `accelerate launch` and torchrun ask for, held against the YAML.

They speak through environment variables, some of which win over the arguments of Accelerator and some of which lose,
without a word either way. Here a contradiction is an error that names both sides.
"""

from collections.abc import Mapping

from nanogpt_lit.loops.accelerate_loop import MIXED_PRECISION

PRECISION_OF = {theirs: ours for ours, theirs in MIXED_PRECISION.items()}


def check_environment(
    precision: str, accumulate_grad_batches: int, device: str, environ: Mapping[str, str]
) -> str | None:
    """Raises ValueError where the environment contradicts the YAML; a sentence where it yields to it.

    precision: of the YAML, before any fallback   device: that will be used
    """
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if is_true(environ.get(variable)):
            raise ValueError(
                f"accelerate's environment asks for {variable}={environ[variable]}, and this loop runs one device or "
                "DDP; run `accelerate config` again for distributed_type: NO or MULTI_GPU."
            )
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(
            f"accelerate's environment asks for ACCELERATE_DYNAMO_BACKEND={backend}, and the YAML decides that by "
            "model.compile; answer no to dynamo in `accelerate config` and set model.compile=true."
        )
    if is_true(environ.get("ACCELERATE_USE_CPU")) and device != "cpu":
        raise ValueError(
            f"accelerate's environment asks for ACCELERATE_USE_CPU={environ['ACCELERATE_USE_CPU']}, and "
            f"trainer.accelerator comes to {device}; set trainer.accelerator=cpu, or leave --cpu out."
        )
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if steps is not None and steps != str(accumulate_grad_batches):
        raise ValueError(
            f"accelerate's environment asks for ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}, and the YAML for "
            f"trainer.accumulate_grad_batches={accumulate_grad_batches}; set one to the other."
        )
    theirs = environ.get("ACCELERATE_MIXED_PRECISION")
    ours = MIXED_PRECISION.get(precision)
    if theirs is None or theirs == ours:
        return None
    if theirs == "no":  # also what accelerate launch says when nobody was asked
        return (
            f"precision: accelerate's environment says no mixed precision, the YAML says {precision}: {precision} it is"
        )
    raise ValueError(
        f"accelerate's environment asks for ACCELERATE_MIXED_PRECISION={theirs}, and the YAML for "
        f"trainer.precision={precision}; set trainer.precision={PRECISION_OF.get(theirs, '16-mixed')}, or "
        f"`accelerate launch --mixed_precision {ours or 'no'}`."
    )


def launched_processes(environ: Mapping[str, str]) -> int:
    """As many as accelerate launch or torchrun say that they started."""
    return int(environ.get("WORLD_SIZE", "1"))


def check_processes(asked: int | None, launched: int, running: int) -> None:
    """Raises ValueError when accelerate runs another number of processes than the YAML or the launcher asks for.

    asked: trainer.devices times trainer.num_nodes, None when the YAML leaves it open
    `accelerate launch --cpu --num_processes 2` starts one process, and says nothing.
    """
    if launched != running:
        raise ValueError(
            f"the launcher asks for WORLD_SIZE={launched} processes, and accelerate runs {running}: each would train "
            "alone; on processors set trainer.accelerator=cpu."
        )
    if asked is not None and asked != running:
        raise ValueError(
            f"trainer.devices and trainer.num_nodes ask for {asked} processes, and accelerate runs {running}; start it "
            f"with `accelerate launch --multi_gpu --num_processes {asked}`, on processors with `torchrun "
            f"--nproc_per_node {asked}` (accelerate launch --cpu starts only one), or set trainer.devices={running}."
        )


def is_true(value: str | None) -> bool:
    return value is not None and value.lower() in ("1", "true", "yes", "on", "y", "t")
