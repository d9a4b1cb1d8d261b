"""A small Pre-LN character transformer on the English of Python's own documentation.

The text is `pydoc_data.topics`, which comes with Python: half a million characters of prose about the language. The
blocks are those of `examples.digits`. As there, the model and its training do not use stabnorm. 400 steps take about
ten seconds on two cores.
"""

from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeAlias

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from stabnorm.examples.digits import Block, with_warmup_and_cosine

Batch: TypeAlias = tuple[Tensor]
"""Windows of text, of shape (count, length + 1): what is read, and one character on, what is to be said."""

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 64
TEST_SHARE = 0.1


def encode(text: str) -> Tensor:
    """Return characters as indices into `ALPHABET`; any other character counts as a space."""
    index = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([index.get(character, index[" "]) for character in text])


def text_loaders(
    batch_size: int = 12, path: str | Path | None = None, test_windows: int = 400
) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Load windows of `CONTEXT` characters; the last tenth of the text is the test text.

    Args:
        batch_size: Windows in a training batch. The test windows come in one batch.
        path: Another text, UTF-8.
        test_windows: Number of test windows, spread over the test text.

    Returns:
        The training loader, shuffled by torch's global generator, and the test loader.
    """
    text = Path(path).read_text("utf-8") if path else "\n".join(topics[name] for name in sorted(topics))
    codes = encode(text)
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    split = int(len(windows) * (1 - TEST_SHARE))
    train, test = windows[:split], windows[split:]
    test = test[torch.linspace(0, len(test) - 1, min(test_windows, len(test))).long()]
    return DataLoader(TensorDataset(train), batch_size, shuffle=True, drop_last=True), DataLoader(
        TensorDataset(test), len(test)
    )


class CharacterTransformer(LightningModule):
    """A causal transformer that predicts the next character.

    Args:
        dim: Width of the residual stream.
        depth: Number of blocks, each with two LayerNorms; one more LayerNorm is before the head.
        heads: Attention heads of a block.
        lr: The peak learning rate, after `warmup_steps`; then it falls along a cosine to zero at the end of the run.
        warmup_steps: Optimizer steps over which the learning rate rises to `lr`.
        weight_decay: weight decay of AdamW, for matrices.
    """

    def __init__(
        self,
        dim: int = 48,
        depth: int = 3,
        heads: int = 4,
        lr: float = 3e-3,
        warmup_steps: int = 20,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.characters = nn.Embedding(len(ALPHABET), dim)
        self.positions = nn.Parameter(0.5 * torch.randn(CONTEXT, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, len(ALPHABET))

    def forward(self, codes: Tensor) -> Tensor:
        """Map characters to the logits of the next character, at every position."""
        tokens = self.characters(codes) + self.positions[: codes.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(tokens)))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next character, in nats."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch of windows."""
        loss = self.loss(*batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the cross-entropy of the test windows."""
        self.log("val/loss", self.loss(*batch), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Use AdamW with weight decay on matrices, a linear warm-up, and then half a cosine down to zero."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=self.lr)
        return with_warmup_and_cosine(optimizer, self.warmup_steps, int(self.trainer.estimated_stepping_batches))
