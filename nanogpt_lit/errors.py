"""The exceptions that are shown as one sentence, without a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: names the key or file, its value, and what would work.

    The command line prints the sentence and exits with 2. Every other exception is a defect and keeps its traceback.
    """


class NothingToDo(Exception):  # noqa: N818 - it is no error
    """What was asked for is done already: the command line prints why, and exits with 0."""


def shown(text: object) -> str:
    """Text for a terminal: what it would obey, and what no encoding holds, is written as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))
