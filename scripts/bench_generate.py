"""Time per generated token with and without the key-value cache, on random weights.

    python scripts/bench_generate.py --tokens 1000 --json docs/bench_generate.json

The two loops take turns, 100 tokens each, in one process, so that a busy machine slows both. Without the cache a token
costs a pass over the whole text so far; with it a pass over one token, plus attention's reading of the keys and values
so far, so it grows by about length / (6 n_embd) over the weights' own cost.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.runtime.machine import hardware

BUCKET_TOKENS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000, help="new tokens after a prompt of one (default 1000)")
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-head", type=int, default=6)
    parser.add_argument("--n-embd", type=int, default=384)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads for torch (default: its own choice)")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    gpt = GPT(
        GPTConfig(
            block_size=args.block_size,
            vocab_size=args.vocab_size,
            n_layer=args.n_layer,
            n_head=args.n_head,
            n_embd=args.n_embd,
        )
    )
    millions = gpt.parameter_count(non_embedding=False) / 1e6
    print(f"{hardware()}\n{millions:.1f}M parameters, block {args.block_size}, float32, batch 1\n")
    print("new tokens     cached ms/token   uncached ms/token   ratio")

    prompt = torch.zeros(1, 1, dtype=torch.int64)
    # Greedy, so that both write the same text. The first tokens pay for one-time setup and are drawn elsewhere.
    for use_cache in (True, False):
        list(generate(gpt, prompt, 20, temperature=0, use_cache=use_cache))
    cached = generate(gpt, prompt, args.tokens, temperature=0)
    uncached = generate(gpt, prompt, args.tokens, temperature=0, use_cache=False)
    buckets = []
    for first in range(0, args.tokens, BUCKET_TOKENS):
        fast, slow = timed(cached), timed(uncached)
        # Medians: a busy machine interrupts some tokens, and those say nothing about the loop.
        cached_ms, uncached_ms = 1e3 * median(fast), 1e3 * median(slow)
        last = first + len(fast) - 1
        buckets.append({"first": first, "last": last, "cached_ms": cached_ms, "uncached_ms": uncached_ms})
        ratio = uncached_ms / cached_ms
        print(f"{first:5d} - {last:<5d}  {cached_ms:15.2f}   {uncached_ms:17.2f}   {ratio:5.1f}", flush=True)
    cached_s, uncached_s = (
        sum(bucket[key] * (bucket["last"] - bucket["first"] + 1) for bucket in buckets) / 1e3
        for key in ("cached_ms", "uncached_ms")
    )
    growth = buckets[-1]["cached_ms"] / buckets[0]["cached_ms"]
    print(
        f"\n{args.tokens} tokens: {cached_s:.1f} s cached, {uncached_s:.1f} s uncached, {uncached_s / cached_s:.1f} x"
    )
    print(f"cached, last bucket over first: {growth:.2f}")
    if args.json is not None:
        result = {
            "hardware": hardware(),
            "model": vars(gpt.config),
            "parameters": gpt.parameter_count(non_embedding=False),
            "tokens": args.tokens,
            "cached_s": cached_s,
            "uncached_s": uncached_s,
            "ratio": uncached_s / cached_s,
            "cached_last_over_first": growth,
            "buckets": buckets,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def timed(stream: Iterator[Tensor]) -> list[float]:
    """Seconds for each of the next BUCKET_TOKENS tokens, or of those that are left."""
    seconds = []
    started_s = time.perf_counter()
    for _ in islice(stream, BUCKET_TOKENS):
        now_s = time.perf_counter()
        seconds.append(now_s - started_s)
        started_s = now_s
    return seconds


if __name__ == "__main__":
    main()
