"""The one exception that is told as a sentence."""


class UserError(ValueError):
    """A mistake that the user can mend: names the key or file, its value, and what would work.

    The command line prints the sentence and exits with 2. Every other exception is a defect and keeps its traceback.
    """
