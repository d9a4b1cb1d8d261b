"""Small models with attention of every kind."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, DIM, HEADS = 13, 24, 3


class Fused(nn.Module):
    """Self-attention by `scaled_dot_product_attention`, or written out."""

    def __init__(self, causal: bool = True, written_out: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.causal, self.written_out = HEADS, causal, written_out
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=bias), nn.Linear(DIM, DIM)
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.written_out:
            logits = q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5
            if self.causal:
                logits = logits + torch.full((x.shape[1], x.shape[1]), torch.finfo(torch.float32).min).triu(1)
            mixed = F.softmax(logits, dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class MultiHead(nn.Module):
    """`nn.MultiheadAttention`, in both of its ways."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.inner(x, x, x, key_padding_mask=mask, need_weights=self.need_weights)[0]
        return out


class Text(nn.Module):
    """Embedding, blocks of attention and norm, and a head."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, DIM)
        self.attentions = nn.ModuleList(attentions or [Fused()])
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for attention in self.attentions:
            x = x + attention(self.norm(x))
        logits: Tensor = self.head(x)
        return logits


def batch(size: int = 4, length: int = 7) -> Tensor:
    return torch.randint(VOCABULARY, (size, length))


def loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
