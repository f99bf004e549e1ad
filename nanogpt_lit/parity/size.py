"""A training run's settings, made small enough to be run a hundred times."""

from collections.abc import Iterable, Mapping

from jsonargparse import Namespace

# Largest values that are compared by default: float16 runs at a few billion operations a second on a processor.
CAPS = {"model.gpt.n_layer": 2, "model.gpt.n_embd": 64, "data.block_size": 32, "data.batch_size": 2}
LARGE_VOCABULARY = 8192  # from here on the head is nearly all of the work
CAPS_OF_A_LARGE_VOCABULARY = {"model.gpt.n_embd": 32, "data.block_size": 16}


def options_given(arguments: Iterable[str]) -> set[str]:
    """The keys that the command line sets."""
    return {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}


class Size:
    """Lowers what is too large in the settings and not given on the command line. The text and its tokenizer stay."""

    def __init__(self, settings: Namespace, given: set[str]) -> None:
        self.settings = settings
        self.given = given
        self.changed: dict[str, int] = {}
        """What the YAML had, by key."""

    def cap(self, caps: Mapping[str, int]) -> None:
        for key, largest in caps.items():
            self._lower(key, largest)
        heads, channels = self.settings["model.gpt.n_head"], self.settings["model.gpt.n_embd"]
        if heads > 1 and channels % heads:
            self._lower("model.gpt.n_head", max(n for n in range(1, heads) if channels % n == 0))
        self.settings["model.gpt.block_size"] = self.settings["data.block_size"]

    def _lower(self, key: str, largest: int) -> None:
        # Also given by a whole section, as in --data '{...}'.
        given = any(key == option or key.startswith(f"{option}.") for option in self.given)
        if self.settings[key] > largest and not given:
            self.changed.setdefault(key, self.settings[key])
            self.settings[key] = largest

    def __str__(self) -> str:
        return ", ".join(
            f"{key.rpartition('.')[2]} {before} -> {self.settings[key]}" for key, before in self.changed.items()
        )
