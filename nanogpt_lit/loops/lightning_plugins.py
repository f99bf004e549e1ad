"""Parts of Lightning's Trainer that a run of ours replaces: loggers that do not end a training, a writer of checkpoints
in the format of every loop.
"""

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_only

from nanogpt_lit.checkpoint.disk import BestEffortSaver
from nanogpt_lit.checkpoint.lightning_format import from_lightning, to_lightning
from nanogpt_lit.checkpoint.newest import load_together
from nanogpt_lit.checkpoint.shards import sweep_shards
from nanogpt_lit.loops.compatibility import DEEPSPEED
from nanogpt_lit.loops.lightning import precision_plugin
from nanogpt_lit.run.curves import BestEffortWriter, Curves, code_block
from nanogpt_lit.run.resume import claim_folder


class LoggerCurves(Curves):
    """Curves that go to every logger of the Trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def begin(self, config: str | None, step: int) -> None:
        for logger in self._trainer.loggers:
            if isinstance(logger, BestEffortLogger):
                logger.experiment.begin(config, step)
        if config is not None:
            self.add_text("config", config, step)

    def add(self, values: dict[str, float], step: int) -> None:
        values = {tag: value for tag, value in values.items() if tag != "val/loss"}  # which validation_step logs
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        for logger in self._trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(tag, code_block(text), step)

    def flush(self) -> None:
        for logger in self._trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
            elif isinstance(logger, CSVLogger):
                logger.save()


class BestEffortLogger(TensorBoardLogger):
    """Lightning's logger, with a writer that does not end the training, and a folder of its own."""

    @property
    def version(self) -> int | str:
        # Lightning's own would be looked for here and made later: two runs that start together would have the same.
        if self._version is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._version = claim_folder(Path(self.root_dir), "version").name
        return super().version

    @property
    @rank_zero_experiment
    def experiment(self) -> BestEffortWriter:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = BestEffortWriter(log_dir=self.log_dir, **self._kwargs)
        return self._experiment  # type: ignore[return-value]


@rank_zero_only
def go_on(logger: Logger | bool | None, run_folder: Path, step: int) -> None:
    """Continue the file of the YAML's CSVLogger in the run's folder, without what came after the checkpoint.

    By itself it would begin another version or, told its version, delete the file that is there.
    """
    path = run_folder / "metrics.csv"
    kept = path.with_name("metrics_before.csv")  # until the new one is there; a start that was killed leaves it
    if not isinstance(logger, CSVLogger) or Path(logger.root_dir) != run_folder.parent:
        return
    if path.exists() and not kept.exists():
        path.replace(kept)
    if not kept.exists():
        return
    with kept.open(newline="", encoding="utf-8") as file:
        # A power loss may have left half a row, or zeros.
        rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdecimal() and int(row["step"]) <= step]
    logger._version = run_folder.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns that it will delete what was put aside above
        writer = logger.experiment
    writer.metrics = [{name: value for name, value in row.items() if value} for row in rows]
    logger.save()
    kept.unlink()


# Checkpoints.


class RunFileIO(CheckpointIO):
    """A plugin for the Trainer: checkpoints and ckpt_path are then in the format of every loop.

    Lightning's own writer stages the file in the system's temporary folder and copies it over the old one when that is
    on another file system: killed there, both are lost.
    """

    def __init__(self) -> None:
        self.saver = BestEffortSaver()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saver.save(Path(path), from_lightning(checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.saver.wait()
        state = load_together(Path(path))
        assert state is not None, "every process was given the path"
        return to_lightning(state)

    def teardown(self) -> None:
        self.saver.in_background = False
        self.saver.wait()

    def remove_checkpoint(self, path: Any) -> None:
        self.saver.wait()
        Path(path).unlink(missing_ok=True)
        sweep_shards(Path(path).parent)


def run_plugins(given: Any, precision: str, device: str, strategy: str | None = None) -> dict[str, Any]:
    """A Trainer's `plugins` and `precision`: those given, and ours where none of them is a precision or writes
    checkpoints. strategy: the name of its class"""
    plugins = [] if given is None else given if isinstance(given, list) else [given]
    own: Precision | None = None
    if not any(isinstance(plugin, Precision) for plugin in plugins):
        if strategy == DEEPSPEED:
            from nanogpt_lit.loops.lightning_sharded import ZeroPrecision  # late, for few runs need it

            own = ZeroPrecision(precision)  # type: ignore[arg-type]  # compatibility.py has looked at it
        else:
            own = precision_plugin(precision, device)
    writer = [] if any(isinstance(plugin, CheckpointIO) for plugin in plugins) else [RunFileIO()]
    ours = [] if own is None else [own]
    return {"plugins": [*plugins, *ours, *writer], "precision": precision if own is None else None}
