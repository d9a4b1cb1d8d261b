"""A layer x step heat map, drawn with Pillow alone: one picture that shows which layer moved, and when."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from stabnorm.dashboard.text import number, shorten

Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

WIDTH = 900  # of the map itself, in pixels: one column each
VIRIDIS = np.array(  # perceptually uniform, and readable without seeing colours (van der Walt and Smith)
    [
        (68, 1, 84),
        (71, 45, 123),
        (59, 82, 139),
        (44, 114, 142),
        (33, 145, 140),
        (40, 174, 128),
        (94, 201, 98),
        (173, 220, 48),
        (253, 231, 37),
    ]
)
NO_VALUE = (205, 205, 205)
INFINITE = (255, 0, 255)
MARK = (225, 30, 40)
INK = (35, 35, 40)
FAINT = (120, 120, 128)
PAPER = (255, 255, 255)


def heatmap(
    values: Floats,
    steps: int | Sequence[int] | npt.NDArray[np.integer[Any]],
    layers: Sequence[str],
    title: str,
    *,
    unit: str = "",
    marks: Sequence[tuple[int, int | str]] = (),
    log: bool | None = None,
) -> Pixels:
    """Draw one statistic of all layers over the run.

    A column that stands for several steps shows their largest value, so that a spike of one step can be seen. The
    colours span most values of the map; larger and smaller values have the end colours. NaN is grey, and infinite
    values are magenta.

    Args:
        values: [steps, layers].
        steps: the step of each row, or of the first one.
        layers: names of the layers, from top to bottom.
        title: title of the picture.
        unit: unit of the numbers at the colour bar. Default: none.
        marks: step and layer of the cells that get a frame; a layer is a name or an index. Marks outside of the map are
            left out. Default: none.
        log: whether colours are logarithmic. Default: if no value is negative, and positive values span two decades.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: `values` is empty, or does not fit the steps or layers.

    Example:
        >>> image = heatmap(np.random.rand(30, 2), 100, ["encoder.norm", "decoder.norm"], "amax")
        >>> image.dtype, image.shape[2]
        (dtype('uint8'), 3)
    """
    values = np.asarray(values, np.float64)
    steps = np.arange(len(values)) + steps if np.ndim(steps) == 0 else np.asarray(steps)
    if not values.size or values.shape != (len(steps), len(layers)):
        raise ValueError(
            f"values has shape {values.shape} for {len(steps)} steps and {len(layers)} layers; "
            "give [steps, layers] with at least one of each"
        )
    row = min(26, max(4, round(480 / len(layers))))
    columns = _columns(values)
    scale = _Scale.of(columns, log)
    cells = np.repeat(_cells(columns, scale), row, axis=0)

    names = shorten(layers, 34)
    labels = {tick: f"{number(tick)} {unit}".strip() for tick in (scale.ticks() if scale else ())}
    left, right = (math.ceil(max(map(font(12).getlength, texts), default=0)) for texts in (names, labels.values()))
    left, right, top, height = left + 18, right + 64, 66, len(cells)
    canvas = Image.new("RGB", (left + WIDTH + right, top + max(height, 120) + 52), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 12), title, INK, font(19))
    draw.text((left, 40), _summary(values, steps, layers), FAINT, font(12))
    canvas.paste(Image.fromarray(cells), (left, top))

    every = math.ceil(14 / row)
    for i in range(0, len(names), every):
        draw.text((left - 8, top + (i + 0.5) * row), names[i], INK, font(12), anchor="rm")
    draw_steps(draw, steps, left, top + height)
    if scale:
        _draw_bar(draw, scale, labels, (left + WIDTH + 22, top, left + WIDTH + 38, top + max(height, 120)))
    legend = [("no value", NO_VALUE, np.isnan(columns)), ("infinite", INFINITE, np.isinf(columns))]
    _draw_legend(draw, [(text, colour) for text, colour, where in legend if where.any()], left, canvas.height - 18)

    index = {name: i for i, name in enumerate(layers)}
    for step, layer in marks:
        i = index.get(layer, -1) if isinstance(layer, str) else layer
        if 0 <= i < len(layers) and steps[0] <= step <= steps[-1]:
            draw_mark(draw, left + _x(steps, step), top + i * row, row)
    return np.asarray(canvas)


@dataclass(frozen=True)
class _Scale:
    """Maps values to [0, 1]."""

    low: float  # both are logarithms if `log`
    high: float
    log: bool
    clips_low: bool = False
    clips_high: bool = False

    @classmethod
    def of(cls, columns: Floats, log: bool | None) -> "_Scale | None":
        finite = columns[np.isfinite(columns)]
        positive = finite[finite > 0]
        if log is None:
            low, high = np.percentile(positive, (1, 99)) if len(positive) else (1, 1)
            log = bool(high > 100 * low and len(positive) and finite.min() >= 0)
        shown = np.log10(positive) if log else finite
        if not len(shown):
            return None
        least, low, middle, high, most = np.percentile(shown, (0, 1, 50, 99, 100))
        # Half as far again, so that a spike is not just one of the brightest hundredth.
        low, high = max(least, middle - 1.5 * (middle - low)), min(most, middle + 1.5 * (high - middle))
        clips = least < low, most > high
        if _equal(low, high):  # one value nearly everywhere: the few others make the range
            low, high, clips = least, most, (False, False)
        if _equal(low, high):
            margin = 0.5 if log else abs(middle) / 10 or 1.0
            low, high = low - margin, high + margin
        return cls(low, high, log, *clips)

    def position(self, values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(np.maximum(values, 0)) if self.log else values
        position: Floats = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        return position

    def ticks(self) -> list[float]:
        if not self.log:
            return _ticks(self.low, self.high, 6)
        for digits in (1,), (1, 3), (1, 2, 5):
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            ticks = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
            if len(ticks) > 2:
                return ticks[:: math.ceil(len(ticks) / 8)]
        return _ticks(10**self.low, 10**self.high, 5)


def _equal(low: float, high: float) -> bool:
    return high - low <= 1e-6 * max(abs(low), abs(high))


def _columns(values: Floats) -> Floats:
    """Return [WIDTH, layers]: the largest value of the steps of a column; a step may have several columns."""
    starts = np.arange(WIDTH) * len(values) // WIDTH
    infinite = np.where(np.isinf(values), np.inf, values)  # -inf must be seen, too
    columns: Floats = np.fmax.reduceat(infinite, starts, axis=0)  # where starts repeat, it takes the value itself
    return columns


def _cells(columns: Floats, scale: "_Scale | None") -> Pixels:
    """Return [layers, WIDTH, 3]: the map with one pixel for a layer."""
    colours = _viridis(scale.position(columns) if scale else np.zeros_like(columns))
    colours[np.isnan(columns)] = NO_VALUE
    colours[np.isinf(columns)] = INFINITE
    return np.swapaxes(colours, 0, 1)


def _viridis(position: Floats) -> Pixels:
    position = np.nan_to_num(position)
    anchors = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(position, anchors, VIRIDIS[:, channel]) for channel in range(3)]
    colours: Pixels = np.stack(channels, axis=-1).round().astype(np.uint8)
    return colours


def _summary(values: Floats, steps: npt.NDArray[Any], layers: Sequence[str]) -> str:
    finite = np.where(np.isfinite(values), values, -np.inf)
    step, layer = np.unravel_index(finite.argmax(), finite.shape)
    if finite[step, layer] == -np.inf:
        return "no finite values"
    text = f"largest {number(finite[step, layer])} in {shorten(layers, 44)[layer]} at step {steps[step]:,}"
    share = math.ceil(len(steps) / WIDTH)
    return text if share == 1 else f"{text}; a column is the maximum of up to {share} steps"


def draw_steps(draw: ImageDraw.ImageDraw, steps: npt.NDArray[Any], left: int, bottom: int) -> None:
    """Draw the ticks of the steps below a map."""
    for tick in _ticks(steps[0], steps[-1], 8, least=1):
        x = left + _x(steps, tick)
        draw.line((x, bottom, x, bottom + 4), FAINT)
        draw.text((x, bottom + 7), f"{tick:,.0f}", INK, font(12), anchor="mt")
    draw.text((left + WIDTH, bottom + 24), "step", FAINT, font(12), anchor="rt")


def _draw_bar(draw: ImageDraw.ImageDraw, scale: _Scale, labels: Mapping[float, str], box: Box) -> None:
    left, top, right, bottom = box
    for y, colour in enumerate(_viridis(np.linspace(1, 0, bottom - top)), top):
        draw.line((left, y, right, y), tuple(colour.tolist()))
    middle = (left + right) // 2
    if scale.clips_high:  # the bar goes on beyond its ends
        draw.polygon([(left, top - 2), (right, top - 2), (middle, top - 10)], tuple(VIRIDIS[-1].tolist()))
    if scale.clips_low:
        draw.polygon([(left, bottom + 1), (right, bottom + 1), (middle, bottom + 9)], tuple(VIRIDIS[0].tolist()))
    for tick, label in labels.items():
        at = bottom - 1 - float(scale.position(np.array(tick))) * (bottom - top - 1)
        draw.line((right + 1, at, right + 4, at), FAINT)
        draw.text((right + 8, at), label, INK, font(12), anchor="lm")


def _draw_legend(
    draw: ImageDraw.ImageDraw, entries: Sequence[tuple[str, tuple[int, int, int]]], x: float, y: int
) -> None:
    for text, colour in entries:
        draw.rectangle((x, y - 5, x + 10, y + 5), colour)
        draw.text((x + 16, y), text, INK, font(12), anchor="lm")
        x += 34 + float(font(12).getlength(text))


def draw_mark(draw: ImageDraw.ImageDraw, x: float, top: int, row: int) -> None:
    """Draw a frame around a cell, inside its row, so that it cannot be read as a mark of the row above."""
    box = x - 6, top, x + 6, top + row - 1
    draw.rectangle(box, outline=PAPER)
    draw.rectangle((box[0] + 1, box[1], box[2] - 1, box[3]), outline=MARK, width=2 if row > 6 else 1)


def _x(steps: npt.NDArray[Any], step: float) -> float:
    row = float(np.interp(step, steps, np.arange(len(steps))))
    return (row + 0.5) * WIDTH / len(steps)


def _ticks(low: float, high: float, most: int, least: float = 0.0) -> list[float]:
    """Return at most about `most` round numbers in [low, high].

    Example:
        >>> _ticks(3, 27, 6)
        [5.0, 10.0, 15.0, 20.0, 25.0]
    """
    raw = max((high - low) / most, least, 1e-300)
    decade = 10.0 ** math.floor(math.log10(raw))
    gap = next(digit * decade for digit in (1, 2, 5, 10) if digit * decade >= raw * (1 - 1e-9))
    return [i * gap for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


@functools.cache
def font(size: int) -> Any:
    """Return the font of all texts in a picture."""
    return ImageFont.load_default(size)
