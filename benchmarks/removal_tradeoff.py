"""Measure how close a pretrained encoder without norms is to the original: `python -m benchmarks.removal_tradeoff`.

It measures two curves on the sentence encoder of `examples.sentence_encoder`. The agreement is Spearman's correlation
of
all pairwise similarities, on text of the kind used for the conversion and on text of another kind:

- agreement over the number of kept norms, with a fit and no repair; the norms furthest from an affine map are kept;
- agreement over the number of repair steps, with every norm removed; each point is a complete training with its own
  schedule of the learning rate.

Every point is a line of `runs/removal_tradeoff.jsonl`; existing points are not repeated. `--picture` draws them. It
needs the extra `[pretrained]`.

Args: --kept N..., --steps N..., --data FILE, --seen FILE, --unseen FILE, --out FILE, --picture FILE, --draw.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stabnorm.dashboard.heatmap import FAINT, INK, MARK, PAPER
from stabnorm.examples.minilm import SentenceEncoder, Tokenizer, load_encoder
from stabnorm.examples.sentence_encoder import (
    Agreement,
    Batches,
    agreement,
    convert,
    embeddings,
    judged_texts,
    pieces,
    training_texts,
)
from stabnorm.norms import NormSearch
from stabnorm.pretrained import Runner, measure_norms

COLOURS = {"seen": (33, 113, 181), "unseen": MARK}
SIZE, PANEL, MARGIN = (900, 330), (360, 230), 60


@dataclass(frozen=True)
class Point:
    """The result of one conversion."""

    curve: str  # "kept" or "steps"
    at: int
    seen: Agreement
    unseen: Agreement
    minutes: float


def read(path: Path) -> list[Point]:
    """Return the existing points."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else ())
    return [Point(**line | {kind: Agreement(**line[kind]) for kind in COLOURS}) for line in lines]


def worst_first(original: SentenceEncoder, texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Return the norms, the one furthest from an affine map first."""
    batches = list(Batches(pieces(texts, np.random.default_rng(0)), tokenizer))[:10]
    residuals = measure_norms(original, NormSearch(original).found, batches, Runner()).residuals
    return sorted(residuals, key=lambda name: -residuals[name])


# --- the picture ---


def draw(points: Sequence[Point]) -> Image.Image:
    """Draw both curves side by side; the vertical axis goes from the lowest value to 1."""
    image = Image.new("RGB", SIZE, PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    low = min([0.99, *(min(point.seen.rank, point.unseen.rank) for point in points)])
    low = np.floor(20 * low) / 20
    titles = {"kept": "LayerNorms kept (of 13), no repair", "steps": "steps of repair, no LayerNorm left"}
    for number, (curve, title) in enumerate(titles.items()):
        here = sorted((point for point in points if point.curve == curve), key=lambda point: point.at)
        left, top = MARGIN + number * (PANEL[0] + MARGIN), 40
        _panel(pen, font, here, (left, top), float(low), title)
    for number, (kind, colour) in enumerate(COLOURS.items()):
        pen.text((MARGIN + 220 * number, 8), f"Spearman, {kind} kind of text", colour, font)
    return image


def _panel(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    points: Sequence[Point],
    corner: tuple[int, int],
    low: float,
    title: str,
) -> None:
    (left, top), (width, height) = corner, PANEL
    for value in np.linspace(low, 1, 6):
        y = top + height * (1 - (value - low) / (1 - low))
        pen.line((left, y, left + width, y), (225, 225, 228))
        pen.text((left - 38, y - 8), f"{value:.2f}", FAINT, font)
    pen.rectangle((left, top, left + width, top + height), outline=FAINT)
    pen.text((left, top + height + 24), title, INK, font)
    if not points:
        return
    places = {point.at: left + width * (index + 0.5) / len(points) for index, point in enumerate(points)}
    for at, x in places.items():
        pen.text((x, top + height + 5), str(at), FAINT, font, anchor="ma")
    for kind, colour in COLOURS.items():
        line = [
            (places[point.at], top + height * (1 - (getattr(point, kind).rank - low) / (1 - low))) for point in points
        ]
        pen.line(line, colour, 2)
        for x, y in line:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def main(arguments: Sequence[str] | None = None) -> list[Point]:
    """Measure the points that are missing, print all, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=int, nargs="*", default=[0, 1, 2, 4, 8], help="norms that stay")
    parser.add_argument("--steps", type=int, nargs="*", default=[0, 100, 400, 1150], help="of the repair")
    parser.add_argument("--data", help="a text file to train on; default: Python's own documentation")
    parser.add_argument("--seen", help="text of that kind to judge on; default: every fifth paragraph of the data")
    parser.add_argument("--unseen", help="text of another kind; default: descriptions of scikit-learn's data")
    parser.add_argument("--out", type=Path, default=Path("runs/removal_tradeoff.jsonl"))
    parser.add_argument("--picture", type=Path, help="draw the curves there")
    parser.add_argument("--draw", action="store_true", help="measure nothing more")
    options = parser.parse_args(arguments)
    points = read(options.out)
    plan = [("kept", at) for at in options.kept] + [("steps", at) for at in options.steps]
    missing = [] if options.draw else [one for one in plan if one not in {(point.curve, point.at) for point in points}]
    if missing:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer, original = Tokenizer(), load_encoder()
        texts, judged = (
            training_texts(options.data, options.seen),
            judged_texts(options.data, options.seen, options.unseen),
        )
        wanted = {kind: embeddings(original, samples, tokenizer) for kind, samples in judged.items()}
        order = worst_first(original, texts, tokenizer)
    for curve, at in missing:
        torch.manual_seed(0)
        keep = [f"^{name}$" for name in order[:at]] if curve == "kept" and at else None
        start = time.perf_counter()
        model = convert(original, texts, tokenizer, at if curve == "steps" else 0, False, keep=keep).model
        minutes = (time.perf_counter() - start) / 60
        agreed = {kind: agreement(embeddings(model, text, tokenizer), wanted[kind]) for kind, text in judged.items()}
        points.append(Point(curve, at, agreed["seen"], agreed["unseen"], minutes))
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(points[-1])) + "\n")
    for point in sorted(points, key=lambda point: (point.curve, point.at)):
        print(f"{point.curve} {point.at}, {point.minutes:.1f} minutes; seen: {point.seen}; unseen: {point.unseen}")
    if options.picture:
        draw(points).save(options.picture, optimize=True)
    return points


if __name__ == "__main__":
    main()
