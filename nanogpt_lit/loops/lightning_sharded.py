"""Lightning's strategies that share a network out over the processes, with the checkpoints of every loop.

By themselves they would gather the network on the first process, or write a folder of pickles that no other strategy
reads. Here each process writes and reads its own part, through a CheckpointIO that all of them call together.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.optim import Optimizer

from nanogpt_lit.checkpoint.lightning_format import to_lightning
from nanogpt_lit.checkpoint.sharded_network import load_into, unread_run
from nanogpt_lit.loops.compatibility import FSDP2
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


def sharded_strategy(name: str | None, arguments: Mapping[str, Any]) -> Strategy:
    """The strategy of a run, by the name of Lightning's."""
    if name == FSDP2:
        return ShardedStrategy(**arguments)
    from nanogpt_lit.loops.lightning_zero import ZeroStrategy

    return ZeroStrategy(**arguments)
