"""The known differences between the frameworks, each with the way to bring it back.

The loops here train alike because each difference is dealt with in one of them. Brought back there, that loop is
compared with the reference: what shows is what a user of that framework gets by default.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    AutocastKwargs,
)
from torch.optim.lr_scheduler import LambdaLR

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.loops import accelerate, contract
from nanogpt_lit.loops.lightning import Observed, precision_plugin
from nanogpt_lit.optim.schedule import WarmupDecay
from nanogpt_lit.parity import runs
from nanogpt_lit.parity.brought_back import (
    LossInTwoHalves,
    library_sampler,
    parameters_in_the_order_of_the_module,
    reported_divided,
    sharded_by_accelerate,
    stock_precision,
    swapped,
    the_share_of_this_process,
    usual_evenness,
    usual_schedule,
    whole_windows,
    without_reseeding,
)
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.parity.record import Difference, compare, distance_of_weights, earliest
from nanogpt_lit.parity.runs import LOOPS, OVERFLOWS, Case, quiet


@dataclass(frozen=True)
class Effect:
    """The effect of a difference that is brought back."""

    first: Difference | None
    weights: float | None
    """The largest distance of a weight at the end."""
    refused: str | None = None
    """The framework's error, where it refuses to run."""

    def __bool__(self) -> bool:
        return self.first is not None or self.refused is not None

    def __str__(self) -> str:
        if self.refused is not None:
            return f"refused: {self.refused}"
        if self.first is None:
            return "no difference"
        return str(self.first) + (f"; weights at the end by {self.weights:.1e}" if self.weights else "")


@dataclass(frozen=True)
class KnownDifference:
    name: str
    what_happens: str
    loop: str
    """The loop that deals with it."""
    case: Callable[[Case], Case]
    """A case in which it matters."""
    brought_back: Callable[[], Any]
    """A context in which the loop does not deal with it."""
    only_rounds: bool = False
    """It changes nothing but the order of a sum, which a CPU's kernels may round to the same bits."""

    def effect(self, base: Case, data: TokenDataModule) -> Effect:
        """Train in the loop with and without it. A case of several processes is for `effects_together`."""
        case = self.case(base)
        expected = LOOPS["reference"](case, data).entries
        try:
            with self.brought_back():
                found = LOOPS[self.loop](case, data).entries
        except RuntimeError as error:
            return Effect(None, None, str(error).split(".")[0])
        return Effect(compare(expected, found), distance_of_weights(expected, found))

    def describe(self, effect: Effect) -> str:
        return "rounded alike on this CPU" if self.only_rounds and not effect else str(effect)


def effects_together(processes: int, base: Case, data: TokenDataModule) -> dict[str, Effect]:
    """The effects, by name, of the differences that several processes are needed to see."""
    data.position = None
    names = [known.name for known in KNOWN_DIFFERENCES if known.case(base).processes == processes]
    of_ranks = run_together(processes, effects, names, base, data)
    return {
        name: replace(of_all[0], first=earliest([effect.first for effect in of_all]))
        for name, *of_all in zip(names, *of_ranks, strict=True)
    }


def effects(names: Sequence[str], base: Case, data: TokenDataModule) -> list[Effect]:
    quiet()
    by_name = {known.name: known for known in KNOWN_DIFFERENCES}
    return [by_name[name].effect(base, data) for name in names]


def with_settings(base: Case, /, scaler: Mapping[str, Any] | None = None, **changes: Any) -> Case:
    return replace(base, settings=replace(base.settings, **changes), scaler=dict(scaler or {}))


KNOWN_DIFFERENCES = [
    KnownDifference(
        "order of clipping",
        "accelerate's tutorial clips module.parameters(), Lightning by optimizer group: the norm may round otherwise",
        "accelerate",
        # Every step is clipped, at a limit that no power of two hides.
        lambda base: with_settings(base, precision="bf16-mixed", gradient_clip_val=0.1),
        parameters_in_the_order_of_the_module,
        only_rounds=True,
    ),
    KnownDifference(
        "autocast's weight cache",
        "accelerate leaves it on: the gradients of a weight that is used twice are added in 16 bits",
        "accelerate",
        lambda base: replace(with_settings(base, precision="bf16-mixed"), module=LossInTwoHalves),
        lambda: swapped(accelerate, "AUTOCAST", AutocastKwargs()),
    ),
    KnownDifference(
        "schedule on a skipped step",
        "Lightning moves the learning rate on although the scaler skipped the step, accelerate does not",
        "lightning",
        lambda base: with_settings(base, precision="16-mixed", scaler=OVERFLOWS),
        lambda: swapped(WarmupDecay, "step", LambdaLR.step),
    ),
    KnownDifference(
        "float16 without a GPU (accelerate)",
        "Accelerator(mixed_precision='fp16') trains in float32 there, without a word",
        "accelerate",
        lambda base: with_settings(base, precision="16-mixed"),
        lambda: swapped(runs, "HalfOnCpu", Accelerator),
    ),
    KnownDifference(
        "float16 without a GPU (Lightning)",
        "Trainer(precision='16-mixed') trains in bfloat16 there",
        "lightning",
        lambda base: with_settings(base, precision="16-mixed"),
        lambda: swapped(runs, "lightning_precision", lambda *_: precision_plugin("bf16-mixed", "cpu")),
    ),
    KnownDifference(
        "clipping with a fused optimizer",
        "Lightning refuses the two together under mixed precision",
        "lightning",
        lambda base: replace(
            with_settings(base, precision="16-mixed", gradient_clip_val=1.0),
            optim=replace(base.optim, implementation="fused"),
        ),
        lambda: swapped(runs, "lightning_precision", stock_precision),
    ),
    KnownDifference(
        "start of dropout's random state",
        "the masks depend on what was drawn while a framework set up",
        "lightning",
        lambda base: replace(with_settings(base, precision="32-true"), gpt=replace(base.gpt, dropout=0.1)),
        lambda: swapped(contract, "seed_dropout", without_reseeding),
    ),
    KnownDifference(
        "a ragged last window",
        "accelerate sees the end of a loader that it prepared only: the window runs on into the next epoch",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true", accumulate_grad_batches=4), batches_per_epoch=6),
        lambda: swapped(Accelerator, "prepare_data_loader", lambda self, loader, **options: loader),
    ),
    KnownDifference(
        "a validation that stops half-way",
        "accelerate goes on to ask the validation loader whether the training loader ends",
        "accelerate",
        lambda base: replace(
            with_settings(
                base, precision="32-true", accumulate_grad_batches=4, val_check_interval=5, limit_val_batches=1
            ),
            batches_per_epoch=6,
        ),
        lambda: swapped(accelerate, "end", lambda loader: None),
    ),
    KnownDifference(
        "the loss that is reported",
        "Lightning hands callbacks the loss divided by the accumulation",
        "lightning",
        lambda base: with_settings(base, precision="32-true", accumulate_grad_batches=4),
        lambda: swapped(Observed, "on_train_batch_end", reported_divided),
    ),
    KnownDifference(
        "steps of the schedule on two processes",
        "accelerate steps a prepared schedule once per process: the rate rises and falls twice as fast",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true"), processes=2),
        usual_schedule,
    ),
    KnownDifference(
        "batches of each process (accelerate)",
        "accelerate deals out every loader that it prepares, also one that is a process's share: half goes unread",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true"), processes=2),
        lambda: swapped(runs, "loaders_to_deal_out", the_share_of_this_process),
    ),
    KnownDifference(
        "validation on two processes",
        "accelerate's even_batches fills the last turn with windows that have been read: they count twice",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true", limit_val_batches=None), processes=2),
        usual_evenness,
    ),
    KnownDifference(
        "batches of each process (Lightning)",
        "Lightning puts its own sampler into a loader, which shuffles also where shuffle=False was asked for",
        "lightning",
        lambda base: replace(with_settings(base, precision="32-true", val_check_interval=None), processes=2),
        library_sampler,
    ),
    KnownDifference(
        "gradients of a window under FSDP2",
        "accelerate keeps whole gradients until the window ends, Lightning shares them out after each micro-batch",
        "accelerate",
        lambda base: replace(
            with_settings(base, precision="32-true", accumulate_grad_batches=4), processes=2, sharded=True
        ),
        lambda: swapped(accelerate, "GradientAccumulationPlugin", whole_windows),
    ),
    KnownDifference(
        "bfloat16 under FSDP2",
        "accelerate casts whole weights to it and adds up gradients in it, Lightning casts what autocast does",
        "accelerate",
        lambda base: replace(with_settings(base, precision="bf16-mixed"), processes=2, sharded=True),
        sharded_by_accelerate,
    ),
]
