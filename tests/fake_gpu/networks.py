"""The runs whose plan is compared with the allocator: every YAML in configs/, 12 configurations in none, and those 12
again on other GPUs and in a fixed order."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanogpt_lit.plan.budget import gpu_named
from nanogpt_lit.runtime.gpus import Gpu

ROOT = Path(__file__).parents[2]
RTX2050 = gpu_named("rtx2050")

CHANGED = {
    "course": (("--data.tokenizer=byte", "--model.gpt.vocab_size=32000"), "bytes in a vocabulary of 32,000"),
    "day25": (("--data.tokenizer=byte", "--model.gpt.vocab_size=32000"), "bytes in a vocabulary of 32,000"),
    "finetune_rtx2050": (("--init_from=null",), "weights drawn, not loaded"),
    "smollm2_rtx2050": (
        ("--init_from=null", "--data.documents=separate", "--data.tokenizer=byte"),
        "weights drawn, not loaded; documents of bytes in place of conversations",
    ),
    "rtx2050_medium": (("--model.gpt.n_layer=4",), "4 layers"),
    "rtx2050_large": (("--model.gpt.n_layer=3",), "3 layers"),
    "rtx2050_xl": (("--model.gpt.n_layer=2",), "2 layers"),
}
"""What is not as in the YAML. All layers would take up to 30 GiB of host memory, and a layer is like the next; the text
at hand has too few pairs for a vocabulary of 32,000; GPT-2's weights are a download, and no larger than others."""


@dataclass(frozen=True)
class Run:
    name: str
    config: Path
    options: tuple[str, ...] = ()
    changed: str | None = None
    """What is not as in the YAML, for the record."""
    gpu: Gpu = RTX2050
    environment: Mapping[str, str] = field(default_factory=dict)


def yaml_runs() -> list[Run]:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    return [Run(path.name, path, *CHANGED.get(path.stem, ((), None))) for path in paths]


def _other(name: str, *options: str, memory: str = "{}", section: str = "gpt") -> Run:
    """6 layers of 384 channels and GPT-2's vocabulary: logits and blocks both weigh in the peak."""
    base = (
        *(f"--model.{section}.{size}" for size in ("n_layer=6", "n_head=6", "n_embd=384", "vocab_size=50304")),
        "--data.block_size=512", "--data.batch_size=4", f"--model.memory={memory}",
    )  # fmt: skip
    return Run(name, ROOT / "configs" / "rtx2050.yaml", base + options)


def other_runs() -> list[Run]:
    chunk = '"loss_chunk_tokens": 192'
    full = f'{chunk}, "recompute": "full"'
    return [
        _other("plain, float16"),
        _other("plain, bfloat16, dropout", "--trainer.precision=bf16-mixed", "--model.gpt.dropout=0.1"),
        _other("plain, float32, foreach", "--trainer.precision=32-true", "--model.optim.implementation=foreach"),
        _other("for-loop AdamW, 5 sequences", "--model.optim.implementation=for-loop", "--data.batch_size=5"),
        _other("Llama family, shared keys, qk-norm", "--model.network=llama", "--model.llama.qk_norm=true",
               "--model.llama.n_kv_head=2", "--model.llama.tied_head=false", section="llama"),
        _other("Muon, loss in chunks", "--model.optim.matrices=muon", memory=f"{{{chunk}}}"),
        _other("selective, recast", memory=f'{{{chunk}, "recompute": "selective", "recast_weights": true}}'),
        _other("full in every third block", memory=f'{{{full}, "recompute_every": 3}}'),
        _other("block inputs on the host", memory=f'{{{full}, "block_inputs": "host"}}'),
        _other("optimizer on the host, no accumulation", "--trainer.accumulate_grad_batches=1",
               memory=f'{{{chunk}, "optimizer_state": "host"}}'),
        _other("weights on the host", memory=f'{{{full}, "weights": "host", "block_inputs": "host"}}'),
        _other("weights streamed", memory=f'{{{full}, "weights": "streamed", "block_inputs": "host"}}'),
    ]  # fmt: skip


def runs_elsewhere() -> list[Run]:
    """On GPUs whose kernels are others, and where the order of additions is fixed."""
    by_name = {run.name: run for run in other_runs()}
    half, single, chunks = (
        by_name[name] for name in ("plain, float16", "plain, float32, foreach", "selective, recast")
    )
    newer = replace(RTX2050, name="capability 12.0", capability=(12, 0), multiprocessors=20)
    on = [
        (half, gpu_named("gtx1650")), (half, gpu_named("t4")), (single, gpu_named("t4")), (chunks, gpu_named("t4")),
        (half, gpu_named("a100")), (half, gpu_named("h100")), (half, newer),
    ]  # fmt: skip
    runs = [replace(run, name=f"{run.name}, {gpu.name}", gpu=gpu) for run, gpu in on]
    for setting in (":4096:8", ":16:8"):
        changed = {"CUBLAS_WORKSPACE_CONFIG": setting}
        runs.append(replace(half, name=f"{half.name}, cuBLAS {setting}", environment=changed))
    fixed = ("--trainer.deterministic=true",)
    for run, gpu in ((half, RTX2050), (single, RTX2050), (chunks, RTX2050), (half, gpu_named("a100"))):
        name = f"{run.name}, {gpu.name}, deterministic"
        runs.append(replace(run, name=name, gpu=gpu, options=run.options + fixed))
    return runs


def strategy_runs() -> list[tuple[Run, str, int]]:
    """Runs on several devices, each with its strategy."""
    by_name = {run.name: run for run in other_runs()}
    bf16 = ("--trainer.precision=bf16-mixed",)
    plain, llama, full = (
        replace(by_name[name], options=by_name[name].options + bf16)
        for name in ("plain, float16", "Llama family, shared keys, qk-norm", "full in every third block")
    )
    runs = [replace(plain, name="plain, bfloat16"), llama, full]
    return [(run, strategy, devices) for run in runs for strategy in ("ddp", "fsdp2") for devices in (2, 4)]
