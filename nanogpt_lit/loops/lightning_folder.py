"""A run's folder under Lightning's Trainer: what is kept there from the beginning."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.loops.lightning_callbacks import add_text
from nanogpt_lit.run.pieces import keep_config


class RunFolder(Callback):
    """Locks the run's folder, and keeps its full configuration there, as config.yaml, and in TensorBoard's TEXT tab.

    config: YAML   lock: that the run has already where it is gone on with; None locks nothing
    """

    def __init__(self, config: str, lock: RunLock | None) -> None:
        self._config = config
        self._lock = lock

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            if self._lock is not None:
                self._lock.acquire(folder)
            keep_config(folder, self._config)
            add_text(trainer, "config", self._config)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self._lock is not None:  # a process that Lightning has started ends without us
            self._lock.release()


def run_folder(trainer: Trainer) -> Path:
    """Every process has to ask: Lightning tells all of them the first one's."""
    return Path(trainer.log_dir or trainer.default_root_dir)
