"""A GGUF file for llama.cpp and Ollama, written from a RunState through the package gguf: weights and tokenizer.

llama.cpp's GPT-2 has biases everywhere and the tanh approximation of GELU.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt_lit.checkpoint.export import gpt2_config, measured_effect
from nanogpt_lit.checkpoint.modelfile import modelfile_of
from nanogpt_lit.checkpoint.network import network, network_of
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.bpe import as_characters, merges_of
from nanogpt_lit.data.tokenizer import EOT, GPT2_PATTERN, BytePairTokenizer, CharTokenizer, Tokenizer
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
NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""Names of a block's parts, here and in llama.cpp."""


def write(target: Path, state: RunState, source: Path, dtype: str = "f32") -> list[str]:
    """Write the file and a Modelfile for Ollama beside it, and return remarks about them.

    dtype: one of DTYPES
    Raises UserError without the package gguf, and for a network or a tokenizer that llama.cpp cannot express.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError('--to gguf needs the package gguf: `pip install "nanogpt_lit[gguf]"`.') from error
    gpt = network_of(source, state)
    config = gpt2_config(source, gpt, "llama.cpp")
    modelfile = target.parent / MODELFILE
    if modelfile.exists():
        raise UserError(
            f"{modelfile} exists already, and each GGUF file has one; choose another folder for {target.name}."
        )
    tokenizer = tokenizer_from_files(state.data["tokenizer"])
    merges = merges_for_llama_cpp(tokenizer)

    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    rounded: dict[str, Tensor] = {}  # the weights as llama.cpp will see them
    with durable_file(target) as file:
        writer = gguf.GGUFWriter(Path(file.name), "gpt2")
        add_shape(writer, config, target.stem)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{DTYPES[dtype]}"])
        add_tokenizer(writer, gguf.TokenType, tokenizer, merges, gpt.embedding.num_embeddings)
        for name, tensor in gpt.state_dict().items():
            if config.tied_head and name == HEAD:
                continue
            is_matrix = tensor.dim() > 1 and "wpe" not in name
            as_kind = kind if is_matrix else gguf.GGMLQuantizationType.F32
            if as_kind == gguf.GGMLQuantizationType.Q8_0 and tensor.size(-1) % Q8_0_BLOCK:
                as_kind = gguf.GGMLQuantizationType.F16  # as llama.cpp's own converter does
            content = gguf.quants.quantize(tensor.numpy(), as_kind)
            rounded[name] = as_read(content, as_kind, gguf.quants.dequantize)
            writer.add_tensor(their_name(name), content, raw_dtype=as_kind)
            if not config.bias and name.endswith("weight") and (".h." in name or ".ln_f." in name):
                zeros = np.zeros(tensor.size(0), dtype=np.float32)
                writer.add_tensor(their_name(name.replace("weight", "bias")), zeros)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    write_durably(modelfile, modelfile_of(target, config, tokenizer))

    notes = [] if config.bias else ["This network has no biases: the file has zeros there, which is the same."]
    reasons = []
    if config.gelu != "tanh":
        reasons.append(
            "llama.cpp computes the tanh approximation of GELU where this network was trained with the exact one"
        )
    if dtype != "f32":
        reasons.append(f"its matrices are rounded to {dtype}")
    if reasons:
        there = network(source, rounded, replace(config, gelu="tanh"))
        notes.append(f"{', and '.join(reasons)}: {measured_effect(gpt, there, tokenizer)}.")
    if tokenizer.kind == "char":
        notes.append("A character that the text did not have is left out by its tokenizer there, and refused here.")
    return notes


def as_read(content: np.ndarray, kind: Any, dequantize: Callable[..., np.ndarray]) -> Tensor:
    if content.dtype in (np.float32, np.float16):
        return torch.from_numpy(content.astype(np.float32))
    return torch.from_numpy(dequantize(content, kind).astype(np.float32))


def add_shape(writer: Any, config: GPTConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)


def add_tokenizer(writer: Any, types: Any, tokenizer: Tokenizer, merges: list[str], rows: int) -> None:
    """Write the tokenizer. rows: of the embedding; those beyond the tokenizer are padding"""
    specials = tokenizer.specials if isinstance(tokenizer, BytePairTokenizer) else {EOT: tokenizer.eot}
    texts = [f"[PAD{n}]" for n in range(rows)]
    kinds = [types.UNUSED] * rows
    for n, token in tokens_of(tokenizer):
        texts[n], kinds[n] = as_characters(token), types.NORMAL
    for text, n in specials.items():
        texts[n], kinds[n] = text, types.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    # As `generate` here: end-of-text begins a document.
    writer.add_add_bos_token(True)


def tokens_of(tokenizer: Tokenizer) -> list[tuple[int, bytes]]:
    """Ids and bytes of all that is no special token."""
    match tokenizer:
        case BytePairTokenizer():
            return [(rank, token) for token, rank in tokenizer.ranks.items()]
        case CharTokenizer():
            return [(n, character.encode()) for n, character in enumerate(tokenizer.characters)]
    return [(byte, bytes([byte])) for byte in range(256)]


def merges_for_llama_cpp(tokenizer: Tokenizer) -> list[str]:
    """Two tokens a line, as byte-level vocabularies write them.

    A character of several bytes is merged from them, from the left. That what is merged on the way is no token does
    not matter there: only what is left at the end is looked up.
    """
    match tokenizer:
        case BytePairTokenizer():
            if tokenizer.pattern != GPT2_PATTERN:
                raise UserError(
                    f"the tokenizer {tokenizer.name} cuts text by a pattern of its own, and llama.cpp knows, "
                    "of those that convert can name, GPT-2's alone; --to hf carries the pattern."
                )
            pairs = merges_of(tokenizer.ranks)
        case CharTokenizer():
            several = (character.encode() for character in tokenizer.characters)
            pairs = list(dict.fromkeys((c[:n], c[n : n + 1]) for c in several for n in range(1, len(c))))
        case _:
            pairs = []
    if not pairs:
        # llama.cpp refuses a file without merges. This one never applies: it begins with what is two characters.
        pairs = [(b"aa", b"aa")]
    return [f"{as_characters(left)} {as_characters(right)}" for left, right in pairs]


def their_name(name: str) -> str:
    path, _, kind = name.rpartition(".")
    match path.split(".", 3):
        case ["lm_head"]:
            return f"output.{kind}"
        case ["transformer", "wte"]:
            return f"token_embd.{kind}"
        case ["transformer", "wpe"]:
            return f"position_embd.{kind}"
        case ["transformer", "ln_f"]:
            return f"output_norm.{kind}"
    _, _, layer, part = path.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"
