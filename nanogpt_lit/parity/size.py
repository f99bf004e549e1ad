"""A training run's settings, made small enough to be run a hundred times."""

from collections.abc import Iterable

from jsonargparse import Namespace

CAPS = {"model.gpt.n_layer": 2, "model.gpt.n_embd": 64, "data.block_size": 32, "data.batch_size": 2}
"""Largest values that are compared by default. float16 runs at a few billion operations a second on a processor."""


def options_given(arguments: Iterable[str]) -> set[str]:
    """The keys that the command line sets."""
    return {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}


def cap(settings: Namespace, given: set[str]) -> list[str]:
    """Lowers what is above CAPS and not given; says what became of what. The text and its tokenizer stay."""
    said = []
    for key, largest in CAPS.items():
        if settings[key] > largest and not is_given(key, given):
            said.append(f"{key.rpartition('.')[2]} {settings[key]} -> {largest}")
            settings[key] = largest
    settings["model.gpt.block_size"] = settings["data.block_size"]
    heads, channels = settings["model.gpt.n_head"], settings["model.gpt.n_embd"]
    if channels % heads and not is_given("model.gpt.n_head", given):
        fitting = max(n for n in range(1, heads) if channels % n == 0)
        said.append(f"n_head {heads} -> {fitting}")
        settings["model.gpt.n_head"] = fitting
    return said


def is_given(key: str, given: set[str]) -> bool:
    """Also by a whole section, as in --data '{...}'."""
    return any(key == option or key.startswith(f"{option}.") for option in given)
