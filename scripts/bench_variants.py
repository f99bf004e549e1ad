"""One variant of a training step, in a process of its own: bench.py starts it and says when each step is due.

It reads a line from its standard input before each step and answers with the seconds that the step took: from the
moment it is handed a batch to the moment it asks for the next one, with the GPU's work done. The loop, its callbacks
and its logger are in them. On a GPU a second number is the peak of its memory so far, in MiB.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.optim.schedule import ScheduleConfig

if TYPE_CHECKING:
    from nanogpt_lit.module import LitNanoGPT

FOR_EVER = 10**6
OURS = {
    "chunk": 512, "optimizer": "fused", "compile": False, "recast": False, "heap": True, "onednn": True, "apart": False,
}  # fmt: skip
"""What the option names below change."""
OPTIONS: dict[str, dict[str, Any]] = {
    "loss at once": {"chunk": None},
    "chunks of 64": {"chunk": 64},
    "chunks of 256": {"chunk": 256},
    "foreach AdamW": {"optimizer": "foreach"},
    "for-loop AdamW": {"optimizer": "for-loop"},
    "compiled": {"compile": True},
    "compiled, loss at once": {"compile": True, "chunk": None},
    "heap as it comes": {"heap": False},
    "products by MKL": {"onednn": False},
    "recast": {"recast": True},
    "documents apart": {"apart": True},
}
OTHERS = (
    "nanogpt", "nanogpt compiled", "nanogpt under autocast", "lightning", "plain", "transformers",
    "transformers trainer", "matmul",
)  # fmt: skip
MATMUL_SIDE = 2048
Batch = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=[*OTHERS, *OPTIONS])
    parser.add_argument("--network", type=int, nargs=5, metavar=("LAYERS", "HEADS", "CHANNELS", "VOCABULARY", "BLOCK"))
    parser.add_argument("--tokens", type=Path, help="a file of uint16 tokens")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--nanogpt", type=Path, help="a folder with nanoGPT's model.py")
    args = parser.parse_args()
    n_layer, n_head, n_embd, vocab_size, block_size = args.network
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=False, gelu="erf")  # as nanoGPT
    turns = Turns(args.tokens, config, args.batch_size, args.clock, args.device)
    torch.manual_seed(0)
    with redirect_stdout(sys.stderr):  # libraries print
        if args.variant.startswith("nanogpt"):
            # On a CPU its train.py computes in float32, whatever its dtype says.
            precision = args.precision if args.device == "cuda" or "autocast" in args.variant else "32-true"
            drive(nanogpt_step(config, args.nanogpt, "compiled" in args.variant, precision, args.device), turns)
        elif args.variant == "matmul":
            drive(matmul_step(args.precision, args.device), turns)
        elif args.variant == "transformers":
            drive(transformers_step(config, args.precision, args.device), turns)
        elif args.variant == "transformers trainer":
            transformers_trainer(config, args.precision, turns)
        elif args.variant == "lightning":
            lightning(build(config, OURS), args.precision, turns)
        else:
            plain(build(config, OURS | OPTIONS.get(args.variant, {})), args.precision, turns)


class Turns(IterableDataset):
    """Random windows of a file of tokens, each when the parent asks for it; ends the process with the parent."""

    def __init__(self, tokens: Path, config: GPTConfig, batch_size: int, clock: str, device: str) -> None:
        self.data = np.memmap(tokens, dtype=np.uint16, mode="r")
        self.batch_size, self.block_size = batch_size, config.block_size
        self.read_clock = time.perf_counter if clock == "wall" else time.process_time
        self.device = device
        self.answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        self.generator = np.random.default_rng(0)

    def __iter__(self) -> Iterator[Batch]:
        while sys.stdin.readline():
            started_s = self.clock()
            yield self.windows()
            peak_mib = [torch.cuda.max_memory_allocated() / 2**20] if self.device == "cuda" else []
            print(self.clock() - started_s, *peak_mib, file=self.answers, flush=True)
        raise SystemExit

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.read_clock()

    def windows(self) -> Batch:
        starts = self.generator.integers(len(self.data) - self.block_size, size=self.batch_size)
        rows = [torch.from_numpy(self.data[i : i + self.block_size + 1].astype(np.int64)) for i in starts]
        windows = torch.stack(rows)  # (B, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def drive(step: Callable[[Batch], None], turns: Turns) -> None:
    for batch in turns:
        step(batch)


def build(config: GPTConfig, options: dict[str, Any]) -> "LitNanoGPT":
    from nanogpt_lit.memory.techniques import MemoryConfig
    from nanogpt_lit.module import LitNanoGPT
    from nanogpt_lit.runtime import process_settings
    from nanogpt_lit.runtime.process_settings import keep_freed_memory

    if options["heap"]:
        keep_freed_memory()  # as fit does on a CPU
    if not options["onednn"]:
        process_settings.onednn_is_exact = lambda: False  # type: ignore[assignment]
    return LitNanoGPT(
        replace(config, document_start=0) if options["apart"] else config,  # the price is the same for any id
        AdamWConfig(implementation=options["optimizer"]),
        ScheduleConfig(warmup_steps=10, total_steps=FOR_EVER),
        compile=options["compile"],
        memory=MemoryConfig(loss_chunk_tokens=options["chunk"], recast_weights=options["recast"]),
    )


def plain(module: "LitNanoGPT", precision: str, turns: Turns) -> None:
    from nanogpt_lit.loops import reference
    from nanogpt_lit.loops.contract import LoopSettings
    from nanogpt_lit.run.observers import always

    settings = LoopSettings(FOR_EVER, gradient_clip_val=1.0, precision=precision)
    reference.train(module.to(turns.device), turns, [], settings, always())


def lightning(module: "LitNanoGPT", precision: str, turns: Turns) -> None:
    """The Trainer with the curves, guards and progress line of `fit`, without validation, samples and checkpoints."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from nanogpt_lit.loops.lightning import precision_plugin
    from nanogpt_lit.loops.lightning_run import LightningRun
    from nanogpt_lit.runtime.process_settings import set_for_process

    plugin = precision_plugin(precision, turns.device)
    assert plugin is not None
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=turns.device,
            max_steps=FOR_EVER,
            gradient_clip_val=1.0,
            plugins=[plugin],
            logger=TensorBoardLogger(folder, name=""),
            callbacks=[LightningRun(saves=False, log_every_n_steps=10, shows_progress=True)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        set_for_process(module, torch.device(turns.device))  # as fit does
        trainer.fit(module, turns)


def nanogpt_step(
    config: GPTConfig, folder: Path, compiled: bool, precision: str, device: str
) -> Callable[[Batch], None]:
    """What nanoGPT's train.py does in a step. On a CPU it has no fused AdamW."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = theirs
    spec.loader.exec_module(theirs)
    shape = {name: getattr(config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    model = theirs.GPT(theirs.GPTConfig(**shape, dropout=0.0, bias=False)).to(device)
    optimizer = model.configure_optimizers(1e-1, 6e-4, (0.9, 0.95), device)
    network = torch.compile(model) if compiled else model
    scaler = torch.amp.GradScaler(device, enabled=precision == "16-mixed")

    def step(batch: Batch) -> None:
        with torch.autocast(device, dtype_of(precision), enabled=precision != "32-true"):
            _, loss = network(*on(device, batch))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def dtype_of(precision: str) -> torch.dtype:
    return {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision, torch.float32)


def on(device: str, batch: Batch) -> Batch:
    return batch[0].to(device), batch[1].to(device)


def matmul_step(precision: str, device: str) -> Callable[[Batch], None]:
    """Products of square matrices into memory that is there, by the quicker library: what arithmetic could run at."""
    from nanogpt_lit.runtime.process_settings import set_matmul_backend

    if device == "cpu":
        set_matmul_backend(torch.device(device), tf32=False)
    a, b, product = (torch.randn(MATMUL_SIDE, MATMUL_SIDE).to(device, dtype_of(precision)) for _ in range(3))

    def step(batch: Batch) -> None:
        torch.mm(a, b, out=product)

    return step


def transformers_network(config: GPTConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size or 0, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            use_cache=False, activation_function="gelu",
        )
    )  # fmt: skip


def transformers_step(config: GPTConfig, precision: str, device: str) -> Callable[[Batch], None]:
    """GPT2LMHeadModel in a plain loop, with our optimizer; it shifts the targets itself and returns the logits."""
    model = transformers_network(config).to(device)
    optimizer = build_optimizer(model.named_parameters(), AdamWConfig())
    scaler = torch.amp.GradScaler(device, enabled=precision == "16-mixed")

    def step(batch: Batch) -> None:
        tokens, _ = on(device, batch)
        with torch.autocast(device, dtype_of(precision), enabled=precision != "32-true"):
            loss = model(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def transformers_trainer(config: GPTConfig, precision: str, turns: Turns) -> None:
    """The same network under transformers' Trainer, with its own defaults but for the clock's sake no files."""
    from transformers import Trainer, TrainingArguments

    class Loaded(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            def as_named(batch: Any) -> dict[str, Tensor]:
                return {"input_ids": batch[0], "labels": batch[0]}

            return DataLoader(turns, batch_size=None, collate_fn=as_named)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=FOR_EVER, use_cpu=turns.device == "cpu", report_to=[], save_strategy="no",
            logging_steps=10, bf16=precision == "bf16-mixed", fp16=precision == "16-mixed",
        )  # fmt: skip
        Loaded(transformers_network(config), arguments, train_dataset=turns).train()


if __name__ == "__main__":
    main()
