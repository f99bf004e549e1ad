"""A run's folder under Lightning's Trainer: what is kept there from the beginning."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from nanogpt_lit.loops.lightning_callbacks import add_text
from nanogpt_lit.loops.pieces import keep_config


class RunFolder(Callback):
    """Keeps the run's full configuration in its folder, as config.yaml, and in TensorBoard's TEXT tab.

    config: YAML
    """

    def __init__(self, config: str) -> None:
        self._config = config

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            keep_config(folder, self._config)
            add_text(trainer, "config", self._config)


def run_folder(trainer: Trainer) -> Path:
    """Every process has to ask: Lightning tells all of them the first one's."""
    return Path(trainer.log_dir or trainer.default_root_dir)
