"""Perplexity on TinyStories after two hours of a CPU, by the protocol of FlashLM's table, beside a plain GPT-2.

    python scripts/tinystories.py --source TinyStoriesV2-GPT4-train.txt --valid TinyStoriesV2-GPT4-valid.txt

The protocol (github.com/changcheng967/FlashLM, v10): every line of 20 characters or more is a document, others are left
out; byte pairs, a vocabulary of 4,096; windows of 256 tokens; four virtual CPUs; two hours by the clock, which begin
when the tokens are there.

Each recipe is one `fit` of configs/tinystories_cpu.yaml, compilation, validations and checkpoints included. A schedule
has to know its end, so a short `fit` of each measures its speed first, and the steps are those that the minutes have
room for; trainer.max_time ends what takes longer. "nanogpt" is a GPT-2 of the same sizes with AdamW and a cosine. A
run of fewer tokens than the YAML's has a higher learning rate, of more a lower one.
Perplexity and bits per byte are of the last weights over the whole validation text, in float32: nothing is chosen on
it. Perplexities compare within one vocabulary alone; bits per byte do not depend on it.

Without --valid a twentieth of the lines is held out, in runs of 200. What the record has already is not measured again.
All other options are those of fit: --model.compile=false saves a minute, which counts in a run of few.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import yaml  # type: ignore[import-untyped]
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanogpt_lit.checkpoint.run_file import description_in
from nanogpt_lit.data.sources import open_source
from nanogpt_lit.runtime.durable import durable_file
from nanogpt_lit.runtime.machine import hardware, precision_remark
from nanogpt_lit.tune.search import HORIZON
from nanogpt_lit.tune.trials import NANOGPT, options_of

CONFIG = Path(__file__).parents[1] / "configs" / "tinystories_cpu.yaml"
RECIPES = ("modern", "nanogpt")
YAML = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
RATES = {"modern": YAML["model"]["optim"]["lr"], "nanogpt": 1e-3}
"""Of a run of the YAML's length; nanoGPT has the second for networks this small (config/train_shakespeare_char.py)."""
SHORTEST_LINE = 20
HELD_OUT_RUN, HELD_OUT_SHARE = 200, 20
SPEED_STEPS = 40
VALIDATIONS = 4
USED = 0.97
"""Share of the time that is planned; the rest is for a machine that is not always equally fast."""
PUBLISHED = {"CPUFlow v8, no attention": 9.30, "v10 FSP, attention": 10.24}
"""FlashLM's perplexities of the two, the lowest of each run's evaluations, on 5,120 and 20,480 tokens. The first run
began with the weights of another one of two hours."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the text to train on, as data.source")
    parser.add_argument("--valid", type=Path, help="the text to measure on")
    parser.add_argument("--minutes", type=float, default=120, help="of each run (120)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--work", type=Path, default=Path("runs/tinystories"), help="where texts and runs are kept")
    parser.add_argument("--json", type=Path, help="the record (record.json in --work)")
    args, options = parser.parse_known_args(arguments)
    path = args.json or args.work / "record.json"
    asked: dict[str, Any] = {"source": args.source.name, "minutes": args.minutes, "options": options}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key, value in asked.items() if record[key] != value]:
            parser.error(f"{path} is of another {' and '.join(differing)}; name another --json.")
    else:
        precision = "32-true" if precision_remark("32-true", "cpu") is None else "bf16-mixed"
        record = {"hardware": hardware("lightning"), **asked, "precision": precision, "recipes": {}}

    training, validation = write_texts(args.source, args.valid, args.work)
    common = [f"--data.source={training}", f"--data.shards_dir={args.work / 'shards'}"]
    common += ["--trainer.accelerator=cpu", f"--trainer.precision={record['precision']}"]
    run_command("prepare", f"--config={CONFIG}", *common, *options)
    for recipe in args.recipes:  # all speeds before the first run, as close together as can be
        if recipe not in record["recipes"]:
            command = [*common, *recipe_options(recipe), *options]
            record["recipes"][recipe] = speed(command, args.work / recipe / "speed")
            save(record, path)
    for recipe in args.recipes:
        if "perplexity" not in (found := record["recipes"][recipe]):
            command = [*common, *recipe_options(recipe), *length_options(found, 60 * args.minutes, RATES[recipe])]
            command += options
            found |= trained(command, args.work / recipe / "run", validation)
            save(record, path)
    print(f"\n{record['hardware']}\n{table(record)}")
    if args.source.name.startswith("TinyStoriesV2"):
        print("\n".join(f"FlashLM, {name}: {perplexity:.2f}" for name, perplexity in PUBLISHED.items()))


def write_texts(source: Path, valid: Path | None, work: Path) -> tuple[Path, Path]:
    """The two texts as JSON Lines, a line of theirs a document; made again where a source is newer."""
    targets = work / "train.jsonl", work / "valid.jsonl"
    made = min((target.stat().st_mtime if target.exists() else 0.0) for target in targets)
    if made <= max(path.stat().st_mtime for path in (source, valid) if path is not None):
        with durable_file(targets[0]) as to_train, durable_file(targets[1]) as to_validate:
            for number, line in enumerate(lines_of(source)):
                held_out = valid is None and number // HELD_OUT_RUN % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
                write_line(to_validate if held_out else to_train, line)
            for line in lines_of(valid) if valid is not None else ():
                write_line(to_validate, line)
    return targets


def lines_of(path: Path) -> Iterator[str]:
    """Those of SHORTEST_LINE characters or more, without white space at their ends."""
    for document in open_source(str(path)).documents():
        rest = ""
        for piece in document.pieces():
            *lines, rest = (rest + piece).split("\n")
            yield from (line.strip() for line in lines if len(line.strip()) >= SHORTEST_LINE)
        if len(rest.strip()) >= SHORTEST_LINE:
            yield rest.strip()


def write_line(file: Any, line: str) -> None:
    file.write(json.dumps({"text": line}, ensure_ascii=False).encode() + b"\n")


def recipe_options(recipe: str) -> list[str]:
    """Options of fit that make the YAML's recipe another one, at the YAML's sizes."""
    if recipe == "modern":
        return []
    sizes = YAML["model"]["llama"]
    options = {f"model.gpt.{size}": sizes[size] for size in ("n_layer", "n_head", "n_embd")}
    options |= {f"model.{section}.{key}": value for section, key, value in options_of(NANOGPT)}
    options["model.network"] = NANOGPT["network"]
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def speed(options: list[str], folder: Path) -> dict[str, float]:
    """Tokens per second of a short run, and the seconds of its command that its steps did not take."""
    ends = [f"--trainer.max_steps={SPEED_STEPS}", f"--trainer.val_check_interval={SPEED_STEPS}"]
    seconds, run = fit([*options, *ends], folder)
    events = EventAccumulator(str(run))
    events.Reload()
    _, *speeds = (event.value for event in events.Scalars("throughput/tokens_per_s"))  # the first waits for a compiler
    step_tokens = description_in(run / "checkpoints" / "last.safetensors")["tokens"] / SPEED_STEPS
    return {
        "tokens_per_s": median(speeds),
        "step_tokens": step_tokens,
        "other_s": seconds - SPEED_STEPS * step_tokens / median(speeds),
    }


def trained(options: list[str], folder: Path, validation: Path) -> dict[str, float]:
    """Steps and seconds of a run, and what its last weights say of the validation text."""
    seconds, run = fit(options, folder)
    last = run / "checkpoints" / "last.safetensors"
    said = run_command("eval", "--ckpt", str(last), "--data", str(validation), "--device=cpu", "--json")
    (found,) = json.loads(said).values()
    stored = description_in(last)
    of_text = {key.replace(" ", "_"): found[key] for key in ("perplexity", "bits per byte")}
    return {"steps": stored["step"], "tokens": stored["tokens"], "seconds": seconds, **of_text}


def length_options(measured: dict[str, float], seconds: float, rate: float) -> list[str]:
    """The steps that end in time, in as many parts as there are validations, and what follows from them.

    rate: the learning rate of a run of the YAML's length
    """
    steps = (USED * seconds - measured["other_s"]) * measured["tokens_per_s"] / measured["step_tokens"]
    part = int(steps / VALIDATIONS)
    if part < 1:
        sys.exit(
            f"--minutes={seconds / 60:g} is too short: {measured['other_s']:.0f} s pass outside of the steps, and "
            f"{measured['tokens_per_s']:,.0f} tokens are learned in one second."
        )
    max_steps = VALIDATIONS * part
    yaml_tokens = YAML["trainer"]["max_steps"] * YAML["data"]["batch_size"] * YAML["data"]["block_size"]
    lr = rate * (yaml_tokens / (max_steps * measured["step_tokens"])) ** HORIZON
    whole = round(seconds)
    latest = f"{whole // 86400:02}:{whole // 3600 % 24:02}:{whole // 60 % 60:02}:{whole % 60:02}"
    return [
        f"--trainer.max_steps={max_steps}",
        f"--trainer.val_check_interval={part}",
        f"--trainer.max_time={latest}",
        f"--model.optim.lr={lr:.2g}",
        f"--model.schedule.warmup_steps={min(YAML['model']['schedule']['warmup_steps'], max_steps // 20)}",
    ]


def fit(options: list[str], folder: Path) -> tuple[float, Path]:
    """Seconds of the command by the clock, and the folder of its run."""
    before = set(folder.glob("version_*"))
    with tempfile.TemporaryDirectory() as nothing_compiled:
        started_s = time.perf_counter()
        words = [f"--config={CONFIG}", f"--trainer.default_root_dir={folder}", *options]
        run_command("fit", *words, TORCHINDUCTOR_CACHE_DIR=nothing_compiled)
        seconds = time.perf_counter() - started_s
    (run,) = set(folder.glob("version_*")) - before
    return seconds, run


def run_command(*words: str, **environment: str) -> str:
    """What `eval` prints; the others print for themselves."""
    command = [sys.executable, "-m", "nanogpt_lit", *words]
    reads = subprocess.PIPE if words[0] == "eval" else None
    done = subprocess.run(command, stdout=reads, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return done.stdout or ""


def save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| recipe | perplexity | bits per byte | steps | tokens | seconds |", "|---|---|---|---|---|---|"]
    for recipe, of in record["recipes"].items():
        if "perplexity" in of:
            losses = f"{of['perplexity']:.2f} | {of['bits_per_byte']:.3f}"
            rows.append(f"| {recipe} | {losses} | {of['steps']:,} | {of['tokens']:,} | {of['seconds']:,.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
