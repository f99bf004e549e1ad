"""`generate`: text from a checkpoint, or answers. It imports torch late."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.errors import UserError

if TYPE_CHECKING:
    from nanogpt_lit.data.tokenizer import Tokenizer
    from nanogpt_lit.gpt.network import Network

RESET = "/reset"


def generate(arguments: list[str]) -> int:
    """`generate --ckpt FILE --prompt TEXT`: streams text to standard output."""
    parser = parser_of(
        "generate",
        "Continue a text with a checkpoint, token by token, with the checkpoint's own tokenizer.",
    )
    parser.add_argument(
        "--ckpt",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="a checkpoint, or any model that convert reads; several answer as one, by the mean of their probabilities",
    )
    parser.add_argument("--prompt", default="", help="how the text begins; empty begins a new document")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer --prompt, then each line of standard input, with the model's chat template",
    )
    parser.add_argument(
        "--system", default="", metavar="TEXT", help="with --chat: the instructions that the conversation begins with"
    )
    parser.add_argument("--max-new-tokens", type=int, default=500, metavar="N", help="tokens to make (500)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts to make (1)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token, 1 draws as trained (0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that together have the probability P"
    )
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same text (1337)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    options = parser.parse_args(arguments[1:])
    if options.num_samples < 1:
        raise UserError(f"--num-samples={options.num_samples} must be at least 1.")
    if not abs(options.seed) < 2**63:
        raise UserError(f"--seed={options.seed} is more than 64 bits hold; 1337 works.")

    if options.chat and options.num_samples > 1:
        raise UserError(f"--num-samples={options.num_samples} is for texts; --chat gives one answer to each question.")
    if options.system and not options.chat:
        raise UserError(f"--system={options.system} is for --chat; --prompt begins a text.")

    from nanogpt_lit.checkpoint.convert import load_mean
    from nanogpt_lit.gpt.generate import continue_text, printable
    from nanogpt_lit.runtime.machine import chosen_device

    gpt, tokenizer = load_mean(options.ckpt, chosen_device(options.device))
    if options.chat:
        talk(gpt, tokenizer, options)
        return 0
    for sample in range(options.num_samples):
        pieces = continue_text(
            gpt,
            tokenizer,
            options.prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed + sample,
        )
        if sample:
            print("\n" + "-" * 20)
        sys.stdout.write(options.prompt)
        for piece in pieces:
            sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
        print()
    return 0


# --chat: a conversation in the terminal, or by lines through a pipe.


def talk(gpt: "Network", tokenizer: "Tokenizer", options: Namespace) -> None:
    """Answers each line of standard input. options: of the command"""
    from nanogpt_lit.gpt.conversation import Conversation
    from nanogpt_lit.gpt.generate import printable

    if tokenizer.chat_template is None:
        raise UserError(
            f"--ckpt={options.ckpt[0]} has no chat template: it continues texts, and was not taught to answer; leave "
            "--chat out, or fine-tune it with data.documents: conversations."
        )
    conversation = Conversation(
        gpt, tokenizer, options.system, options.max_new_tokens, options.seed,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
    )  # fmt: skip
    shown = printable if sys.stdout.isatty() else str
    for question in chain([options.prompt] if options.prompt else [], questions()):
        if question == RESET:
            conversation.reset()
            continue
        try:
            for piece in conversation.answer(question):
                print(shown(piece), end="", flush=True)
        except KeyboardInterrupt:  # enough of this answer
            pass
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", end="", file=sys.stderr)
        print(flush=True)


def questions() -> Iterator[str]:
    """Lines with something in them. At a terminal they are asked for, and can be edited."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401  # which is all that input() needs for it
    print(f"Ctrl-D ends the conversation, {RESET} begins a new one, Ctrl-C cuts an answer short.")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question:
            yield question
