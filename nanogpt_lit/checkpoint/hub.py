"""Models of the Hugging Face hub, by name: hf:OWNER/NAME, pinned by hf:OWNER/NAME@REVISION."""

import re
from pathlib import Path

from nanogpt_lit.errors import UserError

NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILES = ["config.json", "tokenizer*.json", "vocab.json", "merges.txt"]
WEIGHTS = [
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
]
"""The second are for models that lack the first."""


def fetched(source: str) -> tuple[Path, str]:
    """The path of a model on this machine, and the source as it names the same files for good.

    A model of the hub is downloaded, and its source gets the revision that was found where it names none.
    Raises UserError for a name that is none, without huggingface_hub, and where the hub does not answer.
    """
    if not source.startswith("hf:"):
        return Path(source), source
    match = NAME.fullmatch(source)
    if match is None:
        raise UserError(f"{source}: a model of the hub is written hf:OWNER/NAME or hf:OWNER/NAME@REVISION.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f'{source} needs the package huggingface_hub: `pip install "nanogpt_lit[hub]"`.') from error
    try:
        revision = match[2]
        for weights in WEIGHTS:
            folder = Path(snapshot_download(match[1], revision=revision, allow_patterns=[*FILES, *weights]))
            revision = folder.name  # it is named after the commit
            if any(file.match(weights[0]) for file in folder.iterdir()):
                break
    except (OSError, ValueError, RuntimeError) as error:  # the hub's and the network's errors
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{source} could not be downloaded ({type(error).__name__}: {reason}); a folder of the model's files works "
            "without a network."
        ) from error
    return folder, f"hf:{match[1]}@{revision}"
