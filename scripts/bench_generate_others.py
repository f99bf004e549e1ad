"""Time per generated token: ours, transformers' `generate` and llama.cpp's server, with the same weights.

    python scripts/bench_generate_others.py --json docs/bench_generate_others.json

A GPT-2 with random weights is written by `convert` for transformers and for llama.cpp, in float32 or bfloat16. The
programs take turns, so that a busy machine slows all of them: a turn is a prompt and some new tokens, the first of
which waits for the prompt and is not counted. All are greedy, one sequence at a time. llama.cpp is the package
xllamacpp, left out where that is missing; it times itself, sampling included. Its cache is float16 by default, ours
and transformers' are of the precision of the weights.
"""

import argparse
import importlib.util
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nanogpt_lit.checkpoint.convert import convert, load_network
from nanogpt_lit.checkpoint.exchange import new_run
from nanogpt_lit.checkpoint.run_file import save_run
from nanogpt_lit.data.tokenizer import ByteTokenizer, Tokenizer, gpt2_tokenizer
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.runtime.machine import hardware

Turn = Callable[[list[int], int], float]
"""(prompt, new tokens) -> milliseconds per token, without the first"""

SIZES: dict[str, tuple[GPTConfig, Callable[[], Tokenizer]]] = {
    "11M": (GPTConfig(n_layer=6, n_head=6, n_embd=384), ByteTokenizer),
    "124M": (GPTConfig(), gpt2_tokenizer),
}
DTYPES = {"float32": "f32", "bfloat16": "bf16"}
"""Precisions, and what convert calls them."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompt", nargs="+", type=int, default=[16, 900], metavar="N", help="its tokens (16 and 900)")
    parser.add_argument("--tokens", type=int, default=32, help="new ones of each turn (32)")
    parser.add_argument("--turns", type=int, default=4, help="of each program (4)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_generate_others"), help="where the models are")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(arguments)
    packages = ["transformers"] + ["xllamacpp"] * has_llama_cpp()
    record: dict[str, Any] = {"hardware": hardware(*packages), "tokens": args.tokens, "turns": args.turns, "runs": []}
    print(record["hardware"])
    for size, precision in itertools.product(args.sizes, args.precision):
        folder = written(size, args.work)
        for threads in args.threads:
            torch.set_num_threads(threads)
            turns = {name: program(folder, precision, threads) for name, program in PROGRAMS.items()}
            for length in args.prompt:
                ms = side_by_side(turns, length, args.tokens, args.turns)
                run = {"size": size, "precision": precision, "threads": threads, "prompt": length, "ms": ms}
                record["runs"].append(run)
                print(row(run), flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def row(run: dict[str, Any]) -> str:
    """Of a table in Markdown."""
    cells = [f"{run['ms'][name]:.1f}" if name in run["ms"] else "-" for name in PROGRAMS]
    of = f"{run['size']}, {run['precision']}, {run['threads']} thread{'s' * (run['threads'] > 1)}"
    return f"| {of}, after {run['prompt']} tokens | {' | '.join(cells)} |"


def side_by_side(turns: dict[str, Turn | None], length: int, tokens: int, count: int) -> dict[str, float]:
    """Milliseconds per token, the median of each program's turns; one more comes first, for what is set up once."""
    prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    here = {name: turn for name, turn in turns.items() if turn is not None}
    found = [{name: turn(prompt, tokens) for name, turn in here.items()} for _ in range(count + 1)][1:]
    return {name: median(of[name] for of in found) for name in here}


def written(size: str, work: Path) -> Path:
    """The folder with the network of that size, in every format."""
    config, tokenizer_of = SIZES[size]
    folder = work / size
    if not (folder / "f32" / "model.gguf").exists():
        torch.manual_seed(0)
        tokenizer = tokenizer_of()
        gpt = GPT(replace(config, vocab_size=tokenizer.vocab_size))
        ours = folder / "ours.safetensors"
        save_run(ours, new_run(ours, gpt.state_dict(), gpt.config, tokenizer))
        convert(ours, folder / "hf", to="hf")
        for dtype in ("bf16", "f32"):
            (folder / dtype).mkdir()
            convert(ours, folder / dtype / "model.gguf", dtype=dtype)
    return folder


def ours(folder: Path, precision: str, threads: int) -> Turn:
    gpt = load_network(folder / "ours.safetensors")[0].to(getattr(torch, precision))

    def turn(prompt: list[int], tokens: int) -> float:
        stream = generate(gpt, torch.tensor([prompt]), tokens, temperature=0)
        return between([time.perf_counter() for _ in stream])

    return turn


def transformers(folder: Path, precision: str, threads: int) -> Turn:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=getattr(torch, precision)).eval()

    def turn(prompt: list[int], tokens: int) -> float:
        times = Times()
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=times,
        )
        return between(times.at_s[1:])  # the prompt comes first

    return turn


def between(at_s: list[float]) -> float:
    """Milliseconds from each time to the next, their mean."""
    return 1e3 * (at_s[-1] - at_s[0]) / (len(at_s) - 1)


class Times:
    """A streamer of transformers that notes when something comes."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def llama_cpp(folder: Path, precision: str, threads: int) -> Turn | None:
    if not has_llama_cpp():
        return None
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / DTYPES[precision] / "model.gguf")
    settings.n_ctx = 1024
    settings.n_gpu_layers = 0
    settings.n_parallel = 1
    settings.verbosity = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)

    def turn(prompt: list[int], tokens: int) -> float:
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        said = server.handle_completions(asked)
        timings = (said if isinstance(said, dict) else json.loads(said))["timings"]
        # Its clock starts at the first token, which it counts.
        return timings["predicted_ms"] / (timings["predicted_n"] - 1)

    return turn


PROGRAMS: dict[str, Callable[[Path, str, int], Turn | None]] = {
    "ours": ours,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    main()
