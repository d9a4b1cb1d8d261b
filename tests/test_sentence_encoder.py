"""The sentence encoder's example and its curves, on an encoder that was never trained and a tokenizer of its own."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.removal_tradeoff import COLOURS, Point, draw, main, read
from stabnorm import find_norms
from stabnorm.examples import sentence_encoder
from stabnorm.examples.minilm import Batch, SentenceEncoder, renamed
from stabnorm.examples.sentence_encoder import (
    Agreement,
    Batches,
    agreement,
    convert,
    embeddings,
    export,
    pieces,
    training_texts,
)

pytestmark = pytest.mark.slow

WORDS = 50


class Counting:
    """A word is its length, and its first letter's number."""

    def __call__(self, texts: Sequence[str]) -> Batch:
        codes = [[(len(word) + 7 * ord(word[0])) % WORDS for word in text.split()][:40] for text in texts]
        longest = max(map(len, codes))
        return {
            "input_ids": torch.tensor([code + [0] * (longest - len(code)) for code in codes]),
            "attention_mask": torch.tensor([[1] * len(code) + [0] * (longest - len(code)) for code in codes]),
        }


def encoder() -> SentenceEncoder:
    torch.manual_seed(0)
    model = SentenceEncoder(WORDS, dim=32, depth=2, heads=4).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    return model


def test_the_example_converts_and_exports_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_encoder, "Tokenizer", lambda: Counting())
    monkeypatch.setattr(sentence_encoder, "load_encoder", encoder)
    result = sentence_encoder.main(["--steps", "3", "--root", str(tmp_path), "--no-progress"])
    assert [norm.kept for norm in result.norms] == [False] * 5
    assert find_norms(result.model) == []
    batch = Counting()(["a few words", "and some more of them"])
    norms, off = export(result.model, batch, tmp_path / "again.onnx")
    assert norms == []
    assert off < 1e-5
    assert {path.name for path in tmp_path.glob("*.onnx")} == {"original.onnx", "converted.onnx", "again.onnx"}


def test_the_encoder_converts_to_something_close_to_itself() -> None:
    model, texts = encoder(), training_texts(None, None)
    result = convert(model, texts, Counting(), 0, progress=False)  # type: ignore[arg-type]
    vectors, wanted = (embeddings(part, texts[:64], Counting()) for part in (result.model, model))  # type: ignore[arg-type]
    assert agreement(vectors, wanted).mean > 0.98
    assert agreement(wanted, wanted).rank == pytest.approx(1)


def test_batches_hold_every_text_once_and_like_lengths_together() -> None:
    texts = pieces([" ".join(["word"] * n) for n in range(6, 200, 7)], np.random.default_rng(0))
    batches = Batches(texts, Counting(), tokens=200)  # type: ignore[arg-type]
    rows = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    assert len(texts) - max(len(batch["input_ids"]) for batch in batches) < len(rows) <= len(texts)
    assert all(batch["attention_mask"].float().mean() > 0.7 for batch in batches)


def test_names_of_a_published_bert_become_the_encoders() -> None:
    ours = SentenceEncoder(WORDS, dim=8, depth=1, heads=2).state_dict()
    published = {
        "embeddings.word_embeddings.weight": ours["words.weight"],
        "embeddings.position_embeddings.weight": ours["positions.weight"],
        "embeddings.token_type_embeddings.weight": ours["segments.weight"],
        "embeddings.position_ids": torch.arange(3),
        "pooler.dense.weight": torch.zeros(1),
    }
    places = {
        "embeddings.LayerNorm": "norm",
        "encoder.layer.0.attention.self.query": "blocks.0.attention.query",
        "encoder.layer.0.attention.self.key": "blocks.0.attention.key",
        "encoder.layer.0.attention.self.value": "blocks.0.attention.value",
        "encoder.layer.0.attention.output.dense": "blocks.0.attention.out",
        "encoder.layer.0.attention.output.LayerNorm": "blocks.0.norm1",
        "encoder.layer.0.intermediate.dense": "blocks.0.up",
        "encoder.layer.0.output.dense": "blocks.0.down",
        "encoder.layer.0.output.LayerNorm": "blocks.0.norm2",
    }
    for theirs, own in places.items():
        published |= {f"{theirs}.{part}": ours[f"{own}.{part}"] for part in ("weight", "bias")}
    assert set(renamed(published)) == set(ours)
    assert all(value is ours[name] for name, value in renamed(published).items())


def test_the_curves_are_drawn_from_what_was_measured(tmp_path: Path) -> None:
    def point(curve: str, at: int, seen: float, unseen: float) -> Point:
        return Point(curve, at, Agreement(0.9, 0.8, seen), Agreement(0.9, 0.8, unseen), 1.0)

    points = [point("kept", 0, 0.95, 0.93), point("kept", 4, 0.99, 0.98), point("steps", 100, 0.97, 0.95)]
    pixels = np.asarray(draw(points))
    for colour in COLOURS.values():
        assert (pixels == colour).all(-1).sum() > 100
    out = tmp_path / "points.jsonl"
    out.write_text("".join(json.dumps(asdict(one)) + "\n" for one in points), encoding="utf-8")
    assert read(out) == points
    assert main(["--draw", "--out", str(out), "--picture", str(tmp_path / "curves.png")]) == read(out)
    assert (tmp_path / "curves.png").stat().st_size < 40_000
