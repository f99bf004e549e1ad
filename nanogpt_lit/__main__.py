"""`python -m nanogpt_lit COMMAND`. Light commands answer at once: torch is imported when there is work for it."""

import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from nanogpt_lit.errors import NothingToDo, UserError, shown

COMMANDS = {
    "fit": ("nanogpt_lit.cli.fit:run", "train, from text or from a checkpoint"),
    "generate": ("nanogpt_lit.cli.generate:generate", "continue a text with a checkpoint"),
    "plan": ("nanogpt_lit.cli.plan:plan", "tell whether a run fits a GPU, and what to change if not"),
    "tune": ("nanogpt_lit.tune.command:tune", "find a better learning rate, batch size and recipe"),
    "forecast": ("nanogpt_lit.forecast.command:forecast", "tell a run's loss and hours from minutes of small runs"),
    "doctor": ("nanogpt_lit.doctor.command:doctor", "check this machine, or a run, and say what to do"),
    "init-config": (
        "nanogpt_lit.cli.packaged_configs:init_config",
        "copy a configuration of the package, to change it",
    ),
    "prepare": ("nanogpt_lit.cli.prepare:prepare", "turn text into token shards, as fit does if there are none"),
    "validate": ("nanogpt_lit.cli.fit:run", "measure validation loss and perplexity of a checkpoint"),
    "test": ("nanogpt_lit.cli.fit:run", "the same on a test set, if you bring one"),
    "eval": ("nanogpt_lit.evaluate.command:evaluate", "compare checkpoints: bits per byte, HellaSwag, lm-eval"),
    "convert": ("nanogpt_lit.cli.convert:convert", "convert checkpoints from and to other formats"),
    "fit-accelerate": ("nanogpt_lit.cli.fit_accelerate:run", "train with accelerate instead of Lightning, same bits"),
    "accelerate-config": (
        "nanogpt_lit.accelerate_config.command:accelerate_config",
        "translate a YAML of fit for accelerate, and back",
    ),
    "parity": ("nanogpt_lit.parity.command:compare", "compare Lightning, accelerate and a plain loop bit by bit"),
    "keep-alive-unit": (
        "nanogpt_lit.supervise.keep_alive:keep_alive_unit",
        "print a unit that restarts fit after a reboot",
    ),
}
OTHER_NAMES = {
    "train": "fit", "finetune": "fit", "resume": "fit", "evaluate": "eval",
    "sample": "generate", "export": "convert", "tokenize": "prepare", "memory": "plan", "check": "doctor",
}  # fmt: skip
"""Names that other programs give them."""

OUTPUT_CLOSED = 141
"""The exit code where nobody reads the output any more: that of SIGPIPE, as a shell counts it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or 2 with one sentence for something the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # LANG=C and Windows' pipes hold few characters: no text ends a run
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        from nanogpt_lit import __version__

        print(f"nanogpt_lit {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: {unknown(arguments[0])}", file=sys.stderr)
        return 2
    from nanogpt_lit.cli.packaged_configs import with_packaged_configs
    from nanogpt_lit.runtime.clock import begin_command

    begin_command()
    arguments = with_packaged_configs(arguments)
    if arguments[0] in ("fit", "fit-accelerate"):
        from nanogpt_lit.runtime.launch import KEEP_ALIVE, stop_with_supervisor, supervised

        if KEEP_ALIVE in arguments:
            from nanogpt_lit.supervise.keep_alive import keep_alive

            return exit_code(lambda: keep_alive(arguments))
        if supervised():
            stop_with_supervisor()
    return exit_code(lambda: command_of(arguments[0])(arguments))


def help_text() -> str:
    from nanogpt_lit.cli.options import program

    return "\n".join(
        [
            f"usage: {program()} COMMAND [--help] ...",
            "",
            "Train and fine-tune GPT-2 and Llama networks on a 4 GB laptop GPU or a CPU.",
            "",
            *(f"  {name:<19}{text}" for name, (_, text) in COMMANDS.items()),
            "",
            f"Start with:  {program()} fit --config quickstart",
            "--config takes a file, or one of the names that init-config lists.",
        ]
    )


def unknown(word: str) -> str:
    """Say that there is no such command, and which may be meant."""
    if meant := OTHER_NAMES.get(word.lower()) or next(iter(get_close_matches(word, COMMANDS, n=1)), None):
        return f"there is no command {word!r}; did you mean {meant}? There are {', '.join(COMMANDS)}."
    return f"there is no command {word!r}; there are {', '.join(COMMANDS)}."


def command_of(name: str) -> Callable[[list[str]], int]:
    from nanogpt_lit.runtime.collector import quick_imports

    module_name, _, function_name = COMMANDS[name][0].partition(":")
    with quick_imports():
        return getattr(import_module(module_name), function_name)


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command; what the user can mend becomes one sentence and 2 instead of a traceback."""
    from nanogpt_lit.runtime.launch import report_error, supervised

    if sys.flags.safe_path:  # what -P says to this process alone, the processes that it starts have to hear too
        os.environ["PYTHONSAFEPATH"] = "1"
    try:
        return command()
    except NothingToDo as done:
        print(done, flush=True)
        return 0
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and is_output_closed():
            return OUTPUT_CLOSED
        if supervised():
            report_error(error)
        # A reset connection is a process that died, of several say: no file that the user could look after.
        of_a_file = isinstance(error, OSError) and not isinstance(error, ConnectionResetError)
        if not of_a_file and not isinstance(error, UserError):
            raise
        print(f"error: {shown(sentence(error))}", file=sys.stderr)
        return 2


def is_output_closed() -> bool:
    """Tell whether the reader of the output has gone, `head` perhaps: then we stop writing. Other pipes break too."""
    if not hasattr(select, "poll"):  # Windows, whose pipes break with another error
        return False
    try:
        output = sys.stdout.fileno()
    except OSError:  # one that is no file
        return False
    poll = select.poll()
    poll.register(output, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # or Python complains when it ends
    return closed


def sentence(error: BaseException) -> str:
    """Describe an error in a sentence, with the name of the file where it is about one."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}."
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
