"""When `last` is saved besides after validations, of which a run may have few, or none."""

import time
from collections.abc import Callable

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.processes import Agreement

EVERY_MINUTES = 15.0


class SaveTimes:
    """Asked after each step. Of several processes all ask, and get the same answer.

    every_minutes, every_steps: None for no such saves
    """

    def __init__(
        self,
        every_minutes: float | None = EVERY_MINUTES,
        every_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises UserError for one that is not above zero."""
        for name, every in (("minutes", every_minutes), ("steps", every_steps)):
            if every is not None and not every > 0:
                raise UserError(f"checkpoint_every_{name}={every} must be above 0; null leaves it out.")
        self.every_minutes = every_minutes
        self.every_steps = every_steps
        self._clock = clock
        self._saved_s = clock()
        self._agreement = Agreement()

    def due(self, step: int) -> bool:
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        if self.every_minutes is None:
            return False
        return self._agreement.highest(int(self._clock() - self._saved_s >= 60 * self.every_minutes)) > 0

    def saved(self) -> None:
        """Called with every checkpoint: the minutes are counted from here."""
        self._saved_s = self._clock()

    def __str__(self) -> str:
        times = [
            *([f"every {self.every_minutes:g} minutes"] if self.every_minutes is not None else []),
            *([f"every {self.every_steps:,} steps"] if self.every_steps is not None else []),
            "at the end",
        ]
        return ", ".join(times[:-1]) + (" and " if times[1:] else "") + times[-1]
