"""`accelerate-config`: its arguments. It imports torch late, and not at all from accelerate's file to ours."""

import os
from pathlib import Path

from nanogpt_lit.cli.options import parser_of


def accelerate_config(arguments: list[str]) -> int:
    """`accelerate-config --from FILE` or `--to-trainer FILE`: prints the other framework's file for the same set-up."""
    parser = parser_of(
        "accelerate-config",
        "Translate between a YAML of fit and the file of `accelerate config`. What has no counterpart is "
        "listed at the end, as comments, with what to do about it.",
        usage="(--from FILE [--option.of.fit VALUE ...] | --to-trainer FILE)",
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="yaml", metavar="FILE", help="a YAML of fit; prints accelerate's file")
    direction.add_argument(
        "--to-trainer", type=Path, metavar="FILE", help="accelerate's file; prints the trainer section"
    )
    options, settings_of_fit = parser.parse_known_args(arguments[1:])

    from nanogpt_lit.accelerate_config.accelerate_file import read_accelerate_file
    from nanogpt_lit.accelerate_config.from_accelerate import to_trainer
    from nanogpt_lit.accelerate_config.into_accelerate import into_accelerate

    if options.to_trainer is not None:
        if settings_of_fit:
            parser.error(f"--to-trainer takes no {settings_of_fit[0]}")
        translation = to_trainer(read_accelerate_file(options.to_trainer))
        print(translation.text("Without a counterpart in the trainer section:"), end="")
        return 0

    import yaml  # type: ignore[import-untyped]

    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning

    quiet_lightning()
    cli = SettingsCLI(args=[f"--config={options.yaml}", *settings_of_fit])
    whole, changed = (yaml.safe_load(cli.parser.dump(cli.config, skip_default=skip)) for skip in (False, True))
    model = whole["model"]
    translation = into_accelerate(
        whole["trainer"], changed.get("trainer", {}), model["compile"], os.environ, model["network"]
    )
    print(translation.text("Without a counterpart in accelerate's file:"), end="")
    return 0
