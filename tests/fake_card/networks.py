"""The runs whose plan is compared with the allocator: every YAML in configs/, and 12 configurations in none."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

SHALLOWER = {"rtx2050_medium": 4, "rtx2050_large": 3, "rtx2050_xl": 2}
"""Layers, in place of the YAML's: all of them would take up to 30 GiB of host memory. A layer is like the next."""


@dataclass(frozen=True)
class Run:
    name: str
    config: Path
    options: tuple[str, ...] = ()
    changed: str | None = None
    """What is not as in the YAML, for the record."""


def yaml_runs() -> list[Run]:
    runs = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        layers = SHALLOWER.get(path.stem)
        if layers is None:
            runs.append(Run(path.name, path))
        else:
            runs.append(Run(path.name, path, (f"--model.gpt.n_layer={layers}",), f"{layers} layers"))
    return runs


def _other(name: str, *options: str, memory: str = "{}") -> Run:
    """6 layers of 384 channels and GPT-2's vocabulary: logits and blocks both weigh in the peak."""
    base = (
        "--model.gpt.n_layer=6", "--model.gpt.n_head=6", "--model.gpt.n_embd=384", "--model.gpt.vocab_size=50304",
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
        _other("rotary, qk-norm, ReLU2", "--model.gpt.positions=rotary", "--model.gpt.qk_norm=true",
               "--model.gpt.activation=relu2", "--model.gpt.tied_head=false"),
        _other("Muon, loss in chunks", "--model.optim.matrices=muon", memory=f"{{{chunk}}}"),
        _other("selective, recast", memory=f'{{{chunk}, "recompute": "selective", "recast_weights": true}}'),
        _other("full in every third block", memory=f'{{{full}, "recompute_every": 3}}'),
        _other("block inputs on the host", memory=f'{{{full}, "block_inputs": "host"}}'),
        _other("optimizer on the host, no accumulation", "--trainer.accumulate_grad_batches=1",
               memory=f'{{{chunk}, "optimizer_state": "host"}}'),
        _other("weights on the host", memory=f'{{{full}, "weights": "host", "block_inputs": "host"}}'),
        _other("weights streamed", memory=f'{{{full}, "weights": "streamed", "block_inputs": "host"}}'),
    ]  # fmt: skip
