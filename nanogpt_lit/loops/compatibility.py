"""Which settings do not go together, and the sentence for each: one table for every loop and command.

Imports neither torch nor a framework, so that a file can be translated, or a mistake named, at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.precision import IN_ACCELERATE, PRECISIONS

DDP, FSDP, FSDP2 = "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"
SINGLE, DEEPSPEED = "SingleDeviceStrategy", "DeepSpeedStrategy"
ON_HOST = ("host", "streamed")
DEEPSPEED_PRECISIONS = ("32-true", "bf16-mixed")
FSDP2_PRECISIONS = tuple(name for name, row in PRECISIONS.items() if not row.scales)
OF_WHOLE_TENSORS = ("Adafactor", "LBFGS", "Muon", "SparseAdam")
"""Optimizers of torch.optim that do not go number by number."""


@dataclass(frozen=True)
class Clash:
    when: Mapping[str, tuple[Any, ...] | Callable[[Any], bool]]
    """Keys of the YAML, each with its values that clash or with a test of them. All must hold. trainer.strategy is the
    class's name, trainer.accelerator the device that it comes to, trainer.devices the number of processes."""
    why: str
    works: str
    """Settings that work instead."""

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether the settings clash. One that is not among them clashes with nothing."""
        return all(
            key in settings and (values(settings[key]) if callable(values) else settings[key] in values)
            for key, values in self.when.items()
        )

    def sentence(self, settings: Mapping[str, Any]) -> str:
        first, *others = (f"{key}={_yaml(settings[key])}" for key in self.when)
        beside = f" does not go with {' and '.join(others)}:" if others else ""
        return f"{first}{beside} {self.why}; set {self.works}."


CLASHES = (
    # memory and optimizer
    *(
        Clash(
            {"model.optim.state_bits": (8,), f"model.memory.{name}": ON_HOST},
            "8-bit moments stay on the GPU",
            f"model.memory.{name}=device, or model.optim.state_bits=32",
        )
        for name in ("optimizer_state", "weights")
    ),
    *(
        Clash(
            {"model.optim.class_path": lambda path: path is not None, f"model.memory.{name}": ON_HOST},
            "only AdamW and Muon keep their state in host memory",
            f"model.memory.{name}=device, or model.optim.class_path=null",
        )
        for name in ("optimizer_state", "weights")
    ),
    Clash(
        {"model.optim.class_path": (None,), "trainer.strategy.offload_optimizer": (True,)},
        "DeepSpeed offloads only its own DeepSpeedCPUAdam",
        "model.optim.class_path=deepspeed.ops.adam.DeepSpeedCPUAdam with --trust deepspeed, or leave the offload out",
    ),
    Clash(
        {"model.compile": (True,), "model.memory.weights": ON_HOST},
        "compiled code cannot follow weights that come and go",
        "model.compile=false",
    ),
    Clash(
        {"model.memory.weights": ON_HOST, "trainer.accelerator": ("cuda",), "trainer.devices": lambda n: (n or 1) > 1},
        "DDP exchanges gradients between GPUs, and these are in host memory",
        "trainer.devices=1, or model.memory.weights=device",
    ),
    # teachers
    Clash(
        {"teachers": bool, "model.memory.weights": ON_HOST},
        "their loss looks for the head on the device",
        "model.memory.weights=device",
    ),
    Clash(
        {"teachers": bool, "trainer.strategy": (FSDP, FSDP2, DEEPSPEED)},
        "the strategy shards the network, and they are not sharded with it",
        "trainer.strategy=auto or ddp",
    ),
    # strategies
    Clash(
        {"trainer.strategy": (FSDP,), "trainer.accelerator": lambda device: device not in ("cuda", "gpu")},
        "it runs on CUDA GPUs only",
        f"trainer.strategy=ddp or {FSDP2}, which run on CPUs too",
    ),
    Clash(
        {"trainer.gradient_clip_val": bool, "trainer.strategy": (FSDP,)},
        "Lightning cannot clip the norm of its shards",
        f"trainer.gradient_clip_val=null, or trainer.strategy={FSDP2}",
    ),
    Clash(
        {"trainer.precision": lambda name: name not in FSDP2_PRECISIONS, "trainer.strategy": (FSDP2,)},
        f"it has no gradient scaler, and takes {', '.join(FSDP2_PRECISIONS)}",
        "trainer.precision=bf16-mixed, or trainer.strategy=ddp",
    ),
    Clash(
        {"trainer.strategy.tensor_parallel_size": lambda size: size not in (1, "auto")},
        "would divide single matrices, which this network does not",
        "tensor_parallel_size=1, and data_parallel_size to the number of processes",
    ),
    Clash(
        {"trainer.precision": lambda name: name not in DEEPSPEED_PRECISIONS, "trainer.strategy": (DEEPSPEED,)},
        "DeepSpeed would cast all weights to 16 bits",
        "trainer.precision=bf16-mixed, which keeps them in float32, or trainer.strategy=ddp",
    ),
    Clash(
        {"trainer.strategy.stage": lambda stage: stage not in (1, 2, 3)},
        "shares nothing out over the processes",
        "stage=1, 2 or 3, or trainer.strategy=ddp",
    ),
    Clash(
        {"model.compile": (True,), "trainer.strategy.stage": (3,)},
        "compiled code cannot follow weights that come and go",
        "model.compile=false, or a stage of 1 or 2",
    ),
    Clash(
        {
            "model.optim.class_path": lambda path: str(path).rpartition(".")[2] in OF_WHOLE_TENSORS,
            "trainer.strategy": (DEEPSPEED,),
        },
        "it needs whole tensors, and DeepSpeed hands it a line of numbers",
        f"model.optim.class_path=null, or trainer.strategy={FSDP2}",
    ),
    *(
        Clash(
            {key: values, "trainer.strategy": (FSDP2, DEEPSPEED)},
            "it needs whole tensors, and the strategy shards them over the processes",
            f"{key}={works}, or trainer.strategy=ddp",
        )
        for key, values, works in (
            ("model.memory.optimizer_state", ON_HOST, "device"),
            ("model.memory.weights", ON_HOST, "device"),
            ("model.optim.state_bits", (8,), "32"),
            ("model.optim.matrices", ("muon",), "adamw"),
        )
    ),
    Clash(
        {"trainer.strategy.start_method": lambda method: method != "popen"},
        "trains in copies of this process, which hand back no checkpoints and no curves",
        "trainer.strategy=ddp, whose start_method is popen",
    ),
    Clash(
        {"early_stopping_patience": lambda patience: patience is not None, "trainer.limit_val_batches": (0,)},
        "it counts validations, and the run makes none",
        "early_stopping_patience=null",
    ),
    # going back to a checkpoint
    *(
        Clash(
            {"spike_factor": lambda factor: factor is not None, key: values},
            "it goes back to a checkpoint of one file, and this run writes none",
            works,
        )
        for key, values, works in (
            ("trainer.enable_checkpointing", (False,), "trainer.enable_checkpointing=true"),
            ("trainer.strategy", lambda name: name not in (SINGLE, DDP), "trainer.strategy=auto or ddp"),
        )
    ),
)


def check_together(settings: Mapping[str, Any]) -> None:
    """Check settings, named as in the YAML: `model.compile`. Raises UserError for the first clash among them."""
    for clash in CLASHES:
        if clash.holds(settings):
            raise UserError(clash.sentence(settings))


def keys_of(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by their keys in the YAML: {"model.memory.weights": "host", ...}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= keys_of(f"{section}.{name}", value) if isinstance(value, Mapping) else {f"{section}.{name}": value}
    return flat


def check_saves_whole_steps(trainer: Mapping[str, Any]) -> None:
    """Raises UserError when checkpoints, which are made at validations, would be made inside a step.

    Gradients are in no checkpoint: one of half a step would go on to other weights than the run it was made in.
    """
    interval, accumulate = trainer["val_check_interval"], trainer["accumulate_grad_batches"]
    if trainer["enable_checkpointing"] is False or trainer["limit_val_batches"] == 0 or not isinstance(interval, int):
        return
    below = interval // accumulate * accumulate
    if interval != below:
        works = " or ".join(str(n) for n in (below, below + accumulate) if n)
        raise UserError(
            f"trainer.val_check_interval={interval} would save a checkpoint inside a step of "
            f"trainer.accumulate_grad_batches={accumulate} micro-batches; {works} works."
        )


LOGGER_PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml"}


def check_loggers(trainer: Mapping[str, Any]) -> None:
    """Check that loggers' packages are there, or raise UserError; they would say so once the data is made."""
    for logger in trainer["logger"] if isinstance(trainer["logger"], list) else [trainer["logger"]]:
        name = str(logger.get("class_path")).rpartition(".")[2] if hasattr(logger, "get") else ""
        package = LOGGER_PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            package = package.replace("_", "-")
            raise UserError(f"trainer.logger={name} needs the package {package}: pip install {package}")


# Keys of the trainer section under raw accelerate.
FOLLOWED = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "max_steps", "accumulate_grad_batches",
    "gradient_clip_val", "val_check_interval", "limit_val_batches", "log_every_n_steps", "default_root_dir",
    "enable_progress_bar", "enable_checkpointing", "callbacks", "max_time", "deterministic",
}  # fmt: skip
WITHOUT_EFFECT = {"enable_model_summary", "num_sanity_val_steps", "use_distributed_sampler", "barebones"}
TEXT_SAMPLES = "TextSamples"
"""The one callback that the accelerate loop has too."""


def check_followed(trainer: Mapping[str, Any], precision: str, defaults: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that only Lightning's Trainer follows: the accelerate loop would ignore it.

    precision: the section's, written out
    """
    fit = "take it out, or train with `python -m nanogpt_lit fit`"
    foreign = [c["class_path"] for c in trainer["callbacks"] or [] if not c["class_path"].endswith(TEXT_SAMPLES)]
    if foreign:
        raise UserError(f"trainer.callbacks holds {foreign[0]}, and only Lightning's Trainer calls it; {fit}.")
    for key, value in trainer.items():
        if key not in FOLLOWED | WITHOUT_EFFECT and value != defaults.get(key):
            raise UserError(f"trainer.{key} is set, and only Lightning's Trainer follows it; {fit}.")
    strategy = trainer["strategy"] if isinstance(trainer["strategy"], str) else str(trainer["strategy"].class_path)
    name = strategy.rpartition(".")[2]
    if strategy not in ("auto", "ddp") and name not in (FSDP2, DEEPSPEED) and not name.startswith("deepspeed"):
        raise UserError(f"trainer.strategy={strategy} does not run here; auto, ddp, {FSDP2} and deepspeed_stage_2 do.")
    if precision not in IN_ACCELERATE:
        raise UserError(f"trainer.precision={precision} does not run here; {', '.join(IN_ACCELERATE)} do.")
    interval = trainer["val_check_interval"]
    if interval is not None and not isinstance(interval, int):
        raise UserError(
            f"trainer.val_check_interval={interval} should be an integer: micro-batches between validations."
        )


def _yaml(value: Any) -> Any:
    return {True: "true", False: "false", None: "null"}.get(value, value) if isinstance(value, bool | None) else value
