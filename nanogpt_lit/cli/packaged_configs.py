"""The configurations that come with the package: found by their names, and copied out to be changed."""

from collections.abc import Sequence
from pathlib import Path

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.errors import UserError

NAMED_BY = ("--config", "-c", "--from")
"""Options that take the YAML of a run."""
PACKAGE = Path(__file__).resolve().parents[1]


def packaged_configs() -> dict[str, Path]:
    """The file of each by its name: in the installed package, or beside it in a checkout of the repository."""
    folders = (PACKAGE / "configs", PACKAGE.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def with_packaged_configs(arguments: Sequence[str]) -> list[str]:
    """Put the path of a packaged configuration where the command line says its name, as in `--config rtx2050`.

    A file of that name in the working directory comes first.
    """
    written = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if not (equals and option in NAMED_BY):
            option, value = before, argument
        path = None if option not in NAMED_BY or Path(value).exists() else packaged_configs().get(value)
        written.append(argument if path is None else argument[: len(argument) - len(value)] + str(path))
    return written


def init_config(arguments: list[str]) -> int:
    """`init-config NAME [FILE]`: write a copy of a packaged configuration, to be changed."""
    parser = parser_of(
        "init-config",
        "Copy a configuration that comes with the package, to change it. Without NAME, list them; --config takes "
        "the same names.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of them, such as rtx2050")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="where to write it (NAME.yaml)")
    options = parser.parse_args(arguments[1:])
    configs = packaged_configs()
    if options.name is None:
        for name, path in configs.items():
            print(f"{name:<24}{first_sentence(path)}")
        return 0
    if options.name not in configs:
        raise UserError(f"there is no packaged configuration {options.name!r}; there are {', '.join(configs)}.")
    file = options.file or Path(f"{options.name}.yaml")
    try:
        with file.open("x", encoding="utf-8") as copy:
            copy.write(configs[options.name].read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{file} exists and is left as it is; name another file to write to.") from None
    print(f"wrote {file}; train with: python -m nanogpt_lit fit --config {file}")
    return 0


def first_sentence(config: Path) -> str:
    """The sentence that a configuration begins with, in its comment."""
    comment = []
    for line in config.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".")
