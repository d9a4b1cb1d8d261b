"""Models from torch's own transformer modules, and linears whose weight is computed on the fly."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.families.family import VOCABULARY, Example, Family, padding, source_and_target, tensor, token_ids

WIDTH, HEADS, CLASSES = 12, 2, 3


class EncoderClassifier(nn.Module):
    """torch's encoder: it has a fused path for eval that reads the norms' weights and never calls them."""

    def __init__(self, norm_first: bool, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=norm_first, bias=bias
        )
        last = nn.LayerNorm(WIDTH, bias=bias)
        self.encoder = nn.TransformerEncoder(layer, 2, last, enable_nested_tensor=not norm_first and bias)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        x = self.encoder(self.embedding(input_ids), src_key_padding_mask=src_key_padding_mask)
        return tensor(self.head(x[:, 0]))


class Seq2Seq(nn.Module):
    """nn.Transformer with an embedding and a head."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        with warnings.catch_warnings():  # it asks for nested tensors and then says that it cannot have them
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
            self.transformer = nn.Transformer(
                WIDTH, HEADS, 2, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=norm_first
            )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=causal, tgt_is_causal=True)
        return tensor(self.head(y))


class PeriBlock(nn.Module):
    """Peri-LN: a norm before each branch and one after it, before the residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_in1, self.norm_out1 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm_in2, self.norm_out2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_in1(x)
        x = x + self.norm_out1(self.attn(h, h, h, need_weights=False)[0])
        return tensor(x + self.norm_out2(self.mlp(self.norm_in2(x))))


class PeriClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(PeriBlock(), PeriBlock())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return tensor(self.head(self.blocks(self.embedding(input_ids)).mean(1)))


class WeightNormed(nn.Module):
    """Norms read by linears under `weight_norm`, as in DINO's head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = weight_norm(nn.Linear(WIDTH, 2 * WIDTH))
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)
        self.last_norm = nn.LayerNorm(WIDTH)
        self.head = weight_norm(nn.Linear(WIDTH, CLASSES, bias=False))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return tensor(self.head(self.last_norm(x)))


def _encoder(norm_first: bool, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: EncoderClassifier(norm_first, bias)


def _seq2seq(norm_first: bool) -> Callable[[], nn.Module]:
    return lambda: Seq2Seq(norm_first)


def _padded_ids(generator: torch.Generator, size: int) -> Example:
    (ids,), _ = token_ids(generator, size)
    return Example((ids,), {"src_key_padding_mask": padding(*ids.shape)})


FAMILIES = [
    Family("torch encoder, pre-norm", _encoder(norm_first=True), _padded_ids, 5),
    Family("torch encoder, post-norm", _encoder(norm_first=False), token_ids, 5),
    Family("torch encoder, pre-norm, bias-free", _encoder(norm_first=True, bias=False), token_ids, 5),
    Family("torch encoder, post-norm, bias-free", _encoder(norm_first=False, bias=False), _padded_ids, 5),
    Family("torch transformer, pre-norm", _seq2seq(norm_first=True), source_and_target, 12),
    Family("torch transformer, post-norm", _seq2seq(norm_first=False), source_and_target, 12),
    Family("peri-ln with multi-head attention", PeriClassifier, token_ids, 8),
    Family("weight-normed linears", WeightNormed, token_ids, 2),
]
