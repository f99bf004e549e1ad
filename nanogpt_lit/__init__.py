"""Train a GPT-2 or a network of the Llama family on a 4 GB laptop with PyTorch Lightning."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "GPT": "nanogpt_lit.gpt.gpt2",
    "GPTConfig": "nanogpt_lit.gpt.gpt2",
    "Llama": "nanogpt_lit.gpt.llama",
    "LlamaConfig": "nanogpt_lit.gpt.llama",
    "LitNanoGPT": "nanogpt_lit.module",
    "AdamWConfig": "nanogpt_lit.optim.adamw",
    "ScheduleConfig": "nanogpt_lit.optim.schedule",
    "MemoryConfig": "nanogpt_lit.memory.techniques",
    "ElasticConfig": "nanogpt_lit.memory.elastic",
    "TokenDataModule": "nanogpt_lit.data.datamodule",
    "trainer_options": "nanogpt_lit.loops.lightning_run",
    "LoopSettings": "nanogpt_lit.loops.contract",
    "Observer": "nanogpt_lit.loops.contract",
    "Training": "nanogpt_lit.loops.contract",
    "keep_freed_memory": "nanogpt_lit.runtime.process_settings",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    # On first use, so that `python -m nanogpt_lit --help` does not wait for torch and Lightning.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
