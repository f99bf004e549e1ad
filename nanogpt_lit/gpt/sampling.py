"""Text in, text out: where the network and its tokenizer meet."""

import codecs
from collections.abc import Iterator

import torch

from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.model import GPT


def continue_text(
    gpt: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1337,
) -> Iterator[str]:
    """Yields what follows the prompt, piece by piece as it is made, until the model ends the document.

    An empty prompt begins a new document. A piece holds whole characters only: a token may end inside one.
    The global random state is left alone. Raises UserError for a prompt that the tokenizer cannot encode.
    """
    device = next(gpt.parameters()).device
    tokens = torch.tensor([[tokenizer.eot, *tokenizer.encode(prompt).tolist()]], dtype=torch.int64, device=device)
    new_tokens = generate(
        gpt,
        tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
        vocab_size=tokenizer.vocab_size,
    )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in new_tokens:  # (1,)
        token_id = int(token)
        if token_id == tokenizer.eot:
            break
        piece = decoder.decode(tokenizer.decode_bytes([token_id]))
        if piece:
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def printable(text: str) -> str:
    """The text with U+FFFD for what a terminal would obey: a network of bytes may write an escape sequence."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
