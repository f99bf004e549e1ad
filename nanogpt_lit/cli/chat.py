"""generate --chat: a conversation in the terminal, or by lines through a pipe."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.conversation import Conversation
from nanogpt_lit.gpt.generate import printable
from nanogpt_lit.gpt.network import Network

RESET = "/reset"


def talk(gpt: Network, tokenizer: Tokenizer, options: Namespace) -> None:
    """Answers each line of standard input. options: of the command"""
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
