"""DeepSpeed's ZeRO as Lightning drives it, but for the norms, the precision and the checkpoints, which are those of
every loop, and on CPUs too. Needs the package deepspeed."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor

from nanogpt_lit.loops.lightning import MeasuredClipping
from nanogpt_lit.loops.lightning_sharded import InRunFiles
from nanogpt_lit.loops.zero import ZeroStep, zero_config


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
