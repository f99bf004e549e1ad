"""The commands and scripts of a page, run in a small form, in a folder that has what a clone of the repository has."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_runs import started

from nanogpt_lit.__main__ import main

ROOT = Path(__file__).parents[1]

TINY_NETWORK = "--model.gpt.n_layer=1 --model.gpt.n_head=1 --model.gpt.n_embd=16 --data.block_size=16"
SHORT_RUN = "--data.batch_size=2 --trainer.max_steps=2 --trainer.limit_val_batches=2"
TINY_RUN = f"{TINY_NETWORK} {SHORT_RUN}"
SMALLER = {
    "nanogpt_lit fit --config configs/rtx2050.yaml": f"{TINY_RUN} --data.tokenizer=byte --model.gpt.vocab_size=257",
    "nanogpt_lit fit --config configs/quickstart.yaml --data.documents": f"{TINY_RUN} --data.block_size=256",
    "nanogpt_lit fit --config configs/smollm2_rtx2050.yaml": f"{SHORT_RUN} --data.block_size=64",
    "nanogpt_lit fit-accelerate": TINY_RUN,
    "nanogpt_lit fit": TINY_RUN,
    "nanogpt_lit prepare": TINY_NETWORK,
    "nanogpt_lit plan": "--model.gpt.n_layer=2 --data.block_size=64 --model.gpt.vocab_size=512 --data.tokenizer=byte",
    "nanogpt_lit tune": f"{TINY_RUN} --out=tuned.yaml",
    "nanogpt_lit forecast": TINY_RUN,
    "nanogpt_lit doctor": "",
    "nanogpt_lit keep-alive-unit": "",
    "nanogpt_lit init-config": "",
    "nanogpt_lit convert": "",
    "nanogpt_lit accelerate-config": "",
    "nanogpt_lit eval": "",
    "nanogpt_lit generate": "--max-new-tokens=4",
    "scripts/parity.py": "--steps=2 --precision 32-true --optimizer fused --processes 1 --skip-memory --out=p",
    "scripts/bench.py --start": "1",
    "scripts/bench.py": "--steps=2 --warm-up=1 --sizes 1M --variants plain",
    "scripts/bench_prepare.py": "--pairs=1 --source=my_texts",
    "scripts/bench_generate.py": "--tokens=8 --n-layer=1",
}
"""Options to add, by the start of what a command runs."""


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The language and the text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.M | re.S)


def commands_of(page: str, in_line: bool = True) -> list[str]:
    """The commands of its bash blocks, and those that stand in a line of text."""
    fenced = [line for language, text in blocks_of(page) if language == "bash" for line in text.splitlines()]
    lines = [*fenced, *(re.findall(r"`((?:python|pip) [^`]+)`", page) if in_line else ())]
    return [part.strip() for line in lines for part in line.split("&&") if line.strip() and not line.startswith("#")]


def clone(folder: Path) -> Path:
    """Fills the folder with what commands of a page may name, and with texts of the reader's own."""
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "a.txt").write_text("A bottle of beer on the wall.\n" * 200)
    talks = ({"prompt": f"{n} + 1?", "response": str(n + 1)} for n in range(200))
    (folder / "chats.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return folder


def words_of(command: str) -> list[str]:
    """The command in its small form, without python: ["-m", "nanogpt_lit", ...] or ["scripts/...", ...]."""
    what = re.sub(r"^python (-m )?", "", command)
    smaller = next((options for start, options in SMALLER.items() if what.startswith(start)), None)
    assert smaller is not None, f"no small form is known of `{command}`"
    return shlex.split(f"{command} {smaller}")[1:]


def run(command: str, folder: Path) -> str:
    """What it prints, run in a process of its own."""
    words = [sys.executable, *words_of(command)]
    answer = subprocess.run(words, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


def run_quickly(command: str, folder: Path) -> str:
    """What it prints, run in a process that has the imports behind it, which saves seconds; a script has not."""
    words = words_of(command)
    if words[:2] != ["-m", "nanogpt_lit"]:
        return run(command, folder)
    return printed_by(command, folder, main, words[2:])


def run_script(script: str, folder: Path, **environment: str) -> str:
    """What a script in Python prints, run in such a process too.

    environment: variables that it finds set
    """
    return printed_by(script, folder, run_text, script, environment)


def run_text(script: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    exec(compile(script, "script.py", "exec"), {"__name__": "__main__"})


def printed_by(shown: str, folder: Path, work: Callable[..., int | None], *arguments: Any) -> str:
    """What a process of work(*arguments) in that folder prints; shown: what is named where it fails"""
    process = started(print_to_files, folder, work, *arguments)
    process.join()
    printed, errors = ((folder / name).read_text(encoding="utf-8") for name in FILES)
    assert process.exitcode == 0, f"{shown}\n{printed}\n{errors}"
    return printed


FILES = "printed.txt", "errors.txt"


def print_to_files(folder: Path, work: Callable[..., int | None], *arguments: Any) -> None:
    os.chdir(folder)
    for stream, name in enumerate(FILES, 1):
        with Path(name).open("wb") as file:
            os.dup2(file.fileno(), stream)
    sys.exit(work(*arguments))
