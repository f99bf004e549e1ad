"""Curves as SVG, without a plotting library."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[int, float]]

STYLES = {
    "reference": ("#c9c9c9", 7.0),
    "lightning": ("#792ee5", 3.5),
    "accelerate": ("#ffb000", 1.2),
}
"""Colour and width of each loop's line, the widest first: lines that lie over each other stay visible."""

COLUMNS, CAPTION = 4, 44
WIDTH, HEIGHT = 280, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24


def sheet(panels: Sequence[tuple[str, str]]) -> str:
    """One picture of (panel, caption), with the legend above."""
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = COLUMNS * WIDTH, 30 + rows * (HEIGHT + CAPTION)
    drawn = [legend()]
    for k, (panel, caption) in enumerate(panels):
        x, y = k % COLUMNS * WIDTH, 30 + k // COLUMNS * (HEIGHT + CAPTION)
        lines = textwrap.wrap(caption, 42)
        words = "".join(text(LEFT, HEIGHT + 8 + 14 * n, line, "start") for n, line in enumerate(lines))
        drawn.append(f'<g transform="translate({x} {y})">{panel}{words}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>'
    )


def overlaid(lines: Mapping[str, Points], dots: Mapping[str, Points], parted_at: int | None = None) -> str:
    """A panel: of each loop a line and some dots over optimizer steps. parted_at: a step to mark"""
    finite = [(x, y) for each in (lines, dots) for points in each.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    left, right = min(x for x, _ in finite), max(x for x, _ in finite)
    low, high = min(y for _, y in finite), max(y for _, y in finite)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        up = (y - low) / (high - low) if high > low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>']
    for y in (low, high):
        drawn.append(text(LEFT - 4, place(left, y)[1] + 4, f"{y:.3g}", "end"))
    drawn.append(text(LEFT, HEIGHT - 8, f"step {left}", "start"))
    drawn.append(text(WIDTH - RIGHT, HEIGHT - 8, str(right), "end"))
    if parted_at is not None:
        x, _ = place(min(max(parted_at, left), right), low)
        drawn.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#d00" stroke-dasharray="3 3"/>')
    for loop, (colour, width) in STYLES.items():
        line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in lines.get(loop, ()) if math.isfinite(y))
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
    for loop, (colour, width) in STYLES.items():
        for x, y in dots.get(loop, ()):
            if math.isfinite(y):
                cx, cy = place(x, y)
                drawn.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{1 + width / 1.6:.1f}" fill="{colour}"/>')
    return "".join(drawn)


def legend() -> str:
    names = {"reference": "plain PyTorch", "lightning": "Lightning", "accelerate": "accelerate"}
    drawn = []
    for k, (loop, (colour, width)) in enumerate(STYLES.items()):
        x = LEFT + 130 * k
        drawn.append(f'<path d="M{x} 10H{x + 28}" stroke="{colour}" stroke-width="{width}"/>')
        drawn.append(text(x + 34, 14, names[loop], "start"))
    return "".join(drawn)


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="11" fill="#444">{escape(words)}</text>'
