"""A vocabulary that grows: special tokens of one's own behind those that are there, whose ids stay."""

from collections.abc import Sequence

from nanogpt_lit.data.tokenizer import EOT, GPT2_PATTERN, BytePairTokenizer, ByteTokenizer, Tokenizer
from nanogpt_lit.errors import UserError


def check_special_tokens(texts: Sequence[str], tokenizer: str) -> None:
    """Raises UserError for what cannot be a special token, and for a tokenizer that takes none.

    tokenizer: as data.tokenizer names it
    """
    for text in texts:
        if not text or text == EOT or len(text.split()) != 1 or text != text.strip() or texts.count(text) > 1:
            raise UserError(
                f"data.special_tokens has {text!r}; each is written once, without white space, and is not {EOT}, which "
                "every tokenizer has: ['<|user|>', '<|assistant|>'] works."
            )
    if texts and tokenizer == "char":
        raise UserError(
            "data.special_tokens does not go with data.tokenizer=char, whose tokens are single characters; gpt2, byte, "
            "bpe:N and .tiktoken files take them."
        )


def with_special_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer with these special tokens, the new ones behind its vocabulary.

    Raises UserError for a char tokenizer.
    """
    match tokenizer:
        case BytePairTokenizer():
            ranks, pattern, specials = tokenizer.ranks, tokenizer.pattern, tokenizer.specials
        case ByteTokenizer():
            ranks, pattern, specials = {bytes([b]): b for b in range(256)}, GPT2_PATTERN, {EOT: tokenizer.eot}
        case _:
            check_special_tokens(texts, tokenizer.kind)
            return tokenizer
    new = [text for text in texts if text not in specials]
    if not new:
        return tokenizer
    behind = {text: tokenizer.vocab_size + n for n, text in enumerate(new)}
    return BytePairTokenizer(f"{tokenizer.name}+{len(new)}", ranks, pattern, {**specials, **behind})
