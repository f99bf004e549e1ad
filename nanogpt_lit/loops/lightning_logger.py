"""Curves under Lightning's Trainer on a disk that may be full."""

from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger

from nanogpt_lit.loops.patient_writer import PatientWriter


class PatientLogger(TensorBoardLogger):
    """Lightning's logger, with a writer that does not end the training."""

    @property
    @rank_zero_experiment
    def experiment(self) -> PatientWriter:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = PatientWriter(log_dir=self.log_dir, **self._kwargs)
        return self._experiment  # type: ignore[return-value]
