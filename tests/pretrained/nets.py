"""Small trained-looking models: random gains, biases and heads, tokens of different scale, padding that would show."""

import torch
from torch import Tensor, nn

from stabnorm import convert_norms
from stabnorm.norms import NormSearch
from stabnorm.pretrained import Runner, measure_norms

VOCABULARY, DIM, LENGTH = 40, 16, 9
Batch = dict[str, Tensor]


class Reader(nn.Module):
    """An embedding, two post-norm blocks, a mean over what is no padding and a head."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, DIM)
        self.positions = nn.Embedding(LENGTH, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.ModuleList(nn.Linear(DIM, 2 * DIM) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * DIM, DIM) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(DIM, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1])))
        for up, down, norm in zip(self.up, self.down, self.norms, strict=True):
            x = norm(x + self.dropout(down(nn.functional.gelu(up(x)))))
        weights = attention_mask[..., None].to(x.dtype)
        pooled: Tensor = self.head((x * weights).sum(1) / weights.sum(1))
        return pooled


def post_norm(seed: int = 0) -> Reader:
    """With weights at random, such that nothing is checked by accident."""
    torch.manual_seed(seed)
    model = Reader()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
        model.words.weight.mul_(torch.linspace(0.5, 2, VOCABULARY)[:, None])
    return model


def batches(count: int = 6, size: int = 16, seed: int = 1) -> list[Batch]:
    """Sentences of several lengths, the batches too; words beyond the mask are drawn from a share of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = LENGTH - number % 3
        ids = torch.randint(VOCABULARY, (size, length), generator=generator)
        lengths = torch.randint(2, length + 1, (size,), generator=generator)
        mask = torch.arange(length) < lengths[:, None]
        made.append({"input_ids": torch.where(mask, ids, 3), "attention_mask": mask.long()})
    return made


def converted_pair(model: nn.Module, seen: list[Batch]) -> tuple[nn.Module, nn.Module, list[list[str]]]:
    """The original and its converted twin, both in eval mode, and the norms by depth."""
    twin = type(model)()
    twin.load_state_dict(model.state_dict())
    convert_norms(twin, center=True, filtration=None)
    measure = measure_norms(model.eval(), NormSearch(model).found, seen, Runner())
    return model, twin.eval(), [list(level) for level in measure.levels]
