"""One optimizer step as a picture: memory by category, operation by operation, as an SVG file."""

from html import escape
from itertools import groupby
from pathlib import Path

from nanogpt_lit.errors import UserError
from nanogpt_lit.plan.allocator import MIB
from nanogpt_lit.plan.plan import Plan
from nanogpt_lit.plan.trace import CATEGORIES, Moment

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 960, 440, 64, 56, 44, 130
COLOURS = {
    "weights": "#33548f", "gradients": "#6c8ebf", "optimizer": "#a9c0e0", "activations": "#e08f3e",
    "logits": "#c0392b", "casts": "#e5c07b", "temporaries": "#8e9aa6", "workspace": "#c9ced6", "batch": "#555555",
}  # fmt: skip


def write_picture(plan: Plan, title: str, path: Path) -> None:
    """Raises UserError when the file does not end in .svg."""
    if path.suffix != ".svg":
        raise UserError(f"--picture={path} must end in .svg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(plan, title), encoding="utf-8")


def svg(plan: Plan, title: str) -> str:
    moments = _fullest_of_each(plan.own.footprint.timeline, WIDTH - LEFT - LEGEND)
    usable, reserved = plan.budget.usable_mib, plan.own.footprint.reserved_mib
    top_mib = 1.08 * max(usable, reserved)
    right, floor = WIDTH - LEGEND, HEIGHT - BOTTOM

    def x(index: float) -> float:
        return LEFT + index / max(1, len(moments) - 1) * (right - LEFT)

    def y(mib: float) -> float:
        return floor - mib / top_mib * (floor - TOP)

    text = 'font-family="sans-serif" font-size="12" fill="#222222"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {text}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}: memory during one optimizer step, in MiB</text>',
    ]
    step = 10 ** (len(str(int(top_mib))) - 1)
    step = step if top_mib / step >= 3 else step / 2
    for tick in range(int(top_mib / step) + 1):
        parts.append(_line(LEFT, y(tick * step), right, y(tick * step), "#e4e4e4"))
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick * step) + 4:.1f}" text-anchor="end">{tick * step:,.0f}</text>')
    below = [0.0] * len(moments)
    legend_y = floor
    for name in CATEGORIES:
        sizes = [moment.bytes_by_category.get(name, 0) / MIB for moment in moments]
        above = [low + size for low, size in zip(below, sizes, strict=True)]
        if max(sizes) >= 0.002 * top_mib:
            edge = [f"{x(i):.1f},{y(mib):.1f}" for i, mib in enumerate(above)]
            edge += [f"{x(i):.1f},{y(below[i]):.1f}" for i in reversed(range(len(below)))]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{COLOURS[name]}"/>')
            parts.append(f'<rect x="{right + 14}" y="{legend_y - 10}" width="11" height="11" fill="{COLOURS[name]}"/>')
            parts.append(f'<text x="{right + 31}" y="{legend_y}">{name}</text>')
            legend_y -= 19
        below = above
    for mib, label, colour in ((usable, "usable", "#1e8449"), (reserved, "reserved", "#c0392b")):
        parts.append(_line(LEFT, y(mib), right, y(mib), colour, ' stroke-dasharray="6 4"'))
        # A white rim keeps the words readable over any colour.
        rim = 'stroke="#ffffff" stroke-width="3" paint-order="stroke"'
        parts.append(f'<text x="{LEFT + 6}" y="{y(mib) - 5:.1f}" fill="{colour}" {rim}>{label} {mib:,.0f}</text>')
    start = 0
    for phase, run in groupby(moments, key=lambda moment: moment.phase):
        length = len(list(run))
        parts.append(_line(x(start), TOP, x(start), floor + 6, "#999999"))
        parts.append(f'<text x="{x(start) + 4:.1f}" y="{floor + 20}" fill="#666666">{phase}</text>')
        start += length
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'


def _fullest_of_each(timeline: tuple[Moment, ...], columns: int) -> list[Moment]:
    """No more moments than there are columns of pixels, and no peak lost."""
    size = -(-len(timeline) // columns)
    return [max(timeline[i : i + size], key=lambda moment: moment.bytes) for i in range(0, len(timeline), size)]
