"""The validation losses of a run, and what a loss says in other units."""

import math
from typing import Any


class ValidationRecord:
    """The validation losses of a run: the latest and the best, each with its step.

    text: what identifies the text that they are measured on; None compares with any
    """

    def __init__(self, text: str | None = None) -> None:
        self.text = text
        self.latest: tuple[int, float] | None = None
        """(step, mean loss in nats per token)"""
        self.best: tuple[int, float] | None = None
        self.since_best = 0
        """Validations."""

    def add(self, step: int, loss: float) -> None:
        self.latest = (step, loss)
        self.since_best += 1
        if self.best is None or loss < self.best[1]:
            self.best, self.since_best = self.latest, 0

    def sentence(self) -> str:
        assert self.latest is not None, "sentence() before the first validation"
        assert self.best is not None
        step, loss = self.latest
        best = "the best so far" if self.best[0] == step else f"best {self.best[1]:.4f} at step {self.best[0]}"
        return f"step {step}  validation loss {loss:.4f}  perplexity {perplexity(loss):.2f}  ({best})"

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.latest, "best": self.best, "since_best": self.since_best, "text": self.text}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Losses on another text are no measure of those to come: they begin anew."""
        if self.text is None or state.get("text") in (None, self.text):
            self.latest, self.best = state["latest"], state["best"]
            self.since_best = state.get("since_best", 0)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token; infinite where that overflows, as it may in a run that has blown up."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """loss: mean in nats per token   tokens_per_byte: of the text

    As `eval` measures it, but that end-of-text counts here as a token like any other.
    """
    return loss / math.log(2) * tokens_per_byte
