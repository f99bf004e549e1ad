"""Checkpoints from and to the formats of others, and models of the Hugging Face hub.

What a file is, is seen from its content, and no code of it runs.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nanogpt_lit.checkpoint import (
    gguf_file,
    gguf_format,
    hugging_face_format,
    lightning_format,
    llm_c_format,
    nanogpt_format,
)
from nanogpt_lit.checkpoint.accelerate_format import BESIDE, read_folder, write_folder
from nanogpt_lit.checkpoint.exchange import Described, network_of, size
from nanogpt_lit.checkpoint.foreign_files import is_zip, known_as, read_torch_file, words_of
from nanogpt_lit.checkpoint.newest import newest_run
from nanogpt_lit.checkpoint.run_file import SUFFIX, StoredNetwork, check_counts, load_run, load_stored_network, save_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.rows import retries_said_once
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files
from nanogpt_lit.errors import UserError, in_brief
from nanogpt_lit.gpt.average import Average
from nanogpt_lit.gpt.network import Network
from nanogpt_lit.gpt.networks import config_of
from nanogpt_lit.runtime.durable import durable_file

FORMATS = {"hf": "", "gguf": gguf_format.SUFFIX, "nanogpt": nanogpt_format.SUFFIX}
"""Names for --to, and the suffix of such a target."""
HUB_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
HUB_FILES = ["config.json", "tokenizer*.json", "chat_template.jinja", "vocab.json", "merges.txt"]
HUB_WEIGHTS = [
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
]
"""The second are for models that lack the first."""


def convert(
    source: Path,
    target: Path,
    to: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    described: Described | None = None,
) -> list[str]:
    """Write the checkpoint at `source` as `to`, or as the name of `target` says, and return lines about it.

    .safetensors is the format of every loop here, .ckpt Lightning's, a name without a suffix accelerate's folder.

    dtype: of the matrices in a GGUF file   tokenizer: its name, for a source that holds none
    described: what the YAML of the run says, for a source that does not
    Raises UserError for a source that is none of them, and for a target that is there already.
    """
    if target.exists():
        raise UserError(f"{target} exists already; name another, or remove it first.")
    if to is None:
        to = next((name for name, suffix in FORMATS.items() if suffix and suffix == target.suffix), None)
    if to is None and target.suffix not in (SUFFIX, ".ckpt", ""):
        raise UserError(
            f"{target} names no format; FILE{SUFFIX} is nanogpt_lit's, FILE.ckpt Lightning's, a name without a "
            "suffix accelerate's folder; --to hf, gguf or nanogpt name others."
        )
    if to is not None and FORMATS[to] and target.suffix != FORMATS[to]:
        raise UserError(f"{target} is to be a file for {to}; such a file ends in {FORMATS[to]}.")
    if dtype is not None and to != "gguf":
        raise UserError(f"--dtype={dtype} is for --to gguf; the other formats keep float32.")
    what, state = read(source, tokenizer, described)
    is_ours = "gpt" in state.hyper_parameters or "network" in state.hyper_parameters
    lines = [f"{source}: {what}" + (f"; {size(config_of(state.hyper_parameters))}" if is_ours else "")]
    match to:
        case "hf":
            notes = hugging_face_format.write(target, state, source)
            return [*lines, *notes, f"{target}: a folder for AutoModelForCausalLM and AutoTokenizer"]
        case "gguf":
            notes = gguf_format.write(target, state, source, dtype or "f32")
            modelfile = target.parent / gguf_format.MODELFILE
            return [
                *lines,
                *notes,
                f"{target}: for llama.cpp, {dtype or 'f32'}; ollama create {target.stem} -f {modelfile}",
            ]
        case "nanogpt":
            notes = nanogpt_format.write(target, state, source)
            return [*lines, *notes, f"{target}: for nanoGPT's --init_from=resume and sample.py, step {state.step:,}"]
    if target.suffix == SUFFIX:
        save_run(target, state)
    elif target.suffix == ".ckpt":
        with durable_file(target) as file:
            torch.save(lightning_format.to_lightning(state), file)
    else:
        write_folder(target, state)
    tokens = f"{state.tokens:,} tokens"
    if state.step and not state.tokens:
        tokens = "and no word of how many tokens a step has; --config FILE.yaml says it"
    lines.append(f"{target}: step {state.step:,}, {tokens}")
    if what == NANOGPT:
        lines.append(f"go on with: fit --ckpt_path {target} {nanogpt_format.fit_options(state)}")
    return lines


NANOGPT, OURS = "nanoGPT's checkpoint", "a checkpoint of nanogpt_lit"


def read(source: Path, tokenizer: str | None = None, described: Described | None = None) -> tuple[str, RunState]:
    """The kind of the source, and its run. Raises UserError, naming the source, for what it is not.

    described: what the YAML of the run says
    """
    words = words_of(source) if source.is_file() and is_zip(source) else set()
    if source.is_dir() and hugging_face_format.recognises(source):
        return "a Hugging Face folder", hugging_face_format.read(source, tokenizer)
    if words >= nanogpt_format.MARKS:
        return NANOGPT, nanogpt_format.read(source, tokenizer)
    if source.is_file() and llm_c_format.recognises(source):
        return "a model of llm.c", llm_c_format.read(source, tokenizer)
    if source.is_file() and gguf_file.recognises(source) and tokenizer is None:
        return gguf_format.read(source)
    if tokenizer is not None:
        raise UserError(f"--tokenizer={tokenizer} is for a source that holds none, and {source} holds its own.")
    if words >= lightning_format.MARKS:
        return "a checkpoint of Lightning", read_ckpt(source, described)
    if source.is_dir() and lightning_format.is_sharded(source):
        return "a folder of Lightning's shards", read_ckpt(source, described)
    if source.is_dir() and (run := newest_run(source)) is not None:
        saved = min((run / "checkpoints").glob(f"*{SUFFIX}"))  # best, where there is one
        raise UserError(f"{source} is a folder of runs; name a checkpoint in it, such as {saved}.")
    if source.is_dir() and ((source / BESIDE).is_file() or known_as(source) is None):
        return "a folder of accelerate", read_folder(source, described)
    if source.exists() and (what := known_as(source)) is not None:
        raise UserError(f"{source} is not a checkpoint that convert reads; it is {what}.")
    return OURS, load_run(source)


def read_network(source: Path) -> tuple[str, StoredNetwork]:
    """The kind of the source, and its network alone: of a checkpoint of ours, a third of the file is read."""
    if source.suffix == SUFFIX and source.is_file() and known_as(source) is None:
        return OURS, load_stored_network(source)
    what, state = read(source)
    return what, StoredNetwork(state.weights, state.hyper_parameters, state.data["tokenizer"])


def load_network(path: Path, device: str | torch.device = "cpu") -> tuple[Network, Tokenizer]:
    """The network of any model that `convert` reads, in eval mode, and the tokenizer that it was trained with."""
    path, _ = fetched(path.as_posix())
    _, stored = read_network(path)
    return network_of(path, stored).to(device), tokenizer_from_files(stored.tokenizer_files)


def load_mean(paths: Sequence[Path], device: str | torch.device = "cpu") -> tuple[Network, Tokenizer]:
    """Several models as one that predicts the mean of their probabilities, with their tokenizer; of one, itself.

    Raises UserError where they were not trained on the same tokens.
    """
    gpts, tokenizers = zip(*(load_network(path, device) for path in paths), strict=True)
    if len(gpts) == 1:
        return gpts[0], tokenizers[0]
    for path, gpt, tokenizer in zip(paths, gpts, tokenizers, strict=True):
        if tokenizer.sha256 != tokenizers[0].sha256 or gpt.config.vocab_size != gpts[0].config.vocab_size:
            raise UserError(
                f"{path} has {gpt.config.vocab_size:,} tokens of the tokenizer {tokenizer.name}, and {paths[0]} "
                f"{gpts[0].config.vocab_size:,} of {tokenizers[0].name}, which are others: the mean of what they "
                "predict needs models of the same tokenizer."
            )
        if gpt.config.document_start != gpts[0].config.document_start:
            raise UserError(
                f"{path} and {paths[0]} differ in data.documents: one reads each document as if it stood alone; name "
                "models that were trained alike."
            )
    return Average(gpts), tokenizers[0]


def read_ckpt(path: Path, described: Described | None = None) -> RunState:
    """The run of a file that Trainer.save_checkpoint wrote, or of the folder that it writes in shards."""
    try:
        whole = lightning_format.read_sharded(path) if path.is_dir() else read_torch_file(path)
        state = lightning_format.from_lightning(whole)
        state = replace(state, optimizer=lightning_format.numbered(state.optimizer))
        check_counts(state)
    except Exception as error:  # what the readers of zip, of pickle and of a dictionary raise is not one family
        raise UserError(
            f"{path} is damaged, or is not a checkpoint that Lightning wrote of one optimizer and one schedule "
            f"({in_brief(error)})."
        ) from error
    return state if described is None else described.complete(state)


def fetched(source: str) -> tuple[Path, str]:
    """The path of a model on this machine, and the source as it names the same files for good.

    source: a path, or hf:OWNER/NAME of the hub, pinned by hf:OWNER/NAME@REVISION
    A model of the hub is downloaded, and its source gets the revision that was found where it names none.
    Raises UserError for a name that is none, without huggingface_hub, and where the hub does not answer.
    """
    if not source.startswith("hf:"):
        return Path(source), source
    match = HUB_NAME.fullmatch(source)
    if match is None:
        raise UserError(f"{source}: a model of the hub is written hf:OWNER/NAME or hf:OWNER/NAME@REVISION.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f'{source} needs the package huggingface_hub: `pip install "nanogpt_lit[hub]"`.') from error
    try:
        revision = match[2]
        for weights in HUB_WEIGHTS:
            with retries_said_once():
                folder = Path(snapshot_download(match[1], revision=revision, allow_patterns=[*HUB_FILES, *weights]))
            revision = folder.name  # it is named after the commit
            if any(file.match(weights[0]) for file in folder.iterdir()):
                break
    except (OSError, ValueError, RuntimeError) as error:  # the hub's and the network's errors
        raise UserError(
            f"{source} could not be downloaded ({in_brief(error)}); a folder of the model's files works without a "
            "network."
        ) from error
    return folder, f"hf:{match[1]}@{revision}"
