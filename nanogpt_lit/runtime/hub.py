"""The Hugging Face hub, which may not answer."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def retries_said_once() -> Iterator[None]:
    """Say in one line that the hub does not answer; its library says two with each of half a dozen tries."""
    logger, said_once = logging.getLogger("huggingface_hub.utils._http"), _SaidOnce()
    logger.addFilter(said_once)
    try:
        yield
    finally:
        logger.removeFilter(said_once)


class _SaidOnce(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        if not self._said:
            print("hub: no answer; trying again for half a minute", file=sys.stderr, flush=True)
        self._said = True
        return False
