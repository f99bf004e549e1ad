"""Everything that a run does besides training, in its order: the same list under every loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanogpt_lit.checkpoint.disk import BestEffortSaver
from nanogpt_lit.checkpoint.run_file import SUFFIX
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.run.checkpoints import EVERY_MINUTES, Checkpoints, SaveTimes
from nanogpt_lit.run.curves import Curves, SampleConfig, Samples
from nanogpt_lit.run.guards import EarlyStopping, ElasticSteps, FiniteGuard, SpikeGuard
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.run.resume import Resume, capture
from nanogpt_lit.run.stops import Stopped, Stops
from nanogpt_lit.run.terminal import ProgressLine, relative_to_here
from nanogpt_lit.runtime.clock import awake_s


@dataclass(frozen=True)
class RunConfig:
    """Settings of all that a run does besides training."""

    resume: Literal["auto"] | None = None
    """auto: continue the newest run below trainer.default_root_dir from its newest undamaged checkpoint, if any;
    else start one. A job that SLURM has queued again does so by itself."""

    init_from: str | None = None
    """Fine-tune: begin at step 0 with the weights, the network and the tokenizer of any model that convert reads, or of
    hf:OWNER/NAME[@REVISION]. (ckpt_path continues a run, its step, schedule and best.)"""

    teachers: list[str] | None = None
    """Distil: learn how likely these models, on average, find each token as the next one, and not which one the text
    has: [A.safetensors, B.safetensors], or any models that convert reads, of the same tokenizer."""

    spike_factor: float | None = None
    """Limit of a step's loss, as a multiple of the median of the 64 before: above it, go back to the last checkpoint
    and leave out the samples since; 2 is usual."""

    early_stopping_patience: int | None = None
    """Stop after this many validations in a row without a better loss; best is kept. 3 is usual when a model is
    fine-tuned on a few megabytes."""

    checkpoint_every_minutes: float | None = EVERY_MINUTES
    """Save last after this many minutes without a checkpoint, whether or not the run validates."""

    checkpoint_every_steps: int | None = None
    """Save last each time this many optimizer steps are done, besides after each validation and at the end."""

    def __post_init__(self) -> None:
        factor, patience = self.spike_factor, self.early_stopping_patience
        if factor is not None and not factor > 1:
            raise UserError(f"spike_factor={factor} must be above 1; 2 goes back at twice the median of recent steps.")
        if patience is not None and patience < 1:
            raise UserError(f"early_stopping_patience={patience} must be at least 1 validation; 3 is usual.")
        self.save_times()  # which check themselves

    def save_times(self) -> SaveTimes:
        return SaveTimes(self.checkpoint_every_minutes, self.checkpoint_every_steps)


class RunObservers:
    """The observers of a run that keeps a folder, each feature once.

    curves: where they go, on the first process   folder: the run's, where the stop file is looked for
    max_time_s, requeue_by: see Stops   checkpoints: their folder, None keeps none
    suffix, saver, after_validations: see Checkpoints   data_state: what a checkpoint keeps of the data
    samples: None writes none   began_s: the awake_s() at which the user asked for the run; None takes its start
    text, tokens_per_byte: see StepMetrics
    start: the checkpoint that the run goes on from, unless the loop reads it itself, as Lightning's Trainer
    """

    def __init__(
        self,
        run_config: RunConfig = RunConfig(),
        *,
        curves: Curves | None = None,
        log_every_n_steps: int = 50,
        folder: Path | None = None,
        max_time_s: float | None = None,
        requeue_by: int | None = None,
        checkpoints: Path | None = None,
        suffix: str = SUFFIX,
        saver: BestEffortSaver | None = None,
        after_validations: bool = True,
        data_state: Callable[[], Mapping[str, Any]] = dict,
        samples: SampleConfig | None = None,
        tokenizer: Callable[[], Any] | None = None,
        shows_progress: bool = False,
        began_s: float | None = None,
        text: str | None = None,
        tokens_per_byte: float | None = None,
        start: RunState | None = None,
    ) -> None:
        self.curves = curves or Curves()
        self.stops = Stops(folder, max_time_s, requeue_by=requeue_by)
        self.checkpoints: Checkpoints | None = None
        self.samples: Samples | None = None
        self.spikes: SpikeGuard | None = None
        if run_config.spike_factor is not None:
            self.spikes = SpikeGuard(run_config.spike_factor, checkpoints, self.last_checkpoint)
        spikes = self.spikes
        rollbacks = None if spikes is None else lambda: spikes.rollbacks
        self.metrics = StepMetrics(
            self.curves.add, log_every_n_steps, rollbacks, text=text, tokens_per_byte=tokens_per_byte
        )
        self.early_stopping: EarlyStopping | None = None
        if run_config.early_stopping_patience is not None:
            self.early_stopping = EarlyStopping(run_config.early_stopping_patience, self.metrics)
        if samples is not None and tokenizer is not None:
            self.samples = Samples(samples, tokenizer, self.curves, self.metrics)
        if checkpoints is not None:

            def state(training: Training) -> RunState:
                self.curves.flush()
                return capture(training, data_state(), self.metrics, spikes)

            self.checkpoints = Checkpoints(
                checkpoints,
                self.metrics,
                state,
                saver,
                run_config.save_times(),
                suffix,
                after_validations,
                self.stops.signalled,
            )
        self._resume = None
        if start is not None:
            self._resume = Resume(start)
            self.restore(start)
        self._progress = ProgressLine(self.metrics, began_s) if shows_progress else None
        self._started_s = awake_s()

    def in_order(self) -> list[Observer]:
        features: Sequence[Observer | None] = [
            self._resume,  # first, for the others look at where the run stands
            ElasticSteps(),
            self.spikes,  # goes back before the step is counted, validated or saved
            self.metrics,
            self.samples,
            self._progress,
            FiniteGuard(self.last_checkpoint),  # after the curves, which show what was left out
            self.checkpoints,  # has seen all of the step, and saves it before the run may stop
            self.early_stopping,
            self.stops,
        ]
        return [feature for feature in features if feature is not None]

    def restore(self, state: RunState) -> None:
        """Take over what earlier processes of the run have counted."""
        self.metrics.load_state_dict(
            {"tokens": state.tokens, "trained_s": state.trained_s, "validations": dict(state.validations)}
        )
        if self.spikes is not None:
            self.spikes.load_state_dict(state.spikes)

    @property
    def elapsed_s(self) -> float:
        """Seconds of this process of the run, without what the machine slept."""
        return awake_s() - self._started_s

    def last_checkpoint(self) -> str | None:
        """The path of `last` as a user would type it; None where there is none."""
        path = None if self.checkpoints is None else self.checkpoints.files().get("last")
        return None if path is None else relative_to_here(path)

    def stopped(self) -> Stopped | None:
        """The exception of a run that was asked to end; None where it has ended by itself."""
        if self.stops.reason is None:
            return None
        saved = None
        if self.checkpoints is not None and self.checkpoints.unsaved is None:
            saved = relative_to_here(self.checkpoints.path("last"))
        return Stopped(self.stops.reason, self.stops.step, saved, keeps=self.checkpoints is not None)


def always() -> list[Observer]:
    """The observers that every run has, also one that keeps nothing."""
    return [ElasticSteps(), FiniteGuard()]
