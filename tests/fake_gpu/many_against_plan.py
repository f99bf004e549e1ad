"""`fit` on several fake GPUs, beside what `plan` says of each. Started by run.py, under the preloaded device.

DDP runs in as many processes as there are devices, and gloo carries their gradients over the host. FSDP2 runs in the
first process alone, with PyTorch's own fake process group: gloo copies what it scatters on the device, which NCCL does
not, and the fake group does what NCCL does, allocate nothing.
"""

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from apart import command, peaks
from fake_device import configure
from fit_against_plan import arguments_of, beside, outcome, plan
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from networks import ROOT, Run, strategy_runs
from torch import distributed
from torch.nn.parallel import distributed as parallel

from nanogpt_lit.cli.settings import quiet_lightning

LONGEST_S = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for shards and runs")
    parser.add_argument("--out", type=Path, required=True, help="the rows, written after each run")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these runs")
    options = parser.parse_args()
    text = options.work / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "nanogpt_lit").rglob("*.py"))))
    quiet_lightning()
    rows: list[dict[str, Any]] = []
    for run, strategy, devices in strategy_runs():
        if options.only and run.name not in options.only:
            continue
        name = {"ddp": "DDPStrategy", "fsdp2": "ModelParallelStrategy"}[strategy]
        backend = {"ddp": "gloo", "fsdp2": "fake"}[strategy]
        spread = [
            "--trainer.devices=1", f"--trainer.num_nodes={devices}", f"--trainer.strategy={name}",
            f"--trainer.strategy.process_group_backend={backend}",
        ]  # fmt: skip
        if strategy == "fsdp2":
            spread += [f"--trainer.strategy.data_parallel_size={devices}", "--trainer.strategy.tensor_parallel_size=1"]
        of_fit = [argument for argument in arguments_of(run, options.work, text) if "TextSamples" not in argument]
        of_fit = [*(argument for argument in of_fit if "callbacks.tokens" not in argument), *spread]
        planned = outcome(plan, run, of_fit, log=options.work / "plan.log")
        log = options.work / f"{run.name.replace(' ', '_')}_{strategy}_{devices}.log"
        measured = outcome(fit, run, of_fit, devices, backend, log=log)
        row = {"name": run.name, "strategy": strategy, "devices": devices, "backend": backend, "plan": planned}
        rows.append(row | {"fits": [{"lag": 0, "allocator": "native", **beside(planned, measured, "native")}]})
        print(run.name, strategy, devices, rows[-1]["fits"], flush=True)
        options.out.write_text(json.dumps(rows, indent=1))
    return 0


def fit(run: Run, arguments: list[str], devices: int, backend: str) -> dict[str, Any]:
    """The peaks of the first process, which stands for all: each has as much of everything, to a few rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = []
    for rank in range(1, devices if backend == "gloo" else 1):
        pid = os.fork()
        if pid == 0:
            os._exit(_fit(arguments, rank, devices, backend, port))
        others.append(pid)
    code = _fit(arguments, 0, devices, backend, port)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in others]
    if code or any(codes):
        raise SystemExit(f"exit codes {[code, *codes]}")
    return peaks()


def _fit(arguments: list[str], rank: int, devices: int, backend: str, port: int) -> int:
    signal.alarm(LONGEST_S)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(devices), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="fake",
        TORCHELASTIC_USE_AGENT_STORE="False",
    )  # fmt: skip
    configure(lag=0)
    with ExitStack() as stack:
        if backend == "fake":
            stack.enter_context(patch.object(distributed, "init_process_group", without("device_id")))
            stack.enter_context(patch.object(distributed, "new_group", without("backend")))
            alone = {"__enter__": lambda self: self, "__exit__": lambda *error: None, "__call__": lambda self: None}
            stack.enter_context(patch.multiple(_InfiniteBarrier, **alone))
        # It reads back a number that no kernel has computed.
        stack.enter_context(patch.object(parallel, "_verify_param_shape_across_processes", lambda *arguments: True))
        return command(["fit", *arguments], computes=False)


def without(name: str) -> Callable[..., Any]:
    """A function of torch.distributed that is not given this argument: of a device it would split groups off, and of
    gloo it would wait for the others, and the fake group can do neither."""
    function = getattr(distributed, {"device_id": "init_process_group", "backend": "new_group"}[name])
    return lambda *arguments, **more: function(*arguments, **{key: more[key] for key in more if key != name})


if __name__ == "__main__":
    sys.exit(main())
