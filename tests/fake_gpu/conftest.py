"""Tests that need the fake GPU: without it preloaded (run.py does that) there is nothing to collect here."""

from pathlib import Path

import fake_device
import pytest

collect_ignore_glob = [] if fake_device.is_here() else ["test_*.py"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Something to learn from: the project's own networks."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(file.read_text() for file in sorted((ROOT / "nanogpt_lit" / "gpt").glob("*.py"))))
    return path
