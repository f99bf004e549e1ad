"""Text or tokens from a trained GPT, one token at a time, so that a caller can show them as they come."""

import codecs
import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.attention import Documents, KeyValueCache
from nanogpt_lit.gpt.network import Network
from nanogpt_lit.runtime.process_settings import by_mkl


def continue_text(
    gpt: Network,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1337,
) -> Iterator[str]:
    """Yields what follows the prompt, piece by piece as it is made, until the model ends the text.

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
    yield from as_text(new_tokens, tokenizer, tokenizer.ends)


def as_text(new_tokens: Iterator[Tensor], tokenizer: Tokenizer, ends: Collection[int]) -> Iterator[str]:
    """Yields the text of tokens (1,) as they come, whole characters only, up to one of `ends`."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in new_tokens:
        token_id = int(token)
        if token_id in ends:
            break
        piece = decoder.decode(tokenizer.decode_bytes([token_id]))
        if piece:
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def printable(text: str) -> str:
    """The text with U+FFFD for what a terminal would obey: a network of bytes may write an escape sequence."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def generate(
    gpt: Network,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    cache: KeyValueCache | None = None,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yield max_new_tokens times the next token of every row, (B,) int64.

    tokens:      (B, T) int64, the prompt; of a prompt longer than block_size the last block_size tokens are read
    temperature: 0 takes the likeliest token; otherwise logits are divided by it
    top_k:       draw from the k likeliest tokens only
    top_p:       draw from the fewest likeliest tokens that together have probability top_p, after top_k
    generator:   on the device of the tokens; None makes one with a fresh seed. The global generators stay untouched
    use_cache:   False reads the whole context again for each token: slow, the reference for the cache
    cache:       holds the beginning of the tokens, at most all but the last, and goes on from there; None is a new one
    vocab_size:  ids from here on are padding of the embedding and are never drawn

    When the context is full, its last block_size // 2 tokens become the new context and are read again. (A sliding
    window would move every token to another position at every step, and no key could be kept.) So the cost
    per token does not grow with the length of the text, and both settings of use_cache see the same contexts.

    While the iterator lives the model is in eval mode; when it ends or is closed, each module is as it was before.
    Raises UserError at once, before the first token, for arguments that make no sense.
    """
    if tokens.dim() != 2 or tokens.size(1) == 0:
        raise UserError(f"--prompt has shape {tuple(tokens.shape)}; give (B, T) with at least one token per row.")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens={max_new_tokens} must be at least 1; 200 makes a paragraph or two.")
    if not 0.0 <= temperature < math.inf:
        raise UserError(f"--temperature={temperature} must be 0 (always the likeliest token) or more; try 0.8.")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k={top_k} must be at least 1; try 200, or leave it out to draw from all tokens.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(f"--top-p={top_p} must be in (0, 1]; try 0.95, or leave it out to draw from all tokens.")
    if generator is None:
        generator = torch.Generator(tokens.device)
        generator.seed()

    # A function that yields checks nothing until it is iterated, hence this second one.
    def stream() -> Iterator[Tensor]:
        block_size = gpt.config.block_size
        keys = (cache or KeyValueCache(gpt.config.n_layer, block_size)) if use_cache else None
        context = tokens[:, -block_size:]
        modules_in_training = [module for module in gpt.modules() if module.training]
        gpt.eval()
        try:
            for _ in range(max_new_tokens):
                # Around the step and not around the loop: at a yield the caller would run without gradients.
                with torch.no_grad(), by_mkl(tokens.device):
                    read = keys.length if keys is not None else 0
                    unread = context[:, read:]
                    # The end of a prompt whose beginning the cache holds.
                    is_several = read > 0 and unread.size(1) > 1
                    behind = Documents.behind(read, unread.size(1), gpt.lm_head.weight) if is_several else None
                    logits = gpt.next_logits(unread, keys, behind)  # (B, V)
                    next_tokens = sample(logits[:, :vocab_size], temperature, top_k, top_p, generator)  # (B,)
                    context = torch.cat([context, next_tokens[:, None]], dim=1)
                    if context.size(1) > block_size:
                        context = context[:, -max(1, block_size // 2) :]
                        if keys is not None:
                            keys.keep(0)
                yield next_tokens
        finally:
            for module in modules_in_training:
                module.training = True

    return stream()


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Draw one id per row, (B,) int64, from logits (B, V). Raises UserError for logits that are not finite."""
    # A GPU that draws from them ends with an assertion of its own, after which the process can compute nothing there.
    if not torch.isfinite(torch.stack(logits.aminmax())).all():
        raise UserError(
            "the network's outputs are not finite, so it has no next token; go on from an earlier checkpoint, with a "
            "lower model.optim.lr."
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights, ids = candidates(logits, temperature, top_k, top_p)
    return ids.gather(1, torch.multinomial(weights, 1, generator=generator)).squeeze(1)


def candidates(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """Candidates to draw from logits (B, V): weights (B, K), summing to at most 1, and the ids (B, K) of each."""
    V = logits.size(-1)
    if top_p == 1.0:
        top_p = None  # all of it; a rounded sum that reaches 1 early would cut the tail
    if top_k is None and top_p is None:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    else:
        logits, ids = logits.topk(min(top_k or V, V))  # likeliest first
    weights = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p is not None:
        # A token is out when those before it already have top_p: the one that crosses the line stays, as in
        # Holtzman et al. (arXiv:1904.09751), and so the likeliest always does.
        before = weights.cumsum(dim=-1) - weights
        weights = weights.masked_fill(before >= top_p, 0.0)
    return weights, ids
