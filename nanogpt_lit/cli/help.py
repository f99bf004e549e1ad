"""The help of a command that reads a YAML: in short what users set, and with `--help all` every option."""

import argparse
import re
import shutil
import textwrap

from nanogpt_lit.cli.options import program
from nanogpt_lit.runtime.launch import KEEP_ALIVE
from nanogpt_lit.untrusted.imports import TRUST

SHORT = {
    "data": ("source", "tokenizer", "block_size", "batch_size", "val_fraction"),
    "model": ("network", "gpt.n_layer", "gpt.n_head", "gpt.n_embd", "gpt.dropout", "compile"),
    "model.optim": ("lr", "weight_decay", "matrices"),
    "model.schedule": ("warmup_steps", "decay"),
    "model.memory": ("loss_chunk_tokens", "recompute", "optimizer_state", "weights"),
    "": ("init_from", "resume", "ckpt_path", "early_stopping_patience", "checkpoint_every_minutes", "seed_everything"),
    "trainer": (
        "max_steps", "max_time", "default_root_dir", "accelerator", "devices", "precision", "accumulate_grad_batches",
        "gradient_clip_val", "val_check_interval", "limit_val_batches", "log_every_n_steps", "deterministic",
    ),
}  # fmt: skip
"""Options that users set, by section, the most frequent first."""

WORDS = {
    "config": "A YAML, or a name that init-config lists; the last of several wins.",
    "print_config": "Print the whole configuration instead of training.",
    "ckpt_path": "A checkpoint: fit continues its run; validate and test measure it.",
    "seed_everything": "Seed of a new network's weights and of dropout.",
    "trainer.max_steps": "Optimizer steps to train.",
    "trainer.max_time": "Save and stop after this time, DD:HH:MM:SS.",
    "trainer.default_root_dir": "Folder of the runs, and of shards if data.shards_dir is not set.",
    "trainer.accelerator": "cpu, gpu or mps; auto takes a GPU if there is one.",
    "trainer.devices": "Number of GPUs, or of processes on CPUs; auto is all GPUs, or one process.",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed.",
    "trainer.accumulate_grad_batches": "Micro-batches per optimizer step.",
    "trainer.gradient_clip_val": "Clip the gradients to this norm; null does not clip.",
    "trainer.val_check_interval": "Micro-batches from one validation to the next.",
    "trainer.limit_val_batches": "Micro-batches of a validation, of all processes, or a share; null takes all, 0 none.",
    "trainer.log_every_n_steps": "Optimizer steps from one point of a curve to the next.",
    "trainer.deterministic": "true: repeated runs give the same bits on a GPU too, but take longer.",
}
"""Descriptions in place of Lightning's."""

MORE = {
    KEEP_ALIVE: "Of fit alone: restart from the newest checkpoint after a crash.",
    f"{TRUST} PACKAGE": "Allow the configuration to name classes of PACKAGE, whose code then runs.",
}
"""Options that are taken from the command line before the parser reads it."""


def describe(parser: argparse.ArgumentParser) -> None:
    """Give options of Lightning our words, the usage one line, and our own sections the first place."""
    for action in parser._actions:
        action.help = WORDS.get(action.dest, action.help)
    parser.usage = f"{called(parser)} [--config FILE] [--SECTION.KEY VALUE ...]"
    parser.description = None
    groups = parser._action_groups
    # Stable: the order of the others, which is that of the settings, is kept.
    groups.sort(key=lambda group: rank(next((action.dest for action in group._group_actions), "")))


def rank(name: str) -> int:
    """The place of the section that an option belongs to."""
    if name in ("help", ""):
        return 0
    section = name.partition(".")[0]
    return {"data": 1, "model": 2, "trainer": 4}.get(section, 3)


def called(parser: argparse.ArgumentParser) -> str:
    """The command as it was called; the parser's own name begins with the file that Python runs."""
    return f"{program()} {parser.prog.rpartition(' ')[2]}"


def short(parser: argparse.ArgumentParser) -> str:
    options = {action.dest: action for action in parser._actions}
    rows = {"": [("-c, --config FILE", WORDS["config"]), ("--print_config", WORDS["print_config"])]}
    for section, names in SHORT.items():
        title = section or "besides training"
        keys = [f"{section}.{name}" if section else name for name in names]
        rows[title] = [(f"--{key}", sentence(options[key])) for key in keys]
        if not section:
            rows[title] += MORE.items()
    lines = [f"usage: {parser.usage}"]
    for title, options_of_section in rows.items():
        lines += ["", *([f"{title}:"] if title else [])]
        for option, said in options_of_section:
            lines += entry(option, said)
    lines += ["", f"These are the options that are set most often; `{called(parser)} --help all` has every option.", ""]
    return "\n".join(lines)


def beside() -> str:
    """The options of MORE, behind those that the parser knows."""
    return "\n".join(line for option, said in MORE.items() for line in entry(option, said)) + "\n"


def sentence(action: argparse.Action) -> str:
    """The first sentence of an option's description, and its default."""
    said = re.split(r"(?<=\.) (?=[A-Z(])", " ".join((action.help or "").split()))[0]
    default = str(action.default).lower() if isinstance(action.default, bool) else action.default
    return said if default is None else f"{said} ({default})"


def entry(option: str, said: str) -> list[str]:
    indent = 36
    width = max(60, min(120, shutil.get_terminal_size().columns))
    first = f"  {option:<{indent - 2}}"
    return textwrap.wrap(said, width, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False)
