"""A GGUF file of llama.cpp and Ollama, to and from a RunState: weights and tokenizer, no optimizer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt_lit.checkpoint import gguf_tokenizer
from nanogpt_lit.checkpoint.export import measured_effect
from nanogpt_lit.checkpoint.gguf_file import GGUFFile
from nanogpt_lit.checkpoint.gguf_networks import (
    NAMES,
    ROPE_FACTORS,
    add_shape,
    architecture_of,
    config_of,
    named_architecture,
    our_weights,
    rope_factors,
    their_weights,
)
from nanogpt_lit.checkpoint.modelfile import modelfile_of
from nanogpt_lit.checkpoint.network import network, network_of, new_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.network import HEAD
from nanogpt_lit.runtime.durable import durable_file, write_durably

SUFFIX = ".gguf"
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Types of the matrices, and gguf's names for them; vectors and positions are float32 in each."""
Q8_0_BLOCK = 32
MODELFILE = "Modelfile"


def read(path: Path) -> tuple[str, RunState]:
    """Read a file: its description, and its network at step 0.

    Raises UserError, naming the file, for what ours lacks, and for one that is damaged or lies about its shapes.
    """
    file = GGUFFile(path)
    named_architecture(file)  # what it is comes before what it lacks
    tokenizer = gguf_tokenizer.tokenizer_of(file)
    tensors = file.read()
    config = config_of(file, tensors)
    weights = our_weights(tensors, config)
    if config.tied_head:
        weights.pop(HEAD, None)
    what = "a GGUF file of llama.cpp"
    if file.rounded:
        what += f" with weights in {file.rounded}, so that every loss is that of the rounded network"
    return what, new_run(path, weights, config, tokenizer)


def write(target: Path, state: RunState, source: Path, dtype: str = "f32") -> list[str]:
    """Write the file and a Modelfile for Ollama beside it, and return remarks about them.

    dtype: one of DTYPES
    Raises UserError without the package gguf, and for a tokenizer that llama.cpp cannot express.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError('--to gguf needs the package gguf: `pip install "nanogpt_lit[gguf]"`.') from error
    gpt = network_of(source, state)
    config = gpt.config
    modelfile = target.parent / MODELFILE
    if modelfile.exists():
        raise UserError(
            f"{modelfile} exists already, and each GGUF file has one; choose another folder for {target.name}."
        )
    tokenizer = tokenizer_from_files(state.data["tokenizer"])
    architecture, without_biases = architecture_of(config), isinstance(config, GPTConfig) and not config.bias

    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    rounded: dict[str, Tensor] = {}  # the weights as llama.cpp will see them
    with durable_file(target) as file:
        writer = gguf.GGUFWriter(Path(file.name), architecture)
        add_shape(writer, config, target.stem)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{DTYPES[dtype]}"])
        gguf_tokenizer.add_tokenizer(writer, tokenizer, gpt.embedding.num_embeddings)
        if (factors := rope_factors(config)) is not None:
            writer.add_tensor(ROPE_FACTORS, factors.numpy())
        for name, tensor in their_weights(gpt.state_dict(), config).items():
            is_matrix = tensor.dim() > 1 and "wpe" not in name
            as_kind = kind if is_matrix else gguf.GGMLQuantizationType.F32
            if as_kind == gguf.GGMLQuantizationType.Q8_0 and tensor.size(-1) % Q8_0_BLOCK:
                as_kind = gguf.GGMLQuantizationType.F16  # as llama.cpp's own converter does
            content = gguf.quants.quantize(tensor.numpy(), as_kind)
            as_read = gguf.quants.dequantize(content, as_kind).astype(np.float32, copy=False)
            rounded[NAMES[architecture].there(name)] = torch.from_numpy(as_read)
            writer.add_tensor(NAMES[architecture].there(name), content, raw_dtype=as_kind)
            if without_biases and name.endswith("weight") and (".h." in name or ".ln_f." in name):
                zeros = np.zeros(tensor.size(0), dtype=np.float32)
                writer.add_tensor(NAMES[architecture].there(name.replace("weight", "bias")), zeros)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    write_durably(modelfile, modelfile_of(target, config, tokenizer))

    notes = ["This network has no biases: the file has zeros there, which is the same."] if without_biases else []
    reasons = []
    there = config
    if isinstance(config, GPTConfig) and config.gelu != "tanh":
        reasons.append(
            "llama.cpp computes the tanh approximation of GELU where this network was trained with the exact one"
        )
        there = replace(config, gelu="tanh")
    if dtype != "f32":
        reasons.append(f"its matrices are rounded to {dtype}")
    if reasons:
        as_there = network(source, our_weights(rounded, config), there)
        notes.append(f"{', and '.join(reasons)}: {measured_effect(gpt, as_there, tokenizer)}.")
    return [*notes, *gguf_tokenizer.remarks(tokenizer)]
