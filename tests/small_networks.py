"""Networks of a second's training, with any tokenizer, as checkpoints: for the tests of the formats of others."""

import random
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch

from nanogpt_lit.checkpoint.exchange import new_run
from nanogpt_lit.checkpoint.run_file import save_run
from nanogpt_lit.data.bpe import train_ranks
from nanogpt_lit.data.tokenizer import (
    EOT,
    GPT2_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    gpt2_tokenizer,
)
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.network import Network, NetworkConfig
from nanogpt_lit.gpt.networks import build

LANGUAGES = (
    "It's 1,234 o'clock, and they'd rather:\n\tdef f(x):\n    return x  # 3.14\n",
    "Größe, naïve Café-Besucher und die Straße; „Ja“ – 5 €.\n",
    "Привет, мир! Съешь ещё этих мягких французских булок, 12345.\n",
    "中文字符，日本語のテキスト。こんにちは世界！ 🙂👩\u200d👩\u200d👧 한국어\n",
)
TEXT = "".join(LANGUAGES) * 4
LETTERS = (
    "abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyzäöüß", "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "的一是不了人我在有他这中大来上国個ひらがなカタカナ한국어",
)  # fmt: skip
BETWEEN = [" "] * 12 + [
    ", ",
    ". ",
    "\n",
    "\n\n",
    "  ",
    " \n\t",
    "'s ",
    "'re ",
    " (",
    ") ",
    "-",
    " 12",
    "345",
    "6.7",
    "! ",
    "…",
    "🙂",
]


@cache
def much_text():
    """Text in four languages, of the words above and of words that no language has."""
    draw, parts, size = random.Random(1), [], 0
    while size < 2**18:
        language = draw.randrange(4)
        known = LANGUAGES[language].split(" ")
        for _ in range(draw.randrange(1, 200)):
            word = (
                draw.choice(known)
                if draw.random() < 0.5
                else "".join(draw.choices(LETTERS[language], k=draw.randrange(1, 12)))
            )
            parts += [word.capitalize() if draw.random() < 0.1 else word, draw.choice(BETWEEN)]
            size += len(parts[-2].encode()) + len(parts[-1].encode())
    return "".join(parts)


def new_tokenizer(kind):
    match kind:
        case "gpt2":
            return gpt2_tokenizer()
        case "byte":
            return ByteTokenizer()
        case "char":
            return CharTokenizer.of([TEXT])
        case "bpe":
            ranks = train_ranks([TEXT], 300)
            return BytePairTokenizer("bpe:301", ranks, GPT2_PATTERN, {EOT: 300})
        case "pattern":
            ranks = train_ranks([TEXT], 300)
            return BytePairTokenizer(
                "mine", ranks, r" ?\p{L}++|\p{N}{1,3}|\s++|[^\s\p{L}\p{N}]++", {EOT: 300, "<|user|>": 301}
            )
    raise AssertionError(kind)


def trained(tokenizer, text=TEXT, steps=60, vocab_size=None, kind=GPTConfig, **shape):
    """A network after a few steps on the text: what it says is no coin's toss."""
    torch.manual_seed(1)
    sizes = {"block_size": 64, "n_layer": 2, "n_head": 3, "n_embd": 48, **shape}
    gpt = build(kind(vocab_size=vocab_size or tokenizer.vocab_size, **sizes))
    tokens = torch.tensor([tokenizer.eot, *tokenizer.encode(text).tolist()])
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    T = min(32, sizes["block_size"])
    for step in range(steps):
        starts = [0, *torch.randint(len(tokens) - T, (3,)).tolist()] if step else [0] * 4
        window = torch.stack([tokens[start : start + T + 1] for start in starts])
        gpt.loss(window[:, :-1], window[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return gpt.eval()


def saved(path: Path, gpt, tokenizer):
    save_run(path, new_run(path, gpt.state_dict(), gpt.config, tokenizer))
    return path


def modern(config: NetworkConfig, **shape) -> LlamaConfig:
    """The network of the modern recipe, of the same size."""
    sizes = {field.name: getattr(config, field.name) for field in fields(NetworkConfig)}
    return LlamaConfig(**{**sizes, "qk_norm": True, **shape})


def randomised(config: NetworkConfig, dtype: torch.dtype = torch.float32) -> Network:
    """A network with no weight at zero or one, so that a forgotten one shows."""
    torch.manual_seed(0)
    gpt = build(config).to(dtype)
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return gpt
