"""`tune`: its arguments. It imports torch late."""

import re
from pathlib import Path

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.collector import quick_imports
from nanogpt_lit.runtime.durable import check_writable

SECONDS = {"s": 1, "min": 60, "h": 3600}


def tune(arguments: list[str]) -> int:
    """`tune --config FILE`: proposes a learning rate, a batch and a recipe for this text on this machine."""
    parser = parser_of(
        "tune",
        "Try other learning rates, batch sizes and recipes in short runs of equal time, and write a YAML with what "
        "ends at the lowest validation loss, and a picture. Your values stay unless the gain is statistically clear. "
        "Takes every option of fit as well. Ctrl-C ends it with the best so far.",
        usage="--config FILE [--budget TIME] [--out FILE] [--SECTION.KEY VALUE ...]",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the YAML to improve on")
    parser.add_argument("--budget", default="10min", metavar="TIME", help="such as 600s, 10min or 1h (10min)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the YAML to write (beside the given one: X_tuned.yaml)"
    )
    options, settings_of_fit = parser.parse_known_args(arguments[1:])
    budget_s = seconds_of_budget(options.budget)
    if not options.config.is_file():
        raise UserError(f"--config={options.config} is no file; configs/quickstart.yaml is one.")
    out = options.out or options.config.with_name(f"{options.config.stem}_tuned.yaml")
    picture = out.with_suffix(".svg")
    if out == picture:
        raise UserError(
            f"--out={out} is the YAML, and the picture beside it would have its name; name it {out.stem}.yaml."
        )
    for path in (out, picture):
        if path.exists():
            raise UserError(f"--out={out} would write {path}, which is there already; name another, or move it away.")
    check_writable("--out", out.parent)

    with quick_imports():
        from nanogpt_lit.tune.run import run

    return run(options.config, settings_of_fit, budget_s, out)


def seconds_of_budget(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--budget={text} is not a time; 600s, 10min and 1h are.")
    return float(match[1]) * SECONDS[match[2]]
