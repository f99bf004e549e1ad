"""Lightning's strategies that share a network out over the processes, with the checkpoints of every loop.

By themselves they would gather the network on the first process, or write a folder of pickles that no other strategy
reads. Here each process writes and reads its own part, through a CheckpointIO that all of them call together.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from nanogpt_lit.checkpoint.lightning_format import to_lightning
from nanogpt_lit.checkpoint.sharded_network import load_into, unread_run
from nanogpt_lit.loops.compatibility import FSDP2
from nanogpt_lit.loops.lightning import MeasuredClipping
from nanogpt_lit.loops.sharded import ZeroStep, zero_config
from nanogpt_lit.run.resume import check_network


class InRunFiles(Strategy):
    """The part of a strategy that has checkpoints in the format of every loop."""

    def own_optimizer(self) -> Any:
        """The optimizer with the network's own parameters; None for validate and test."""
        optimizer = self.optimizers[0] if self.optimizers else None
        return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self.own_optimizer().state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath), storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        run = unread_run(Path(checkpoint_path))
        check_network(module, run)
        load_into(run, module, self.own_optimizer())
        return to_lightning(run)


class ShardedStrategy(InRunFiles, ModelParallelStrategy):
    """FSDP2 as Lightning drives it, but for checkpoints."""


class ZeroStrategy(InRunFiles, DeepSpeedStrategy):
    """DeepSpeed's ZeRO as Lightning drives it, but for checkpoints, and on CPUs too."""

    zero: ZeroStep | None = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.config = zero_config(self.config)

    def own_optimizer(self) -> ZeroStep | None:
        return self.zero

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeedStrategy hands its number on

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's asks for CUDA GPUs

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            DDPStrategy.setup_distributed(self)  # DeepSpeedStrategy's looks at the GPUs' numbers

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        self.zero = ZeroStep(model, optimizer, self.precision_plugin.precision, self.root_device)
        both = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        self.zero.connect(both[0])
        return both


class ZeroPrecision(DeepSpeedPrecision, MeasuredClipping):
    """Precision plugin of ZeroStrategy, whose engine clips and steps."""

    def backward(self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        # Lightning 2.6 divides the loss by accumulate_grad_batches, and DeepSpeed would once more.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, model: LightningModule, closure: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        strategy = model.trainer.strategy
        assert isinstance(strategy, ZeroStrategy)
        assert strategy.zero is not None
        strategy.zero.listeners = self.listeners
        ends_step = strategy.deepspeed_engine.is_gradient_accumulation_boundary()
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        if ends_step:
            self.grad_norm = strategy.zero.stepped()
        return result


def sharded_strategy(name: str | None, arguments: Mapping[str, Any]) -> Strategy:
    """The strategy of a run, by the name of Lightning's."""
    return (ShardedStrategy if name == FSDP2 else ZeroStrategy)(**arguments)
