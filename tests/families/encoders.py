"""Post-norm encoders as Hugging Face writes them: BERT, and ALBERT, which runs one block again and again."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.family import VOCABULARY, Example, Family, merge_heads, padding, split_heads, tensor, token_ids

WIDTH, HEADS, CLASSES, LENGTH = 12, 2, 3, 7


class BertEmbeddings(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(LENGTH, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.position_embeddings(position)
        x = x + self.token_type_embeddings(torch.zeros_like(input_ids))
        return tensor(self.dropout(self.LayerNorm(x)))


class BertSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (split_heads(each(x), HEADS) for each in (self.query, self.key, self.value))
        return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


class BertOutput(nn.Module):
    """Linear, residual add, norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, WIDTH)
        self.dropout = nn.Dropout(0.0)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return tensor(self.LayerNorm(self.dropout(self.dense(x)) + residual))


class BertAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = BertSelfAttention()
        self.output = BertOutput(WIDTH)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return tensor(self.output(self.self(x, bias), x))


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = BertAttention()
        self.intermediate = nn.Linear(WIDTH, 2 * WIDTH)
        self.output = BertOutput(2 * WIDTH)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = self.attention(x, bias)
        return tensor(self.output(F.gelu(self.intermediate(x)), x))


def attention_bias(attention_mask: Tensor | None) -> Tensor | None:
    """[B, L], 1 = valid token -> [B, 1, 1, L] to add to the scores."""
    if attention_mask is None:
        return None
    return (1.0 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(WIDTH)
        self.layer = nn.ModuleList([BertLayer() for _ in range(2)])
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, bias = self.embeddings(input_ids), attention_bias(attention_mask)
        for layer in self.layer:
            x = layer(x, bias)
        return tensor(self.classifier(torch.tanh(self.pooler(x[:, 0]))))


class Albert(nn.Module):
    """Small embedding, and one layer shared by all depths."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(8)
        self.embedding_hidden_mapping_in = nn.Linear(8, WIDTH)
        self.layer = BertLayer()
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding_hidden_mapping_in(self.embeddings(input_ids))
        for _ in range(3):
            x = self.layer(x, attention_bias(attention_mask))
        return tensor(self.classifier(x[:, 0]))


def _padded_ids(generator: torch.Generator, size: int) -> Example:
    (ids,), _ = token_ids(generator, size)
    is_padding = padding(*ids.shape)
    return Example((ids.masked_fill(is_padding, 0),), {"attention_mask": (~is_padding).long()})


FAMILIES = [
    Family("bert", Bert, _padded_ids, 5),
    Family("albert, one shared block", Albert, _padded_ids, 3),
]
