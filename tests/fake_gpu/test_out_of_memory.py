"""Other programs take the GPU's memory in the middle of a run, and PyTorch's allocator fails: a real OutOfMemoryError,
in each phase of a step, wherever weights, optimizer and activations are kept.

The run goes on with the curve of the one that nobody disturbed, or it ends with one sentence; never with a traceback.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from fake_device import configure, report
from short_run import PLACEMENTS, FailedError, fit
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

PHASES = ("forward", "backward", "optimizer", "validation")
AT_STEP = {"optimizer": 1}
"""The step in which memory ends; AdamW makes its state in the first. All else in the second."""
PAGE_MIB = 2
ROOMS = {"a page too little": lambda need_mib: need_mib - PAGE_MIB, "little": lambda need_mib: 0.6 * need_mib}
"""MiB that others leave, of those that the phase took in the undisturbed run beyond what was there when it began."""
NETWORKS = {"wide": (), "many sequences": ("--data.batch_size=16", "--model.gpt.n_embd=128")}
"""What a phase takes depends on the gaps that the one before has left: backward takes memory in one or the other."""
NO_FILES = "--trainer.enable_checkpointing=false"


def of_a_plan(tensor):
    """A run is planned in its own process, by a module whose tensors have no content."""
    return hasattr(tensor, "fake_device")


@dataclass
class Moments:
    """Follows a run's phases by PyTorch's own hooks, which know nothing of how a step is done.

    take: (phase, MiB) that others leave from the beginning of that phase on; None measures what each phase takes
    """

    take: tuple[str, float] | None = None
    steps: int = 0
    _found: dict[str, float] = field(default_factory=dict)
    _phase: str | None = None
    _began_mib: float = 0.0

    @property
    def found(self):
        """MiB that each phase took, the first time, beyond what was there when it began. Validation ends here."""
        self._end()
        return self._found

    def __call__(self):
        """In the run's process, before it begins."""
        register_module_forward_pre_hook(self._forward)
        register_optimizer_step_pre_hook(self._begin_step)
        register_optimizer_step_post_hook(self._end_step)
        backward = torch.Tensor.backward

        def watched(tensor, *arguments, **options):
            if tensor.numel() == 1 and not of_a_plan(tensor):
                self._begin("backward")
            return backward(tensor, *arguments, **options)

        torch.Tensor.backward = watched

    def _forward(self, module, inputs):
        if "Embedding" in type(module).__name__ and not of_a_plan(inputs[0]):
            self._begin("forward" if module.training else "validation")

    def _begin_step(self, optimizer, *_):
        if not of_a_plan(optimizer.param_groups[0]["params"][0]):
            self._begin("optimizer")

    def _end_step(self, optimizer, *_):
        if not of_a_plan(optimizer.param_groups[0]["params"][0]):
            self._end()
            self.steps += 1

    def _begin(self, phase):
        if phase == self._phase:
            return
        self._end()
        self._phase = phase
        if self.steps + 1 != AT_STEP.get(phase, 2) and phase != "validation":
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._began_mib = report()["used_mib"]
        configure(new_peak=1)
        if self.take is not None and self.take[0] == phase:
            total_mib = torch.cuda.get_device_properties(0).total_memory / 2**20
            configure(others_mib=int(total_mib - self._began_mib - self.take[1]))
            self.take = None

    def _end(self):
        if self._phase is not None and self._began_mib:
            self._found.setdefault(self._phase, report()["peak_mib"] - self._began_mib)
        self._phase, self._began_mib = None, 0.0


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, text):
    runs = {}

    def run(placement, network):
        if (placement, network) not in runs:
            folder = tmp_path_factory.mktemp("undisturbed")
            outcome = fit(folder / "run", text, PLACEMENTS[placement], NO_FILES, *NETWORKS[network], before=Moments())
            assert outcome.code == 0, outcome.said
            runs[placement, network] = outcome
        return runs[placement, network]

    return run


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_memory_that_ends_does_not_end_the_run(
    network, placement, phase, room, undisturbed, text, tmp_path, record_property
):
    expected = undisturbed(placement, network)
    need_mib = expected.found.get(phase, 0.0)
    if need_mib < 2 * PAGE_MIB:
        pytest.skip(f"takes {need_mib:.0f} MiB of the GPU in {phase}")
    room_mib = max(PAGE_MIB, math.floor(ROOMS[room](need_mib) / PAGE_MIB) * PAGE_MIB)
    try:
        more, moments = (NO_FILES, *NETWORKS[network]), Moments(take=(phase, room_mib))
        outcome = fit(tmp_path / "run", text, PLACEMENTS[placement], *more, before=moments)
    except FailedError as error:
        pytest.fail(str(error))
    record_property("outcome", outcome.error or next(iter(lines(outcome.said, "out of memory")), "went on"))
    # A retry gives back what the allocator keeps, and may have enough by that.
    assert outcome.peaks["out_of_memory"] + outcome.peaks["retries"] > 0
    if outcome.code == 0:
        for tag in ("train/loss", "val/loss"):
            theirs = expected.curves[tag]
            assert outcome.curves[tag] == {step: pytest.approx(loss, abs=2e-5) for step, loss in theirs.items()}
    else:
        assert outcome.code == 2
        assert "model." in outcome.error or "memory" in outcome.error
        assert len(lines(outcome.said, "error: ")) == 1


def lines(text, beginning):
    return [line for line in text.splitlines() if line.startswith(beginning)]
