"""`forecast`: its arguments. It imports torch late."""

from pathlib import Path

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.collector import quick_imports
from nanogpt_lit.tune.command import seconds_of_budget


def forecast(arguments: list[str]) -> int:
    """`forecast --config FILE`: the loss and the hours of a run, from minutes of smaller ones."""
    parser = parser_of(
        "forecast",
        "Forecast the validation loss, the bits per byte and the hours of a YAML's run, with an interval, from smaller "
        "and shorter runs, and the best size of a network for the hours there are. Says so where it cannot know. Takes "
        "every option of fit as well. Ctrl-C ends it with what it has.",
        usage="--config FILE [--budget TIME] [--hours H] [--picture FILE] [--SECTION.KEY VALUE ...]",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the YAML of the run")
    parser.add_argument("--budget", default="10min", metavar="TIME", help="such as 600s, 10min or 1h (10min)")
    parser.add_argument("--hours", type=float, metavar="H", help="hours to find a network for (those of the run)")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help=".svg or .png (forecast.svg in trainer.default_root_dir)"
    )
    options, settings_of_fit = parser.parse_known_args(arguments[1:])
    budget_s = seconds_of_budget(options.budget)
    if not options.config.is_file():
        raise UserError(f"--config={options.config} is no file; configs/quickstart.yaml is one.")
    if options.hours is not None and not 0 < options.hours < 1e6:
        raise UserError(f"--hours={options.hours} is no time to train in; 5 is.")
    if options.picture is not None and options.picture.suffix not in (".svg", ".png"):
        raise UserError(f"--picture={options.picture} must end in .svg or .png.")

    with quick_imports():
        from nanogpt_lit.forecast.run import run

    return run(options.config, settings_of_fit, budget_s, options.hours, options.picture)
