"""A GGUF file of llama.cpp, to and from a RunState: weights and tokenizer, no optimizer; and Ollama's Modelfile."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt_lit.checkpoint import gguf_tokenizer
from nanogpt_lit.checkpoint.exchange import measured_effect, network, network_of, new_run
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
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.conversations import ANSWERS, Chat, Message
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.network import HEAD, NetworkConfig
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


# The Modelfile of `ollama create NAME -f Modelfile`: the prompt as it is, or the chat template in Go's language. Ollama
# renders no Jinja. What a template writes is found by trying it: with nearly all of them, the texts before the first
# question, after each question and after each answer are the same in every conversation, and are all that there is.


QUESTION, ANSWER, SYSTEM = (f"\N{SNOWMAN}{letter}" for letter in "qas")
"""Messages with which a template is tried; no template has them in its own text."""


def modelfile_of(target: Path, config: NetworkConfig, tokenizer: Tokenizer) -> str:
    """The file's text. A template that is more than its surroundings is left to what Ollama knows of the GGUF's own."""
    template: str | None = "{{ .Prompt }}"
    ends = tokenizer.ends
    if tokenizer.chat_template is not None:
        try:
            chat = Chat(tokenizer)
            template, ends = go_template(chat), chat.ends()
        except UserError:  # it is no Jinja
            template = None
    return "".join(
        [
            f"FROM ./{target.name}\n",
            "" if template is None else f'TEMPLATE """{template}"""\n',
            f"PARAMETER num_ctx {config.block_size}\n",
            "PARAMETER temperature 0.8\n",
            *(f'PARAMETER stop "{tokenizer.decode([token])}"\n' for token in sorted(ends)),
        ]
    )


@dataclass(frozen=True)
class Surroundings:
    """The text that a template writes before the first question, after each question but the last, after that, and
    after each answer."""

    before: str
    question: str
    last: str
    answer: str

    def prompt(self, turns: int) -> str:
        """The prompt for an answer to so many questions."""
        asked = f"{QUESTION}{self.question}{ANSWER}{self.answer}" * (turns - 1)
        return f"{self.before}{asked}{QUESTION}{self.last}"


def go_template(chat: Chat) -> str | None:
    """The chat template as Ollama takes it; None where the surroundings are not all of it, or cannot be written."""
    found, begun = (surroundings(chat, begin) for begin in ([], [{"role": "system", "content": SYSTEM}]))
    if found is None:
        return None
    begin = without_bos(found.before, chat.tokenizer)
    if begun is not None:
        if replace(begun, before=found.before) != found:
            return None
        head, is_written, rest = without_bos(begun.before, chat.tokenizer).partition(SYSTEM)
        if is_written:
            begin = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{rest}{{{{ else }}}}{begin}{{{{ end }}}}"
    texts = (found.before, begun.before if begun else "", found.question, found.last, found.answer)
    if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
        return None
    return (
        f"{begin}{{{{ range $i, $_ := .Messages }}}}"
        '{{ if eq .Role "user" }}{{ .Content }}'
        f"{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{found.last}{{{{ else }}}}{found.question}{{{{ end }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{found.answer}{{{{ end }}}}'
        "{{ end }}"
    )


def surroundings(chat: Chat, begin: list[Message]) -> Surroundings | None:
    """The surroundings, or None where they differ between conversations or the template takes none that begins so."""
    turn = [{"role": "user", "content": QUESTION}, {"role": ANSWERS, "content": ANSWER}]
    try:
        prompts = [chat.render([*begin, *turn * n, turn[0]], add_generation_prompt=True) for n in range(4)]
    except UserError:
        return None
    before, _, last = prompts[0].partition(QUESTION)
    question, _, following = prompts[1].removeprefix(before + QUESTION).partition(ANSWER)
    found = Surroundings(before, question, last, following.partition(QUESTION)[0])
    return found if [found.prompt(n + 1) for n in range(4)] == prompts else None


def without_bos(text: str, tokenizer: Tokenizer) -> str:
    """The text without the token that llama.cpp puts before it anyway."""
    conventions = tokenizer.conventions
    return text.removeprefix(conventions.bos or "") if conventions is not None and conventions.adds_bos else text
