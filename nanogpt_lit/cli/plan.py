"""`plan`: its arguments, and what it prints. It imports torch late."""

import json
import signal
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.errors import UserError


def plan(arguments: list[str]) -> int:
    """`plan --config FILE`: whether a run fits a GPU, before it runs, on any machine."""
    parser = parser_of(
        "plan",
        "Tell whether a run fits a GPU, where its memory goes, and what to change if it does not fit. Needs no "
        "GPU and trains nothing. Takes every option of fit as well.",
        usage="--config FILE [--gpu NAME | --vram SIZE] [...] [--SECTION.KEY VALUE ...]",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", metavar="NAME", help="rtx2050 (the default where torch sees none), t4, a100, ...")
    which.add_argument("--vram", metavar="SIZE", help="the memory of any other GPU, such as 6GiB")
    parser.add_argument("--usable", metavar="SIZE", help="how much of it is free, if you have measured that")
    parser.add_argument("--os", choices=["linux", "windows"], help="what the GPU's machine runs (the stricter of both)")
    parser.add_argument("--desktop-on-gpu", action="store_true", help="the GPU draws the screen as well")
    parser.add_argument("--loop", choices=["lightning", "accelerate"], default="lightning", help="what drives the run")
    parser.add_argument("--devices", metavar="N", help="GPUs of each machine, as trainer.devices")
    parser.add_argument("--nodes", metavar="N", help="machines, as trainer.num_nodes")
    parser.add_argument("--strategy", metavar="NAME", help="ddp or fsdp2, as trainer.strategy (ddp)")
    parser.add_argument(
        "--interconnect", metavar="NAMES", help="between GPUs and between machines, such as nvlink4,8xndr"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the memory of one step, .svg or .png")
    parser.add_argument(
        "--largest", action="store_true", help="also find the largest that fits, as configured and with all techniques"
    )
    options, settings_of_fit = parser.parse_known_args(arguments[1:])
    strategy = "ModelParallelStrategy" if options.strategy == "fsdp2" else options.strategy
    for key, value in (("devices", options.devices), ("num_nodes", options.nodes), ("strategy", strategy)):
        settings_of_fit += [] if value is None else [f"--trainer.{key}={value}"]
    if not options.largest:
        return _plan(options, settings_of_fit)
    # The search takes as long as the plan: most of it runs beside it, in a process that imports torch meanwhile.
    with ProcessPoolExecutor(1, get_context("spawn")) as searcher:
        searcher.submit(_get_ready)
        return _plan(options, settings_of_fit, searcher)


def _get_ready() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is answered by the command's own process
    from nanogpt_lit.runtime.collector import quick_imports

    with quick_imports():
        import nanogpt_lit.plan.largest  # noqa: F401


def _plan(options: Namespace, settings_of_fit: list[str], searcher: ProcessPoolExecutor | None = None) -> int:
    from nanogpt_lit.runtime.collector import quick_imports

    with quick_imports():
        from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
        from nanogpt_lit.plan.budget import choose_budget
        from nanogpt_lit.plan.command import growth_of, plan_run
        from nanogpt_lit.plan.largest import largest_sizes, largest_that_fits
        from nanogpt_lit.plan.many import report_many
        from nanogpt_lit.plan.report import check_picture, report, report_largest, write_picture

    quiet_lightning()
    budget = choose_budget(options.gpu, options.vram, options.usable, options.os, options.desktop_on_gpu)
    if options.picture is not None:
        check_picture(options.picture)
    cli = SettingsCLI(args=settings_of_fit)
    if (teachers := cli.settings.get("teachers")) is not None:
        raise UserError(
            f"teachers={teachers} cannot be planned; plan the run with --teachers=null, and leave room for their "
            "weights and for their probabilities, tokens of a micro-batch x vocabulary x 4 bytes."
        )
    cli.find_beginning()
    title = ", ".join(str(path) for path in cli.config.get("config") or []) or "the defaults"
    lightning = options.loop == "lightning"
    sizes = None if searcher is None else searcher.submit(largest_sizes, cli.settings, budget, lightning)
    planned = plan_run(cli.settings, budget, lightning)
    if options.picture is not None:
        write_picture(planned, title, options.picture)
    several = planned.shape.devices > 1
    if several:
        step, steps = growth_of(cli.settings, planned, options.interconnect)
        tokens = step.tokens * planned.max_steps
    elif options.interconnect is not None:
        raise UserError(f"--interconnect={options.interconnect} is for several devices; --devices 8 are.")
    if options.json:
        answer = planned.as_json()
        if several:
            answer["step"] = step.as_json(tokens)
            answer["growth"] = [grown.as_json(tokens) for grown in steps]
        if sizes is not None:
            answer["largest"] = largest_that_fits(cli.settings, budget, lightning, sizes)
        print(json.dumps(answer, indent=1))
        return 0
    print(report(planned, title), flush=True)
    if several:
        print("\n" + report_many(steps, step, planned.shape.strategy, tokens), flush=True)
    if sizes is not None:
        print("\n" + report_largest(largest_that_fits(cli.settings, budget, lightning, sizes), planned))
    return 0
