"""A network shared out over the processes: by FSDP2, and by DeepSpeed's ZeRO as a loop has it.

DeepSpeed's engine adds up, clips and steps in one call, in which observers are told.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanogpt_lit.checkpoint.sharded_network import ZeroOptimizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import FSDP2, check_together, keys_of
from nanogpt_lit.runtime.precision import PRECISIONS, dtype_of


def shard_over_all(module: Any, device: str, processes: int) -> None:
    """Shard a LitNanoGPT as Lightning's ModelParallelStrategy has it done, for a loop without one.

    device: "cuda" or "cpu"   processes: all that there are, joined in a group
    """
    from torch.distributed.device_mesh import init_device_mesh

    shard(module, init_device_mesh(device, (processes, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))


def shard(module: Any, mesh: Any) -> None:
    """Shard a LitNanoGPT over the processes of a device mesh, by FSDP2.

    Each process keeps its share of every weight, gradient and optimizer state; a block is whole only while it computes.
    Raises UserError for a mesh that divides single matrices.
    """
    # Late: not every build of torch has torch.distributed.
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    gpt = module.gpt
    if isinstance(gpt, FSDPModule):
        return  # Lightning asks before every fit, validate and test
    sizes = {"trainer.strategy.tensor_parallel_size": mesh["tensor_parallel"].size()}
    check_together({**keys_of("model", module.hparams), "trainer.strategy": FSDP2, **sizes})
    for block in gpt.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    # What is outside of the blocks stays whole from forward to backward, also where another module is the outermost.
    fully_shard(gpt, mesh=mesh["data_parallel"], reshard_after_forward=False)
    # What is called in place of forward. Not `hidden`, which they call: whole for it, the weights would be given back
    # at the end of `loss`, and gathered once more for backward.
    for method in ("loss", "next_logits"):
        register_fsdp_forward_method(gpt, method)
    module.loss = torch.compile(gpt.loss) if module.hparams["compile"] else gpt.loss


# DeepSpeed.


class ZeroStep(ZeroOptimizer):
    """An optimizer that DeepSpeed's engine steps. To be made before `deepspeed.initialize`.

    precision: 32-true, or bf16-mixed, which is autocast as everywhere; DeepSpeed's own bf16 casts the weights
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, precision: str, device: torch.device) -> None:
        super().__init__(module, optimizer)
        if (dtype := dtype_of(PRECISIONS[precision].autocast)) is not None:
            # Inside of the engine, which on a GPU turns off any autocast around it.
            module.forward = torch.autocast(device.type, dtype, cache_enabled=False)(module.forward)
        optimizer.register_step_pre_hook(self._before_step)
        self.listeners: Sequence[Callable[[Tensor], None]] = ()
        """Called with the norm before the step."""
        self._is_told = False

    def connect(self, engine: Any) -> None:
        super().connect(engine)
        self._engine = engine

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called by each group's step, and not where DeepSpeed leaves out a step whose norm is not finite."""
        if not self._is_told:
            self._tell(self._engine.optimizer._global_grad_norm)

    def _tell(self, norm: Any) -> None:
        self._is_told = True
        self.grad_norm = torch.as_tensor(norm, dtype=torch.float32)
        for tell in self.listeners:
            tell(self.grad_norm)

    def stepped(self) -> Tensor:
        """Called after each step of the engine. Returns the norm of the gradients before clipping."""
        if not self._is_told:
            self._tell(self._engine.get_global_grad_norm())
        self._is_told = False
        return self.grad_norm


def compute_on(device: str) -> None:
    """Have DeepSpeed compute on "cuda" or "cpu". To be called before it is imported, when it looks for a GPU itself."""
    os.environ["DS_ACCELERATOR"] = device
    if device == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}  # it would compile sums over processes that only inference has


OF_THE_YAML = {
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches", "gradient_clipping": "trainer.gradient_clip_val",
    "optimizer": "model.optim", "scheduler": "model.schedule", "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    **dict.fromkeys(("fp16", "bf16", "torch_autocast", "amp"), "trainer.precision"),
}  # fmt: skip
"""Keys of a DeepSpeed configuration, and those of the YAML that decide."""


def zero_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration of DeepSpeed that a strategy names, completed. Raises UserError for one that says more."""
    config = dict(config or {})
    for key, ours in OF_THE_YAML.items():
        if key in config:
            raise UserError(f"trainer.strategy.config has {key}, which {ours} says; take it out there.")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"trainer.strategy.stage={stage} shares nothing out; set 1, 2 or 3, or trainer.strategy=ddp.")
    # Lightning and accelerate would take their own words for them.
    return {**config, "bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": 1}
