"""The commands that need no Trainer: their arguments, and what they print. They import torch late."""

import argparse
import io
import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from nanogpt_lit.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as those of any other command."""

    def error(self, message: str) -> NoReturn:
        hint = "" if message.endswith(".") else f"; `{self.prog} --help` lists what there is."
        raise UserError(message + hint)


def program() -> str:
    """This program as it was called."""
    return "nanogpt-lit" if Path(sys.argv[0]).stem == "nanogpt-lit" else "python -m nanogpt_lit"


def parser_of(command: str, description: str, usage: str | None = None) -> OptionParser:
    """usage: what follows the command; None lists its options"""
    prog = f"{program()} {command}"
    usage = None if usage is None else f"{prog} {usage}"
    return OptionParser(prog=prog, usage=usage, description=description, allow_abbrev=False)


def generate(arguments: list[str]) -> int:
    """`generate --ckpt FILE --prompt TEXT`: streams text to standard output."""
    parser = parser_of(
        "generate",
        "Text from a checkpoint, streamed as it is made. The tokenizer is the checkpoint's own.",
    )
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="FILE", help="a checkpoint, or any model that convert reads"
    )
    parser.add_argument("--prompt", default="", help="how the text begins; empty begins a new document")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer each line of standard input, by the model's chat template, and --prompt before them",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="with --chat: what the conversation begins with")
    parser.add_argument("--max-new-tokens", type=int, default=500, metavar="N", help="tokens to make (500)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts to make (1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is the likeliest token, 1 as trained (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that together have P")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same text (1337)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    options = parser.parse_args(arguments[1:])
    if options.num_samples < 1:
        raise UserError(f"--num-samples={options.num_samples} must be at least 1.")
    if not abs(options.seed) < 2**63:
        raise UserError(f"--seed={options.seed} is more than 64 bits hold; 1337 works.")

    if options.chat and options.num_samples > 1:
        raise UserError(f"--num-samples={options.num_samples} is for texts; --chat gives one answer to each question.")
    if options.system and not options.chat:
        raise UserError(f"--system={options.system} is for --chat; --prompt begins a text.")

    from nanogpt_lit.checkpoint.convert import load_network
    from nanogpt_lit.gpt.generate import continue_text, printable
    from nanogpt_lit.runtime.machine import chosen_device

    gpt, tokenizer = load_network(options.ckpt, chosen_device(options.device))
    if options.chat:
        from nanogpt_lit.cli.chat import talk

        talk(gpt, tokenizer, options)
        return 0
    for sample in range(options.num_samples):
        pieces = continue_text(
            gpt,
            tokenizer,
            options.prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed + sample,
        )
        if sample:
            print("\n" + "-" * 20)
        sys.stdout.write(options.prompt)
        for piece in pieces:
            sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
        print()
    return 0


def plan(arguments: list[str]) -> int:
    """`plan --config FILE`: whether a run fits a GPU, before it runs, on any machine."""
    parser = parser_of(
        "plan",
        "Whether a run fits a GPU, where its memory goes, and what to change when it does not. Needs no "
        "GPU and trains nothing. Takes every option of fit besides these.",
        usage="--config FILE [--gpu NAME | --vram SIZE] [...] [--SECTION.KEY VALUE ...]",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", metavar="NAME", help="rtx2050 (the default where torch sees none), t4, a100, ...")
    which.add_argument("--vram", metavar="SIZE", help="the memory of another, such as 6GiB")
    parser.add_argument("--usable", metavar="SIZE", help="how much of it you found free, in place of an estimate")
    parser.add_argument("--os", choices=["linux", "windows"], help="what the GPU's machine runs (either)")
    parser.add_argument("--desktop-on-gpu", action="store_true", help="the screen is drawn by this GPU")
    parser.add_argument("--loop", choices=["lightning", "accelerate"], default="lightning", help="what drives the run")
    parser.add_argument("--devices", metavar="N", help="GPUs of each machine, as trainer.devices")
    parser.add_argument("--nodes", metavar="N", help="machines, as trainer.num_nodes")
    parser.add_argument("--strategy", metavar="NAME", help="ddp or fsdp2, as trainer.strategy (ddp)")
    parser.add_argument(
        "--interconnect", metavar="NAMES", help="of several GPUs, within and between machines: nvlink4,8xndr"
    )
    parser.add_argument("--json", action="store_true", help="print the plan for a program")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the memory of one step, .svg or .png")
    parser.add_argument(
        "--largest", action="store_true", help="also find the largest that fits, as configured and with all techniques"
    )
    options, settings_of_fit = parser.parse_known_args(arguments[1:])
    strategy = "ModelParallelStrategy" if options.strategy == "fsdp2" else options.strategy
    for key, value in (("devices", options.devices), ("num_nodes", options.nodes), ("strategy", strategy)):
        settings_of_fit += [] if value is None else [f"--trainer.{key}={value}"]

    from nanogpt_lit.runtime.collector import quick_imports

    with quick_imports():
        from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
        from nanogpt_lit.plan.budget import choose_budget
        from nanogpt_lit.plan.command import growth_of, largest_that_fits, plan_run
        from nanogpt_lit.plan.many import report_many
        from nanogpt_lit.plan.report import check_picture, report, report_largest, write_picture

    quiet_lightning()
    budget = choose_budget(options.gpu, options.vram, options.usable, options.os, options.desktop_on_gpu)
    if options.picture is not None:
        check_picture(options.picture)
    cli = SettingsCLI(args=settings_of_fit)
    cli.find_beginning()
    title = ", ".join(str(path) for path in cli.config.get("config") or []) or "the defaults"
    planned = plan_run(cli.settings, budget, lightning=options.loop == "lightning")
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
        if options.largest:
            answer["largest"] = largest_that_fits(cli.settings, planned, lightning=options.loop == "lightning")
        print(json.dumps(answer, indent=1))
        return 0
    print(report(planned, title), flush=True)
    if several:
        print("\n" + report_many(steps, step, planned.shape.strategy, tokens), flush=True)
    if options.largest:
        found = largest_that_fits(cli.settings, planned, lightning=options.loop == "lightning")
        print("\n" + report_largest(found, planned))
    return 0


def accelerate_config(arguments: list[str]) -> int:
    """`accelerate-config --from FILE` or `--to-trainer FILE`: prints the other framework's file for the same set-up."""
    parser = parser_of(
        "accelerate-config",
        "Translates between a YAML of fit and the file of `accelerate config`. What has no counterpart is "
        "listed at the end, as comments, with what to do about it.",
        usage="(--from FILE [--option.of.fit VALUE ...] | --to-trainer FILE)",
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="yaml", metavar="FILE", help="a YAML of fit; prints accelerate's file")
    direction.add_argument(
        "--to-trainer", type=Path, metavar="FILE", help="accelerate's file; prints the trainer section"
    )
    options, settings_of_fit = parser.parse_known_args(arguments[1:])

    from nanogpt_lit.accelerate_config.accelerate_file import read_accelerate_file
    from nanogpt_lit.accelerate_config.from_accelerate import to_trainer
    from nanogpt_lit.accelerate_config.into_accelerate import into_accelerate

    if options.to_trainer is not None:
        if settings_of_fit:
            parser.error(f"--to-trainer takes no {settings_of_fit[0]}")
        translation = to_trainer(read_accelerate_file(options.to_trainer))
        print(translation.text("Without a counterpart in the trainer section:"), end="")
        return 0

    import yaml  # type: ignore[import-untyped]

    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning

    quiet_lightning()
    cli = SettingsCLI(args=[f"--config={options.yaml}", *settings_of_fit])
    whole, changed = (yaml.safe_load(cli.parser.dump(cli.config, skip_default=skip)) for skip in (False, True))
    model = whole["model"]
    translation = into_accelerate(
        whole["trainer"], changed.get("trainer", {}), model["compile"], os.environ, model["network"]
    )
    print(translation.text("Without a counterpart in accelerate's file:"), end="")
    return 0


def convert(arguments: list[str]) -> int:
    """`convert FROM TO`: a checkpoint from or to a format of others."""
    parser = parser_of(
        "convert",
        "Writes the checkpoint FROM anew as TO. FROM is a checkpoint of nanogpt_lit, a .ckpt of Lightning's Trainer, a "
        "folder of accelerate's save_state, a Hugging Face folder of GPT-2, Llama or Qwen3, a GGUF file of llama.cpp, "
        "nanoGPT's ckpt.pt, or a model of llm.c; which, is seen from its content.",
    )
    parser.add_argument("source", metavar="FROM", help="a file, a folder, or hf:OWNER/NAME[@REVISION] of the hub")
    parser.add_argument(
        "target",
        type=Path,
        metavar="TO",
        help="FILE.safetensors for nanogpt_lit (all loops), FILE.ckpt for Lightning, a name without suffix for "
        "accelerate's load_state; each with the whole state of the run",
    )
    parser.add_argument(
        "--to",
        choices=["hf", "gguf", "nanogpt"],
        help="hf: a folder for transformers' AutoModelForCausalLM and AutoTokenizer. gguf: FILE.gguf for llama.cpp, "
        "with a Modelfile for Ollama beside it. nanogpt: FILE.pt for nanoGPT's train.py and sample.py, of a GPT-2",
    )
    parser.add_argument("--dtype", choices=["f32", "f16", "bf16", "q8_0"], help="of the matrices in FILE.gguf (f32)")
    parser.add_argument("--tokenizer", metavar="NAME", help="gpt2, byte or FILE.tiktoken, for a FROM that holds none")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the YAML of the run, and more options of fit, for a FROM of your own loop (accelerate's save_state, "
        "Lightning's Trainer), which does not say what network and data it belongs to",
    )
    options, settings_of_fit = parser.parse_known_args(arguments[1:])
    if settings_of_fit and options.config is None:
        parser.error(f"unrecognized arguments: {' '.join(settings_of_fit)}")

    from nanogpt_lit.checkpoint.convert import convert, fetched

    source, pinned = fetched(options.source)
    if pinned != options.source:
        print(f"{options.source} is {pinned} today")
    described = None
    if options.config is not None:
        from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning

        quiet_lightning()
        described = SettingsCLI(args=[f"--config={options.config}", *settings_of_fit]).described()
    for line in convert(source, options.target, options.to, options.dtype, options.tokenizer, described):
        print(line)
    return 0


def keep_alive_unit(arguments: list[str]) -> int:
    """`keep-alive-unit --config FILE`: prints what starts `fit --keep-alive` again after a reboot."""
    parser = parser_of(
        "keep-alive-unit",
        "Prints a unit for systemd, or a task for the Windows Task Scheduler, which starts "
        "`fit --keep-alive` with these options in this folder after a reboot. Its beginning says how to install it.",
        usage="[--systemd | --task-scheduler] [--option.of.fit VALUE ...]",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--systemd", action="store_true", help="the default everywhere but on Windows")
    kind.add_argument("--task-scheduler", action="store_true", help="the default on Windows")
    options, settings_of_fit = parser.parse_known_args(arguments[1:])

    from nanogpt_lit.supervise.supervisor import supervised_fit
    from nanogpt_lit.supervise.units import scheduled_task, systemd_unit

    command = supervised_fit(settings_of_fit)
    as_task = options.task_scheduler or (os.name == "nt" and not options.systemd)
    print((scheduled_task if as_task else systemd_unit)(command, Path.cwd()), end="")
    return 0


def doctor(arguments: list[str]) -> int:
    """`doctor [--run FOLDER] [--config FILE]`: one line per check. Returns 1 when something is wrong."""
    parser = parser_of(
        "doctor",
        "Checks this machine, and a run, and says what to do. Each line begins with ok, with look (it may "
        "cost time or comfort) or with wrong (it fails, or will). Exits with 1 when something is wrong.",
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="compare its shards and checkpoints, byte by byte")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the same for the run of a YAML of fit")
    parser.add_argument("--json", action="store_true", help="print a list for a program")
    options = parser.parse_args(arguments[1:])

    from nanogpt_lit.doctor.examination import examine

    findings = []
    for finding in examine(options.run, options.config, page_locked_mib, remarks_on):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return 1 if any(finding.level == "wrong" for finding in findings) else 0


def remarks_on(config: Path) -> list[str]:
    """Lines that fit prints about a YAML before it makes anything. Raises UserError as fit does."""
    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
    from nanogpt_lit.errors import NothingToDo

    quiet_lightning()
    said = io.StringIO()
    with redirect_stdout(said):
        cli = SettingsCLI(args=[f"--config={config}", "--init_from=null"])  # which may be a gigabyte to fetch
        try:
            cli.check_settings()
        except NothingToDo as done:
            print(done)
    return said.getvalue().splitlines()


def page_locked_mib(config: Path) -> float:
    """Host memory that the run of a YAML page-locks, as `plan` says."""
    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
    from nanogpt_lit.plan.budget import choose_budget
    from nanogpt_lit.plan.command import own_rung, plan_rung

    quiet_lightning()
    settings = SettingsCLI(args=[f"--config={config}"]).settings
    return plan_rung(settings, own_rung(settings), choose_budget().gpu).page_locked_mib


def prepare(arguments: list[str]) -> int:
    """`prepare --config FILE`: what fit does first, by itself."""
    if set(arguments[1:]) & {"-h", "--help"}:
        print(
            f"usage: {program()} prepare --config FILE [--data.source TEXT] [--data.KEY VALUE ...]\n\n"
            "Turns the text of data.source into token shards in data.shards_dir, as fit does when they are missing.\n"
            "Takes every option of fit, so that both read the same YAML; `fit --help` lists them."
        )
        return 0

    from nanogpt_lit.cli.fit import prepare

    return prepare(arguments[1:])
