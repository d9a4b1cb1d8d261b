"""Remove the 13 LayerNorms of a real pretrained sentence encoder: `python -m stabnorm.examples.sentence_encoder`.

The encoder itself is the only teacher, so there are no labels. The text is the documentation that comes with Python, or
your own (`--data`). An affine map is fitted to every norm, together with the layer that feeds it. Then the model is
trained for some minutes until it reproduces the hidden states of the original, and the affine maps are folded into the
weights. At the end both encoders are compared on text of this kind and of another kind, and exported to ONNX.

It needs the extra `[pretrained]`.
"""

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm import remove_norms
from stabnorm.examples.minilm import Batch, SentenceEncoder, Tokenizer, load_encoder
from stabnorm.pretrained import Recipe, RemovalResult

LENGTHS = (8, 14, 24, 40, 70, 110)  # words of a text to train on: an encoder is asked for short and long ones
JUDGED = 256  # texts of each kind
DESCRIBED = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")


# --- text ---


def paragraphs(path: str | None) -> list[str]:
    """Return the paragraphs with more than 12 words of a text file, or of Python's own documentation."""
    text = Path(path).read_text("utf-8") if path else "\n\n".join(topics[name] for name in sorted(topics))
    parts = text.split("\n\n") if "\n\n" in text else text.split("\n")
    return [" ".join(part.split()) for part in parts if len(part.split()) > 12]


def other_paragraphs(path: str | None) -> list[str]:
    """Return another kind of text: the lines of a file, or scikit-learn's descriptions of its data sets."""
    if path:
        return [line.strip() for line in Path(path).read_text("utf-8").splitlines() if len(line.split()) > 5]
    loaded = (getattr(datasets, f"load_{name}")().DESCR for name in DESCRIBED)
    sentences = (" ".join(sentence.split()) for text in loaded for sentence in text.replace("\n\n", ". ").split(". "))
    return [sentence for sentence in sentences if len(sentence.split()) > 5]


def training_texts(data: str | None, seen: str | None) -> list[str]:
    """Return the texts for the training: all data, or four fifths if there is no other text to compare on."""
    return [text for number, text in enumerate(paragraphs(data)) if seen or number % 5]


def judged_texts(data: str | None, seen: str | None, unseen: str | None) -> dict[str, list[str]]:
    """Return the texts for the comparison: of the kind of the training texts, and of another kind."""
    same = paragraphs(seen) if seen else paragraphs(data)[::5]
    return {"seen": same[:JUDGED], "unseen": other_paragraphs(unseen)[:JUDGED]}


def pieces(texts: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Cut texts into parts of many lengths."""
    paragraphs = []
    for text in texts:
        words = text.split()
        while len(words) > 5:
            length = int(generator.choice(LENGTHS))
            paragraphs.append(" ".join(words[:length]))
            words = words[length:]
    return paragraphs


class Batches:
    """Batches of texts of similar length, in a new random order at each pass.

    Args:
        texts: the texts.
        tokenizer: makes the batches.
        tokens: approximate number of tokens in a batch, without padding.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, tokens: int = 640) -> None:
        self._batches = []
        group: list[str] = []
        for text in sorted(texts, key=lambda text: len(text.split())):
            group.append(text)
            if 1.4 * len(text.split()) * len(group) >= tokens:
                self._batches.append(tokenizer(group))
                group = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self._batches[int(index)] for index in torch.randperm(len(self)))


# --- comparison ---


@dataclass(frozen=True)
class Agreement:
    """How similar two encoders are on some texts.

    Args:
        mean: Mean over texts of the cosine between both embeddings of a text.
        least: The least of these cosines.
        rank: Spearman's correlation of all pairwise similarities: whether both find the same texts similar.
    """

    mean: float
    least: float
    rank: float

    def __str__(self) -> str:
        return f"cosine {self.mean:.3f} (least {self.least:.3f}), Spearman {self.rank:.4f}"


@torch.no_grad()
def embeddings(model: nn.Module, texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Return embeddings of length 1, in the order of the texts."""
    parts = [model(**tokenizer(texts[start : start + 32])) for start in range(0, len(texts), 32)]
    return F.normalize(torch.cat(parts), dim=1)


def agreement(embedded: Tensor, wanted: Tensor) -> Agreement:
    """Compare embeddings of the same texts."""
    cosine = (embedded * wanted).sum(1)
    rows, columns = torch.triu_indices(len(embedded), len(embedded), 1)
    similarities = [(e @ e.T)[rows, columns].numpy() for e in (embedded, wanted)]
    return Agreement(float(cosine.mean()), float(cosine.min()), float(spearmanr(*similarities).statistic))


# --- what it costs to run ---


def export(model: nn.Module, batch: Batch, path: Path) -> tuple[list[str], float]:
    """Write a model as ONNX; return its normalization operators, and how far ONNX Runtime is from torch."""
    import onnxruntime

    axes = {name: {0: "batch", 1: "tokens"} for name in batch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both inputs have the same axes, and the exporter says so
        program = torch.onnx.export(model, (), kwargs=dict(batch), dynamo=True, dynamic_shapes=axes, verbose=False)
    assert program is not None
    program.save(str(path))
    names = [node.op_type for node in program.model_proto.graph.node]
    session = onnxruntime.InferenceSession(str(path))
    (output,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
    with torch.no_grad():
        wanted = model(**batch).numpy()
    return [name for name in names if "Normalization" in name], float(
        np.abs(output - wanted).max() / np.abs(wanted).max()
    )


def milliseconds(models: Sequence[nn.Module], batch: Batch, rounds: int = 20) -> list[float]:
    """Return the median time of a forward of each model; the models take turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for number in range(rounds + 3):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(**batch)
                if number >= 3:
                    taken.append(time.perf_counter() - start)
    return [1e3 * float(np.median(taken)) for taken in times]


def megabytes(model: nn.Module) -> float:
    """Return the size of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e6


# --- the example ---


def precision() -> torch.dtype | None:
    """Return the dtype for the training: bfloat16 if it multiplies matrices faster, which many CPUs cannot."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(512, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            (x @ weight).T @ x
            taken.append(time.perf_counter() - start)
        return min(taken)

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else None


def convert(
    original: SentenceEncoder,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    steps: int,
    progress: bool,
    keep: Sequence[str] | None = None,
) -> RemovalResult:
    """Remove the norms with text alone."""
    batches = Batches(pieces(texts, np.random.default_rng(0)), tokenizer)
    recipe = Recipe(forcing=0.8, precision=precision())
    count = 16 if steps else 40  # the layers have more to fit than the norms
    return remove_norms(original, batches, steps=steps, recipe=recipe, fit_batches=count, keep=keep, progress=progress)


def main(arguments: Sequence[str] | None = None) -> RemovalResult:
    """Convert, compare and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file to train on; default: Python's own documentation")
    parser.add_argument("--seen", help="text of that kind to judge on; default: every fifth paragraph of the data")
    parser.add_argument(
        "--unseen", help="text of another kind, a line each; default: descriptions of scikit-learn's data"
    )
    parser.add_argument("--steps", type=int, default=1150, help="of the repair (default: 1150)")
    parser.add_argument("--root", type=Path, default=Path("runs/sentence_encoder"), help="where the models are written")
    parser.add_argument("--no-progress", action="store_true", help="hide the progress bar")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    tokenizer, original = Tokenizer(), load_encoder()
    texts = training_texts(options.data, options.seen)
    judged = judged_texts(options.data, options.seen, options.unseen)
    start = time.perf_counter()
    result = convert(original, texts, tokenizer, options.steps, not options.no_progress)
    print(result)
    print(f"converted in {(time.perf_counter() - start) / 60:.1f} minutes; {options.steps} steps of repair")
    for kind, samples in judged.items():
        both = (embeddings(model, samples, tokenizer) for model in (result.model, original))
        print(f"{kind:6s} {len(samples)} texts: {agreement(*both)}")
    batch = tokenizer(judged["seen"][:16])
    options.root.mkdir(parents=True, exist_ok=True)
    times = milliseconds([original, result.model], batch)
    for name, model, taken in zip(("original", "converted"), (original, result.model), times, strict=True):
        path = options.root / f"{name}.onnx"
        norms, off = export(model, batch, path)
        print(
            f"{name:9s} {megabytes(model):6.1f} MB, {taken:6.1f} ms for {len(batch['input_ids'])} texts; "
            f"{len(norms)} normalization operators in {path}, ONNX Runtime off by {off:.0e}"
        )
    torch.save(result.model.state_dict(), options.root / "converted.pt")
    return result


if __name__ == "__main__":
    main()
