"""The learning rate over the steps: drawn in the terminal, and as a PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ghostnet.errors import UserError
from ghostnet.optim import Schedule

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Braille: what each dot of a character adds to the blank one, by row and column."""
BLANK = 0x2800
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
WIDTH, HEIGHT = 1200, 640
LEFT, RIGHT, TOP, BOTTOM = 110, 30, 60, 70
"""Pixels of the picture, and beside the plot."""


@dataclass(frozen=True)
class Curve:
    """A learning rate over all steps of a job."""

    name: str
    lr: Schedule
    steps: int
    epochs: int

    def sampled(self, count: int) -> list[tuple[float, float]]:
        """(epoch, rate) at so many steps, the first and the last among them."""
        steps = sorted({round(i * (self.steps - 1) / max(1, count - 1)) for i in range(count)})
        return [(step * self.epochs / self.steps, self.lr(step)) for step in steps]

    @property
    def highest(self) -> float:
        """Of all steps, or of 100,000 of them."""
        return max(rate for _, rate in self.sampled(min(self.steps, 100_000)))


def text(curve: Curve, width: int = 72, height: int = 10) -> list[str]:
    """Lines of braille dots with both axes; width and height of the plot in characters."""
    highest = curve.highest or 1.0
    cells = [[0] * width for _ in range(height)]
    columns, lowest = 2 * width, 4 * height - 1
    before: int | None = None
    for column in range(columns):
        rate = curve.lr(min(curve.steps - 1, round(column * (curve.steps - 1) / (columns - 1))))
        row = round((1 - rate / highest) * lowest)
        # Steep parts are joined, so that the curve has no gaps.
        for y in range(min(row, before or row), max(row, before or row) + 1) if before is not None else (row,):
            cells[y // 4][column // 2] |= DOTS[y % 4][column % 2]
        before = row
    labels = [f"{highest * (1 - row / (height - 1)):.3g}" if row % 3 == 0 else "" for row in range(height)]
    space = max(map(len, labels))
    rows = ["".join(chr(BLANK + cell) for cell in row).rstrip(chr(BLANK)) for row in cells]
    lines = [f"{label:>{space}} ┤{row}" for label, row in zip(labels, rows, strict=True)]
    marks = [f"{curve.epochs * quarter / 4:g}" for quarter in range(5)]
    axis = [" "] * (width + 8)
    for quarter, mark in enumerate(marks):
        start = max(0, round(quarter * (width - 1) / 4) - len(mark) // 2)
        axis[start : start + len(mark)] = mark
    return [*lines, f"{'':>{space}} └{'─' * width}", f"{'':>{space}}  {''.join(axis).rstrip()} epochs"]


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write a PNG of one curve or several; UserError where it can't be written."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    brush, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    epochs, highest = max(curve.epochs for curve in curves), max(curve.highest for curve in curves) or 1.0
    y_step, x_step = _nice(highest / 6), max(1, math.ceil(_nice(epochs / 10)))
    top = y_step * math.ceil(highest / y_step - 1e-9)

    def place(epoch: float, rate: float) -> tuple[float, float]:
        x = LEFT + epoch / epochs * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - rate / top * (HEIGHT - TOP - BOTTOM)

    for tick in range(round(top / y_step) + 1):
        x, y = place(0, tick * y_step)
        brush.line([(x, y), (WIDTH - RIGHT, y)], "#dddddd")
        brush.text((x - 10, y), f"{tick * y_step:.4g}", "black", font, anchor="rm")
    for epoch in range(0, epochs + 1, x_step):
        x, y = place(epoch, 0)
        brush.line([(x, TOP), (x, y + 6)], "#dddddd")
        brush.text((x, y + 10), str(epoch), "black", font, anchor="ma")
    brush.line([place(0, top), place(0, 0), place(epochs, 0)], "black", 2)
    brush.text((LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 14), "epoch", "black", font, anchor="md")
    brush.text((LEFT, TOP - 16), "learning rate", "black", font, anchor="ls")
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        brush.line([place(*point) for point in curve.sampled(2000)], colour, 3, joint="curve")
        if len(curves) > 1 and number < 12:
            brush.text((WIDTH - RIGHT, TOP + 22 * number), curve.name, colour, font, anchor="ra")
    if len(curves) == 1:
        brush.text((WIDTH - RIGHT, TOP - 16), curves[0].name, "black", font, anchor="rs")
    try:
        image.save(path, "PNG")
    except OSError as error:
        raise UserError(f"plot={path}: it can't be written: {error.strerror or error}.") from None


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, … times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return float(next(n for n in (1, 2, 5, 10) if n * power >= step * (1 - 1e-9)) * power)
