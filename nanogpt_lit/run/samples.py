"""Text that the network writes after each validation, into TensorBoard's TEXT tab."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.model import GPT
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.run.curves import Curves
from nanogpt_lit.run.metrics import StepMetrics


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = ""
    """What the text begins with; empty begins a new document."""
    tokens: int = 300
    """How many tokens to write."""
    temperature: float = 0.8
    """0 writes the likeliest token each time; higher is bolder."""
    seed: int = 1337
    """The same each time, so that samples of different steps can be compared."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("tokens", self.tokens, 1),
            ("temperature", self.temperature, 0),
            ("seed", self.seed, 0),
        ):
            if not least <= value < 2**63:
                raise UserError(f"TextSamples: {name}={value} must be at least {least}, and no more than 64 bits hold.")


class Samples(Observer):
    """Draws from a generator of its own: with or without samples, the training is bit for bit the same.

    tokenizer: asked for once the data is set up
    """

    def __init__(
        self, config: SampleConfig, tokenizer: Callable[[], Any], curves: Curves, metrics: StepMetrics
    ) -> None:
        self.latest: str | None = None
        self._config, self._tokenizer, self._curves, self._metrics = config, tokenizer, curves, metrics

    def on_train_start(self, training: Training) -> None:
        self._training = training

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        module = self._training.module
        # A sharded network is whole only while all processes compute: then all of them write, and the first one keeps.
        if self._training.rank > 0 and getattr(module, "device_mesh", None) is None:
            return
        gpt = module.gpt
        assert isinstance(gpt, GPT)
        from nanogpt_lit.gpt.sampling import continue_text  # late, for most of a run writes nothing

        with self._metrics.paused():
            options = asdict(self._config)
            prompt, tokens = options.pop("prompt"), options.pop("tokens")
            self.latest = prompt + "".join(continue_text(gpt, self._tokenizer(), prompt, tokens, **options))
            self._curves.add_text("sample", self.latest, step)
