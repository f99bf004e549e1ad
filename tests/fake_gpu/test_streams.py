"""PyTorch's sanitizer of streams over what is copied beside the computation: no tensor is read or written on one stream
while another may still write it."""

import threading

import pytest
import torch.utils.checkpoint
from apart import FailedError, apart, command
from short_run import PLACEMENTS, arguments

ON_THE_HOST = [name for name in PLACEMENTS if "on the host" in name or "streamed" in name]


def watched(options, waits=True):
    # Here, for its import alone puts hooks into the process, which mistake each other's exceptions for their own.
    from torch.cuda import _sanitizer

    if not waits:
        torch.cuda.Stream.wait_event = lambda stream, event: None
    _sanitizer.enable_cuda_sanitizer()
    # It counts without a lock what two threads launch.
    lock, count = threading.RLock(), _sanitizer.EventHandler._handle_kernel_launch

    def counted(*arguments):
        with lock:
            return count(*arguments)

    _sanitizer.EventHandler._handle_kernel_launch = counted
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):  # ends a recomputation by an exception in a kernel
        return command(["fit", *options, "--trainer.enable_checkpointing=false"], computes=False)


@pytest.mark.parametrize("placement", ON_THE_HOST)
def test_no_two_streams_meet_in_a_tensor(placement, text, tmp_path):
    options = arguments(tmp_path / "run", text, PLACEMENTS[placement])
    assert apart(watched, options, log=tmp_path / "log") == 0


def test_the_sanitizer_finds_a_copy_that_nobody_waits_for(text, tmp_path):
    options = arguments(tmp_path / "run", text, PLACEMENTS["optimizer on the host"])
    with pytest.raises(FailedError, match=r"UnsynchronizedAccessError|CUDASanitizerErrors"):
        apart(watched, options, False, log=tmp_path / "log")
