"""Lightning's FSDP2 with the checkpoints of every loop: each process writes and reads its own part of them."""

from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from nanogpt_lit.checkpoint.lightning_format import to_lightning
from nanogpt_lit.checkpoint.sharded_network import load_into, unread_run
from nanogpt_lit.run.resume import check_network


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 as Lightning drives it, but for checkpoints: its own would gather the network on the first process, or be
    a folder of pickles that no other strategy reads. Needs a CheckpointIO that is called by all processes together."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath), storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        optimizer = self.optimizers[0] if self.optimizers else None  # none for validate and test
        run = unread_run(Path(checkpoint_path))
        check_network(module, run)
        load_into(run, module, optimizer)
        return to_lightning(run)
