"""A run that has learnt its text ends before it learns it by heart."""

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer
from nanogpt_lit.run.metrics import StepMetrics


class EarlyStopping(Observer):
    """Ends a run after `patience` validations in a row without a better loss; the checkpoint `best` is of the best one.

    The count is part of the run and goes on with it. All processes know the same loss and end together.
    """

    def __init__(self, patience: int, metrics: StepMetrics) -> None:
        check_patience(patience)
        self.patience = patience
        self._metrics = metrics

    def between_steps(self, step: int) -> bool:
        return self.has_ended

    @property
    def has_ended(self) -> bool:
        return self._metrics.validations.since_best >= self.patience

    def sentence(self) -> str:
        best = self._metrics.validations.best
        assert best is not None, "a count of validations without one"
        return f"{self.patience} validations in a row without a better loss than {best[1]:.4f} at step {best[0]:,}"


def check_patience(patience: int, validates: bool = True) -> None:
    """Raises UserError for a number of validations that a run cannot wait for."""
    if patience < 1:
        raise UserError(f"early_stopping_patience={patience} must be at least 1 validation; 3 is usual.")
    if not validates:
        raise UserError(
            f"early_stopping_patience={patience} counts validations, and trainer.limit_val_batches=0 makes none; leave "
            "one of them out."
        )
