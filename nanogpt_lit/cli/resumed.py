"""The checkpoint that a fit goes on from: which one it is, whether anything is left to do, and what is set anew."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace

from nanogpt_lit.checkpoint.newest import Newest, latest_of, newest_run
from nanogpt_lit.checkpoint.run_file import SUFFIX, step_of, validations_of
from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.checkpoint.shards import sweep_shards
from nanogpt_lit.errors import NothingToDo, UserError
from nanogpt_lit.loops.trainer_section import writes_run_files
from nanogpt_lit.run.resume import changed_settings, latest_config, rate_change
from nanogpt_lit.runtime.durable import sweep
from nanogpt_lit.runtime.launch import is_first, launched_processes, supervised, was_requeued


@dataclass(frozen=True)
class Resumed(Newest):
    """The checkpoint that a run goes on from by itself."""

    def check_not_ended(self, patience: int | None, text: str) -> None:
        """Check that the run has not ended early, or raise NothingToDo. text: what identifies its text"""
        if patience is None or launched_processes() > 1:
            return
        validations = validations_of(self.path)
        if validations.get("since_best", 0) >= patience and validations.get("text") in (None, text):
            raise NothingToDo(
                f"{self.path} is complete: the run ended early, after {patience} validations in a row without a "
                "better loss. To go on with it, raise early_stopping_patience, or leave it out."
            )

    def changes(self, settings: Namespace, kept: str) -> Iterator[str]:
        """Lines on what is set otherwise than in the run so far: the command line wins over it.

        kept: the settings as the run keeps them, YAML
        """
        before, remarks = latest_config(self.run_folder)
        yield from remarks
        if before is not None:
            yield from changed_settings(before, yaml.safe_load(kept))
            if rate := rate_change(before, settings.as_dict(), self.step):
                yield rate


def go_on_from(settings: Namespace, is_fit: bool, lock: RunLock | None, say: Callable[[str], None]) -> Resumed | None:
    """Find and check the checkpoint of resume or ckpt_path, which becomes settings.ckpt_path; None for one by name.

    lock: taken on its run   say: takes the lines about it
    """
    resumed = None
    if is_fit and settings.get("resume") is not None:
        check_resumable(settings)
        root = Path(settings.trainer.default_root_dir)
        # The first process decides, and tells the others: they may have no disk in common.
        resumed = find_resumed(root, lock) if is_first() else None
        if resumed is None:
            say(f"resume: no checkpoint in {root}, starting from the beginning")
        else:
            for remark in resumed.remarks:
                say(remark)
            say(f"resume: going on from {resumed.path}, step {resumed.step:,}")
            settings.ckpt_path = str(resumed.path)
    if settings.get("ckpt_path") is None or not is_first():  # whose file is the one that counts
        return resumed
    if sentence := check_goes_on(settings, is_fit, found=resumed is not None):
        say(sentence)
    return resumed


def check_resumable(settings: Namespace) -> None:
    """Raises UserError where resume=auto has nothing to look for, or cannot find it by itself."""
    if settings.get("ckpt_path") is not None:
        raise UserError(
            f"resume=auto looks for a checkpoint and ckpt_path={settings.ckpt_path} names one; leave one out."
        )
    strategy = settings.trainer.strategy
    if not writes_run_files(settings.trainer):
        who = "fit --keep-alive" if supervised() else "a job queued again" if was_requeued() else "resume=auto"
        name = strategy if isinstance(strategy, str) else str(strategy.get("class_path")).rpartition(".")[2]
        raise UserError(
            f"{who} goes on from the newest checkpoint that is whole, and those of trainer.strategy={name} are folders "
            "or files that only its own engine reads; set trainer.strategy=ddp or ModelParallelStrategy, or start fit "
            "alone with ckpt_path."
        )


def find_resumed(root: Path, lock: RunLock | None) -> Resumed | None:
    """Find the newest checkpoint below root, and lock its run before anything in it is read; None where there is none.

    Raises UserError where the only checkpoints are another strategy's, and as `latest_of`.
    """
    run = newest_run(root)
    if run is None and (others := list(root.glob("*/checkpoints/*.ckpt"))):
        raise UserError(
            f"{others[0]} is a checkpoint of another trainer.strategy; `python -m nanogpt_lit convert` makes a file"
            f"{SUFFIX} of it, or set another trainer.default_root_dir."
        )
    if run is None:
        return None
    if lock is not None:
        lock.acquire(run)
    found = Resumed(**vars(latest_of(run)))
    if lock is not None:
        sweep(found.path.parent)  # also of a run that turns out to be complete
        sweep_shards(found.path.parent)
    return found


def check_goes_on(settings: Namespace, is_fit: bool, found: bool) -> str | None:
    """Check that there is something left to do after ckpt_path; a sentence where the run has all its steps.

    found: by resume=auto; a checkpoint that the user names may be of another run
    Raises NothingToDo in its place where no other process waits for this one, and UserError for a damaged file.
    """
    checkpoint, max_steps = Path(settings.ckpt_path), settings.trainer.max_steps
    if not writes_run_files(settings.trainer):
        return None
    step = step_of(checkpoint)  # raises where it is none, before anything is built
    if not is_fit or not 0 < max_steps <= step:
        return None
    sentence = (
        f"{checkpoint} holds step {step:,}, and the run is complete with trainer.max_steps={max_steps}. To go on "
        f"with it, raise that: --trainer.max_steps {2 * step} would train as much again."
    )
    if found and launched_processes() == 1:
        raise NothingToDo(sentence)
    return sentence
