"""A device that is far behind Python: copies to the host arrive late, and those from it read late. Whoever does not
wait for them reads what was there before, or overwrites what is still to be copied."""

import pytest
import torch
from fake_device import configure, report
from short_run import PLACEMENTS, fit


class Lag:
    """In the run's process. Finds how often host memory was written while it was being copied."""

    def __init__(self, launches):
        self.launches = launches

    def __call__(self):
        configure(lag=self.launches)

    @property
    def found(self):
        return report()["sources_changed"]


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if "host" in name or "streamed" in name])
def test_a_lag_changes_no_bit(placement, text, tmp_path):
    prompt, late = (
        fit(tmp_path / str(launches), text, PLACEMENTS[placement], before=Lag(launches)) for launches in (0, 10_000)
    )
    assert (prompt.code, late.code) == (0, 0), late.said
    assert late.found == 0
    assert late.curves["train/loss"] == prompt.curves["train/loss"]
    assert late.state.keys() == prompt.state.keys()
    assert all(torch.equal(late.state[name], tensor) for name, tensor in prompt.state.items())
