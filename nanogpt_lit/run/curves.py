"""The curves and texts of a run, written for TensorBoard on a disk that may be full.

Training is worth more than some points of them.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, scalar

from nanogpt_lit.errors import UserError, tell
from nanogpt_lit.gpt.network import Network
from nanogpt_lit.gpt.networks import section_of
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.run.metrics import CURVES, StepMetrics
from nanogpt_lit.runtime.processes import is_in_pieces, is_sharded


class Curves:
    """Receiver of what a run has to show, which shows nothing: for every process but the first."""

    def begin(self, config: str | None, step: int) -> None:
        """Show a run's configuration, YAML, and how its curves are laid out."""

    def add(self, values: dict[str, float], step: int) -> None:
        """Points of curves, by their tags."""

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Show a text in the TEXT tab."""

    def flush(self) -> None:
        """Write all to the disk: before a checkpoint, or the curves of a run that is killed would end before it."""

    def close(self) -> None: ...


class TensorBoardCurves(Curves):
    """purge_step: from which on TensorBoard forgets what an earlier process of the run drew, for it is drawn again"""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self._writer = BestEffortWriter(str(folder), purge_step=purge_step)

    def begin(self, config: str | None, step: int) -> None:
        self._writer.begin(config, step)
        if config is not None:
            self.add_text("config", config, step)

    def add(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, code_block(text), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def code_block(text: str) -> str:
    """Indent a text for TensorBoard's TEXT tab, whose Markdown then leaves line breaks and signs alone."""
    return "\n".join("    " + line for line in text.splitlines())


LAYOUT = {
    "loss": {
        "train and validation loss": ["Multiline", ["train/loss", "val/loss"]],
        "bits per byte": ["Multiline", ["val/bits_per_byte"]],
    },
    "optimizer": {
        "learning rate": ["Multiline", ["train/lr"]],
        "norm of the gradients": ["Multiline", ["train/grad_norm"]],
    },
    "throughput": {"tokens per second": ["Multiline", ["throughput/tokens_per_s"]]},
}
"""The CUSTOM SCALARS tab, in this order: curves that every run has, on a CPU too."""

HPARAMS = (
    "data.block_size", "data.batch_size", "trainer.accumulate_grad_batches", "trainer.max_steps", "trainer.precision",
    "model.network", "model.optim.lr", "model.optim.weight_decay", "model.optim.beta2", "model.optim.matrices",
    "model.schedule.warmup_steps", "model.schedule.decay", "data.source", "data.tokenizer", "init_from",
    "seed_everything",
)  # fmt: skip
SHAPE = ("n_layer", "n_head", "n_embd", "dropout")
"""Keys of the section of the run's network."""
MEASURES = ("val/loss", "val/bits_per_byte", "train/loss", "throughput/tokens_per_s", "throughput/trained_hours")
"""The HPARAMS tab: what is set, and what came of it, a row for each run."""


def chosen_hparams(config: str) -> dict[str, int | float | str | bool]:
    """The values of HPARAMS and SHAPE in a configuration, YAML: the same names for every run, or TensorBoard would show
    those of one of them."""
    settings = yaml.safe_load(config)
    values = {name: reduce(lambda keys, key: (keys or {}).get(key), name.split("."), settings) for name in HPARAMS}
    shape = settings["model"][section_of(settings["model"])]
    values |= {f"model.{name}": shape.get(name) for name in SHAPE}
    return {name: "null" if value is None else value for name, value in values.items()}


class BestEffortWriter(SummaryWriter):
    """Says once that the disk takes nothing, and leaves points out. It tries again at each flush: before a checkpoint.

    TensorBoard's own writer ends with its first error, and hands it to every call from then on.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._failing = False
        self._described: set[str] = set()
        if not isinstance(threading.excepthook, LeaveToFlush):
            threading.excepthook = LeaveToFlush(threading.excepthook)
        super().__init__(*arguments, **options)

    def begin(self, config: str | None, step: int) -> None:
        """Write the layout of the CUSTOM SCALARS tab and, of a configuration, its row in HPARAMS."""
        summaries = [custom_scalars(LAYOUT)]
        if config is not None:
            summaries += hparams(chosen_hparams(config), dict.fromkeys(MEASURES))[:2]  # the third: how it ended
        for summary in summaries:
            self._unless_failing(self._add_summary, summary, step)

    def add_scalar(self, tag: str, value: float, step: int | None = None) -> None:  # type: ignore[override]
        summary = scalar(tag, value)
        if tag in CURVES and tag not in self._described:  # TensorBoard reads the first of each tag
            self._described.add(tag)
            metadata = summary.value[0].metadata
            metadata.summary_description, metadata.data_class = CURVES[tag], DATA_CLASS_SCALAR
            metadata.plugin_data.plugin_name = "scalars"
        self._unless_failing(self._add_summary, summary, step)

    def add_text(self, *arguments: Any, **options: Any) -> None:
        self._unless_failing(super().add_text, *arguments, **options)

    def _add_summary(self, summary: Any, step: int | None) -> None:
        self._get_file_writer().add_summary(summary, step)

    def flush(self) -> None:
        was_failing, self._failing = self._failing, False
        try:
            if was_failing:
                self._get_file_writer()
            super().flush()
        except OSError as error:
            self._fail(error, say=not was_failing)
        else:
            if was_failing:
                tell("the curves are written again")

    def close(self) -> None:
        if not self._failing:
            self._unless_failing(super().close)

    def _unless_failing(self, write: Callable[..., None], *arguments: Any, **options: Any) -> None:
        if self._failing:
            return
        try:
            write(*arguments, **options)
        except OSError as error:
            self._fail(error, say=True)

    def _fail(self, error: OSError, say: bool) -> None:
        if say:
            tell(
                f"warning: the curves cannot be written: {error.strerror or error}. Training goes on without them, and "
                "tries again at the next checkpoint."
            )
        self._failing = True
        # TensorBoard reads nothing behind half a record: what comes next goes into a file of its own.
        writers: dict[str, Any] = self.all_writers or {}
        for writer in writers.values():
            with suppress(OSError):
                writer.close()
        self.file_writer = self.all_writers = None


class LeaveToFlush:
    """threading.excepthook without TensorBoard's thread, whose error `flush` hands over, to be told in a sentence."""

    def __init__(self, before: Callable[[threading.ExceptHookArgs], object]) -> None:
        self._before = before

    def __call__(self, failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            self._before(failure)


# Text that the network writes after each validation, into the TEXT tab.


@dataclass(frozen=True)
class SampleConfig:
    prompt: str | None = None
    """The beginning of the text; None takes that of the validation part, empty begins a new document."""
    tokens: int = 300
    """Number of tokens to write."""
    temperature: float = 0.8
    """0 writes the likeliest token each time; higher is bolder."""
    seed: int = 1337
    """Seed, the same each time, so that samples of different steps can be compared."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("tokens", self.tokens, 1),
            ("temperature", self.temperature, 0),
            ("seed", self.seed, 0),
        ):
            if not least <= value < 2**63:
                raise UserError(f"TextSamples: {name}={value} must be at least {least}, and no more than 64 bits hold.")


class Samples(Observer):
    """Observer that writes samples, from a random generator of its own: training is bit-identical without them.

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
        is_whole = not any(is_sharded(parameter) or is_in_pieces(parameter) for parameter in module.parameters())
        if self._training.rank > 0 and is_whole:
            return
        gpt = module.gpt
        assert isinstance(gpt, Network)
        from nanogpt_lit.gpt.generate import continue_text  # late, for most of a run writes nothing

        with self._metrics.paused():
            options = asdict(self._config)
            prompt, tokens = options.pop("prompt"), options.pop("tokens")
            self.latest = prompt + "".join(continue_text(gpt, self._tokenizer(), prompt, tokens, **options))
            self._curves.add_text("sample", self.latest, step)
