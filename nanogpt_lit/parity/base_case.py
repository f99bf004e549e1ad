"""The case that the grid varies: the YAML's network, optimizer, text and tokenizer, made small where they are large."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from jsonargparse import Namespace

from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.networks import described, section_of
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.runs import Case

# Largest values that are compared by default: float16 runs at a few billion operations a second on a CPU.
CAPS = {"n_layer": 2, "n_embd": 64, "data.block_size": 32, "data.batch_size": 2}
LARGE_VOCABULARY = 8192  # from here on the head is nearly all of the work
CAPS_OF_A_LARGE_VOCABULARY = {"n_embd": 32, "data.block_size": 16}


def options_given(arguments: Iterable[str]) -> set[str]:
    """The keys that the command line sets."""
    return {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}


class Size:
    """Lower what is too large in the settings and not given on the command line. The text and its tokenizer stay."""

    def __init__(self, settings: Namespace, given: set[str]) -> None:
        self.settings = settings
        self.given = given
        self.changed: dict[str, int] = {}
        """Values of the YAML that were lowered, by key."""

    def cap(self, caps: Mapping[str, int]) -> None:
        """caps: largest values, by key; of the network's sizes, by their names"""
        section = f"model.{section_of(self.settings.model)}"
        for key, largest in caps.items():
            self._lower(key if "." in key else f"{section}.{key}", largest)
        heads, channels = self.settings[f"{section}.n_head"], self.settings[f"{section}.n_embd"]
        if heads > 1 and channels % heads:
            self._lower(f"{section}.n_head", max(n for n in range(1, heads) if channels % n == 0))
        self.settings[f"{section}.block_size"] = self.settings["data.block_size"]

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


def from_yaml(cli: SettingsCLI, steps: int, size: Size | None) -> tuple[Case, float, TokenDataModule]:
    """The case that the grid varies, the limit of clipping, and the data. size: makes it small"""
    if size is not None:
        size.cap(CAPS)
    cli.settings.trainer.precision = "32-true"  # the grid chooses
    cli.settings.model.compile = False  # the loops are compared, and each case would be compiled anew
    cli.complete_settings()
    if size is not None:
        model = cli.settings.model
        if model[section_of(model)].vocab_size > LARGE_VOCABULARY:
            size.cap(CAPS_OF_A_LARGE_VOCABULARY)
        if size.changed:
            print(f"small for the comparison: {size} (--full-size, or an option of fit, keeps the YAML's)")
    module, data = cli.build()
    data.setup()
    schedule = asdict(module.schedule_config) | {"total_steps": steps}
    schedule["warmup_steps"] = min(schedule["warmup_steps"], steps // 4)
    settings = LoopSettings(steps, val_check_interval=2, limit_val_batches=2, seed=cli.seed or 0)
    configs = (*described(module.gpt.config), "optim", "schedule")
    case = Case(
        settings,
        module.gpt.config,
        module.optim_config,
        ScheduleConfig(**schedule),
        module_options={name: value for name, value in module.hparams.items() if name not in configs},
    )
    return case, cli.settings.trainer.gradient_clip_val or 1.0, data
