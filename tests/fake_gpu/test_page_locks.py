"""Where the system locks no more pages, copies are slower, and nothing else of a run is different."""

import pytest
import torch
from fake_device import configure, report
from short_run import PLACEMENTS, fit

ON_THE_HOST = [name for name in PLACEMENTS if "on the host" in name or "streamed" in name]
LIMITS = {
    "1 MiB": {"page_lock_mib": 1},  # PyTorch itself page-locks a little: every number that is read back goes through it
    "no page twice": {"registers_pages": 1},
}


class Limit:
    """In the run's process. Finds how often the system refused."""

    def __init__(self, **settings):
        self.settings = settings

    def __call__(self):
        configure(**self.settings)

    @property
    def found(self):
        return report()["registrations_refused"]


@pytest.fixture(scope="session")
def unlimited(tmp_path_factory, text):
    runs = {}

    def run(placement):
        if placement not in runs:
            runs[placement] = fit(tmp_path_factory.mktemp("unlimited"), text, PLACEMENTS[placement])
            assert runs[placement].code == 0, runs[placement].said
        return runs[placement]

    return run


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("placement", ON_THE_HOST)
def test_a_refused_page_lock_changes_no_bit(placement, limit, unlimited, text, tmp_path):
    expected = unlimited(placement)
    outcome = fit(tmp_path / "run", text, PLACEMENTS[placement], before=Limit(**LIMITS[limit]))
    assert outcome.code == 0, outcome.said
    assert outcome.curves["train/loss"] == expected.curves["train/loss"]
    assert outcome.state.keys() == expected.state.keys()
    assert all(torch.equal(outcome.state[name], tensor) for name, tensor in expected.state.items())
    said = [line for line in outcome.said.splitlines() if "page-lock" in line]
    assert len(said) == (limit == "1 MiB"), said
