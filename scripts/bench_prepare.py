"""How fast text becomes GPT-2 token shards: our preparation against nanoGPT's way, on the same text.

nanoGPT's way: worker processes run `encode_ordinary` on a document each and append end-of-text; one writer copies the
results into a memory-mapped file. Its workers inherit the documents where the system can fork. Ours also splits,
hashes, and flushes to the disk. Both start from the source and end with files; neither is charged for building its
tokenizer.

Both run in turn, in fresh processes, so that neither profits from the other's warm state and each has a peak memory
of its own; the ratio is the median over pairs.

    python scripts/bench_prepare.py [--source PATH] [--pairs 7] [--json FILE]
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nanogpt_lit.data.encoder import available_cpus
from nanogpt_lit.data.prepare import PrepareConfig, prepare
from nanogpt_lit.data.sources import open_source
from nanogpt_lit.data.tokenizer import GPT2Tokenizer, gpt2_tokenizer

documents: list[str] = []
tokenizer: GPT2Tokenizer | None = None


def ours(source: str, folder: Path) -> tuple[int, float]:
    """(tokens, seconds)"""
    gpt2_tokenizer()  # it is built once per process
    started_s = time.perf_counter()
    manifest = prepare(PrepareConfig(source, "gpt2", val_fraction=0.01), folder / "shards", show_progress=False)
    elapsed_s = time.perf_counter() - started_s
    return sum(split["tokens"] for split in manifest["splits"].values()), elapsed_s


def nanogpt_way(source: str, folder: Path) -> tuple[int, float]:
    """(tokens, seconds)"""
    global tokenizer
    tokenizer = gpt2_tokenizer()
    started_s = time.perf_counter()
    documents.extend("".join(document.pieces()) for document in open_source(source).documents())
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    given = () if context.get_start_method() == "fork" else (documents,)
    with context.Pool(available_cpus(), initializer=receive, initargs=given) as pool:
        ids = pool.map(encode_one, range(len(documents)), chunksize=16)
    out = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(sum(map(len, ids)),))
    at = 0
    for document_ids in ids:
        out[at : at + len(document_ids)] = document_ids
        at += len(document_ids)
    out.flush()
    return at, time.perf_counter() - started_s


def receive(texts: list[str] | None = None) -> None:
    if texts is not None:
        global tokenizer
        documents.extend(texts)
        tokenizer = gpt2_tokenizer()


def encode_one(index: int) -> np.ndarray:
    assert tokenizer is not None
    ids = tokenizer._encoding.encode_ordinary(documents[index])
    ids.append(tokenizer.eot)
    return np.array(ids, dtype=np.uint16)  # lists of ints would take the pipe several times as long


WAYS = {"ours": ours, "nanogpt": nanogpt_way}


def measure(way: str, source: str) -> dict[str, float]:
    """One run in this process: tokens and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, elapsed_s = WAYS[way](source, Path(folder))
    return {"tokens": tokens, "elapsed_s": elapsed_s}


def measure_peak(way: str, source: str) -> dict[str, float]:
    """The peak memory of this process and its workers together; a run of its own, because watching takes time."""
    peak_bytes, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak_bytes
        process = psutil.Process()
        while not done.wait(0.02):
            members = [process, *process.children(recursive=True)]
            peak_bytes = max(peak_bytes, sum(map(unique_bytes, members)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        WAYS[way](source, Path(folder))
    done.set()
    watcher.join()
    return {"peak_bytes": peak_bytes}


def unique_bytes(process: psutil.Process) -> int:
    """Memory that would be free without this process: what forked workers share is counted nowhere."""
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:  # it ended meanwhile
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib", help="as data.source in a YAML")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)  # a single run, for this script itself
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps((measure_peak if args.peak else measure)(args.one, args.source)))
        return

    from nanogpt_lit.runtime.machine import hardware  # not above: the measured processes must not hold torch

    def run(way: str, *options: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--one", way, "--source", args.source, *options]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for pair in range(args.pairs):
        for way in sorted(WAYS, reverse=pair % 2 == 1):  # each goes first every other time
            runs[way].append(run(way))
    ratios = [n["elapsed_s"] / o["elapsed_s"] for o, n in zip(runs["ours"], runs["nanogpt"], strict=True)]
    result = {
        "source": args.source,
        "tokens": runs["ours"][0]["tokens"],
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "tokens_per_s": {w: statistics.median(r["tokens"] / r["elapsed_s"] for r in rs) for w, rs in runs.items()},
        "peak_mib": {way: run(way, "--peak")["peak_bytes"] / 2**20 for way in WAYS},
        "hardware": hardware("tiktoken", "numpy"),
    }
    print(f"{result['tokens']:,} GPT-2 tokens of {args.source}, {args.pairs} pairs; {result['hardware']}")
    for way in WAYS:
        rate, peak = result["tokens_per_s"][way] / 1e6, result["peak_mib"][way]
        print(f"  {way:8} {rate:6.2f} M tokens/s   peak {peak:6.0f} MiB")
    print(f"  ours is {result['speedup']:.2f} times as fast (median of {min(ratios):.2f} .. {max(ratios):.2f})")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
