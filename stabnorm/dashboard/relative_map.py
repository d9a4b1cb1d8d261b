"""The one picture that tells what happened: every layer against its usual value, below the loss, alerts framed."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from stabnorm.dashboard.definitions import definition
from stabnorm.dashboard.heatmap import (
    FAINT,
    INFINITE,
    INK,
    MARK,
    NO_VALUE,
    PAPER,
    WIDTH,
    Floats,
    Pixels,
    draw_mark,
    draw_steps,
    font,
)  # fmt: skip
from stabnorm.dashboard.runs import Run
from stabnorm.dashboard.text import number, shorten
from stabnorm.dashboard.tiles import Tile, columns_of, extremes, tile_of
from stabnorm.dashboard.verdict import verdict

# Blue, white and red, which can be told apart without seeing red and green.
DIVERGING = np.array([(33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43)])
SCALES = ("token_std_mean", "amax")  # the statistic of the picture, the first that was watched
_LOSS = 84  # height of the loss, in pixels
_MOST_ROWS = 120

Steps = npt.NDArray[np.int64]


def relative_map(run: Run, statistic: str = "", companion: str = "") -> Pixels | None:
    """Draw one statistic of all layers, each divided by its usual value, with the loss above.

    White is the usual value, red is twice as much and more, blue is half and less. Of steps that share a column the one
    furthest from its usual value is shown. A frame marks the cell of an alert. NaN and infinity are magenta.

    Args:
        run: after `Run.refresh`.
        statistic: its name. Default: the scale of the input.
        companion: whose rows are drawn. Default: the norms.

    Returns:
        uint8 [height, width, 3]; None if the record does not have the statistic, or no step.

    Example:
        >>> from stabnorm.dashboard.readers import MemoryReader
        >>> run = Run("mine", MemoryReader({"": (("norm",), np.arange(300), {"amax": np.ones((300, 1))})}))
        >>> run.refresh()
        True
        >>> relative_map(run).shape[2]
        3
    """
    known = run.statistics(companion)
    statistic = statistic or next((name for name in SCALES if name in known), "")
    values = run.series(statistic, companion)
    if values is None or not len(values) or not values.shape[1]:
        return None
    layers, steps = run.rows(companion)
    columns = columns_of(steps, int(steps[0]), int(steps[-1]), WIDTH)
    tile = tile_of(values, steps, run.baseline(statistic, companion), columns)
    judged = verdict(run)
    row = min(26, max(4, 520 // len(layers)))
    names = [_one_line(name) for name in shorten(layers, 34)]
    left = math.ceil(max(map(font(12).getlength, names))) + 18
    top = 66 + _LOSS + 14
    height = row * len(layers)
    canvas = Image.new("RGB", (left + WIDTH + 30, top + height + 62), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 10), _one_line(f"{judged.state}: {judged.title}"), INK, font(19))
    about = f"{definition(statistic).plain} ({statistic}) of each layer, divided by its usual value; above it the loss"
    draw.text((left, 40), about, FAINT, font(12))
    shown = np.arange(WIDTH) * (len(columns.edges) - 1) // WIDTH
    cells = np.repeat(np.swapaxes(_colours(tile)[shown], 0, 1), row, axis=0)
    canvas.paste(Image.fromarray(cells), (left, top))
    _draw_loss(draw, run, columns, (left, 66), shown)
    for i in range(0, len(names), math.ceil(14 / row)):
        draw.text((left - 8, top + (i + 0.5) * row), names[i], INK, font(12), anchor="rm")
    draw_steps(draw, np.arange(columns.edges[0], columns.edges[-1]), left, top + height)
    index = {name: i for i, name in enumerate(layers)}
    width = WIDTH / (columns.edges[-1] - columns.edges[0])
    written = 0.0  # up to here there is a label
    for onset in judged.onsets:
        if not columns.edges[0] <= onset.step < columns.edges[-1]:
            continue
        x, label = left + (onset.step - columns.edges[0] + 0.5) * width, f"alert {onset.step:,}"
        draw.line((x, 66, x, top + height - 1), MARK)
        if x - font(12).getlength(label) - 8 > written:
            draw.text((x - 4, 66), label, MARK, font(12), anchor="rt")
            written = x
        for alert in onset.alerts:
            if alert["layer"] in index:
                at = left + (int(alert["step"]) - columns.edges[0] + 0.5) * width
                draw_mark(draw, at, top + index[alert["layer"]] * row, row)
    _draw_legend(draw, tile, left, canvas.height - 16)
    return np.asarray(canvas)


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)[:140]


def _colours(tile: Tile) -> Pixels:
    """Return ``[columns, layers, 3]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        position = np.clip((np.log2(tile.value / tile.usual) + 1) / 2, 0, 1)
    anchors = np.linspace(0, 1, len(DIVERGING))
    known = np.nan_to_num(position)
    colours = np.stack([np.interp(known, anchors, DIVERGING[:, i]) for i in range(3)], -1).round().astype(np.uint8)
    colours[np.isnan(position)] = NO_VALUE
    before = np.maximum.accumulate(~np.isnan(tile.value), axis=0)
    colours[np.isinf(tile.high) | np.isinf(tile.low) | (np.isnan(tile.high) & before)] = INFINITE
    return colours


def _draw_loss(draw: Any, run: Run, columns: Any, corner: tuple[int, int], shown: npt.NDArray[Any]) -> None:
    """Draw the loss on a logarithmic axis: a line for each column, from its smallest to its largest value."""
    losses, (left, top) = run.series("loss"), corner
    bottom = top + _LOSS
    draw.line((left, bottom, left + WIDTH, bottom), FAINT)
    if losses is None or not np.any(positive := np.isfinite(losses) & (losses > 0)):
        draw.text((left + 4, top + 4), "no loss was recorded", FAINT, font(12))
        return
    low, high = float(losses[positive].min()), float(losses[positive].max())
    span = math.log(high / low) or 1.0

    def y(values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            height: Floats = bottom - 4 - np.log(values / low) / span * (_LOSS - 12)
        return height

    least, most = extremes(losses, columns)
    before = None
    for x, (upper, lower) in enumerate(zip(y(most)[shown], y(least)[shown], strict=True)):
        if np.isfinite(upper) and np.isfinite(lower):
            draw.line((left + x, upper, left + x, lower + 1), INK)
            if before is not None:
                draw.line((left + x - 1, before, left + x, (upper + lower) / 2), FAINT)
            before = (upper + lower) / 2
    draw.text((left - 8, top + 8), number(high), FAINT, font(12), anchor="rm")
    draw.text((left - 8, bottom - 4), number(low), FAINT, font(12), anchor="rm")
    draw.text((left - 8, top + _LOSS // 2), "loss", INK, font(12), anchor="rm")


def _draw_legend(draw: Any, tile: Tile, x: float, y: int) -> None:
    entries = [("half and less", DIVERGING[0]), ("usual", DIVERGING[2]), ("twice and more", DIVERGING[-1])]
    if np.isnan(tile.usual).any():
        entries.append(("no value, or too early to know what is usual", np.array(NO_VALUE)))
    if np.isinf(tile.high).any() or np.isnan(tile.value[-1]).any():
        entries.append(("NaN or infinite", np.array(INFINITE)))
    for text, colour in entries:
        draw.rectangle((x, y - 5, x + 10, y + 5), tuple(colour.tolist()), FAINT)
        draw.text((x + 16, y), text, INK, font(12), anchor="lm")
        x += 34 + float(font(12).getlength(text))
