"""Numbers in environment variables, which schedulers and launchers set, and people too."""

from collections.abc import Mapping

from nanogpt_lit.errors import UserError


def whole_number(name: str, environ: Mapping[str, str], least: int = 0) -> int | None:
    """The number that a variable holds; None where it is unset or empty. Raises UserError for anything else."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    # Nothing that is counted here has more digits, and int() refuses thousands of them in its own words.
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise UserError(f"{name}={text[:40]} in the environment is not a whole number from {least} up; unset it.")
    return int(text)
