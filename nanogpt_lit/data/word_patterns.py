"""The patterns by which known tokenizers cut text into words, and Hugging Face's pre-tokenizers as such a pattern."""

from typing import Any

from nanogpt_lit.data.tokenizer import GPT2_PATTERN

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
"""Each digit alone."""
# SmolLM's tokenizer first takes each digit out, and cuts what lies between as GPT-2. So white space before a digit is
# white space at the end of a text: all of it together, and no space with the digit.
SMOLLM_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}++", r"\p{N}").replace(r"|\s++$", r"|\s++(?=\p{N})|\s++$")

NAMES = {
    GPT2_PATTERN: "gpt-2",
    SMOLLM_PATTERN: "smollm",
    LLAMA3_PATTERN: "llama-bpe",
    QWEN2_PATTERN: "qwen2",
}
"""llama.cpp's name of each (tokenizer.ggml.pre)."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
"""GPT-2's pattern, and then bytes."""
BYTES = {**BYTE_LEVEL, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def pre_tokenizer_of(pattern: str) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json that cuts by this pattern."""
    if pattern == GPT2_PATTERN:
        return BYTE_LEVEL
    if pattern == SMOLLM_PATTERN:
        return {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


def pattern_of(pre_tokenizer: Any) -> str | None:
    """The pattern that cuts text as this pre_tokenizer of a tokenizer.json; None for a way that is not known."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [*before, {"type": "ByteLevel"} as last]}:
            pass
        case _:
            before, last = [], pre_tokenizer
    match last:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            by_gpt2 = last.get("use_regex", True)
        case _:
            return None
    match before:
        case [] if by_gpt2:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True}] if by_gpt2:
            return SMOLLM_PATTERN
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated" | "Removed", **rest}]:
            return pattern if not by_gpt2 and isinstance(rest.get("invert"), bool) else None
    return None
