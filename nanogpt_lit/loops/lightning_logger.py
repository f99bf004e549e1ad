"""Curves under Lightning's Trainer on a disk that may be full, and over all pieces of a run."""

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from nanogpt_lit.run.patient_writer import PatientWriter


class PatientLogger(TensorBoardLogger):
    """Lightning's logger, with a writer that does not end the training."""

    @property
    @rank_zero_experiment
    def experiment(self) -> PatientWriter:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = PatientWriter(log_dir=self.log_dir, **self._kwargs)
        return self._experiment  # type: ignore[return-value]


@rank_zero_only
def go_on(logger: Logger | bool | None, run_folder: Path, step: int) -> None:
    """Has a CSVLogger of the YAML's continue its file in the run's folder, without what came after the checkpoint.

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
    logger.experiment.metrics = [{name: value for name, value in row.items() if value} for row in rows]
    logger.save()
    kept.unlink()
