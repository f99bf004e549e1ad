"""The site of these pages: `python -m sphinx -W docs build/site`, then open build/site/index.html."""

import re
import sys
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "nanogpt_lit"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
smartquotes = False  # -- is the beginning of an option
html_theme = "furo"
html_title = "nanogpt_lit"
html_static_path = html_css_files = ["site.css"]
highlight_language = "none"  # of blocks that name no language: what a command prints
html_show_copyright = html_show_sourcelink = html_copy_source = html_use_index = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # Lightning's own hooks are described on Lightning's site
autodoc_typehints_format = "short"
KEYS = "<!-- the keys are written here when the site is built -->"
EXPORTS = "<!-- the classes and functions are written here when the site is built -->"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("source-read", written_out)


def as_restructured_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: lines that name an argument or an error stay lines, backticks hold code."""
    text: list[str] = []
    for line in lines:
        pieces = re.split(r"`+([^`]+)`+", line.strip())  # every second one is code
        line = "".join(f"``{s}``" if k % 2 else re.sub(r"([*|_])", r"\\\1", s) for k, s in enumerate(pieces))
        starts = re.match(r"[\w\\]+(, [\w\\]+)*: |Raises |Returns ", line) or (text and text[-1].endswith((".", ")")))
        if not line or not text or not text[-1]:
            text.append(f"| {line}" if line else "")
        elif starts:
            text.append(f"| {line}")
        else:
            text[-1] += f" {line}"
    lines[:] = [*text, ""]


def written_out(app: Any, page: str, source: list[str]) -> None:
    for mark, write in ((KEYS, keys), (EXPORTS, exports)):
        if mark in source[0]:
            source[0] = source[0].replace(mark, write())


def exports() -> str:
    """Markdown: what nanogpt_lit.__all__ names, each with its docstring and that of its public members."""
    import nanogpt_lit

    pages = []
    for name in nanogpt_lit.__all__:
        if not name.startswith("_"):
            kind = "autoclass" if isinstance(getattr(nanogpt_lit, name), type) else "autofunction"
            members = "\n   :members:" if kind == "autoclass" else ""
            pages.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: nanogpt_lit.{name}{members}\n```\n")
    return "\n".join(pages)


def keys() -> str:
    """Markdown: each key of fit's parser with its default, the kind of its value and its help, section by section."""
    from nanogpt_lit.cli.help import describe
    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning

    quiet_lightning()
    parser = SettingsCLI(args=[], describes_options=True).parser
    describe(parser)
    sections: dict[str, list[str]] = {"model": [], "data": [], "": [], "trainer": []}  # in this order
    for action in parser._actions:
        name, hint = action.dest, getattr(action, "_typehint", None)
        if hint is None or name.endswith(".help") or name in ("config", "print_config"):
            continue
        section = name.rpartition(".")[0]
        default = "null" if action.default is None else str(action.default).lower()
        said = " ".join((action.help or "").split()).replace("``", "`").replace("<", "\\<")
        entry = f"`{name}`\n: `{default}` ({kind(hint)})\n\n  {said}\n"
        sections.setdefault(section, []).append(entry)
    top = list(sections)
    ordered = sorted(sections.items(), key=lambda item: (top.index(item[0].partition(".")[0]), item[0]))
    return "\n".join(f"## {name or 'Of the run'}\n\n" + "\n".join(entries) for name, entries in ordered)


def kind(hint: Any) -> str:
    """A type hint in the words of YAML."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if parts := typing.get_args(hint):
        if typing.get_origin(hint) in (list, dict, tuple):
            return {list: "a list", dict: "a mapping", tuple: "a list"}[typing.get_origin(hint)]
        return " or ".join(dict.fromkeys(kind(part) for part in parts if part is not Ellipsis))
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
