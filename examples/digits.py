"""A small Pre-LN vision transformer on scikit-learn's digit images, and a fault that ruins its training.

The model and its training are as simple as Lightning allows, and do not use stabnorm: other examples start from here.
One run of 600 steps takes about fifteen seconds on two cores and ends above 95 % test accuracy.
"""

import math
from typing import TypeAlias

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images of shape (count, 1, 8, 8), ink from -1 (none) to 1, and the digits they show, of shape (count,)."""

BLANK = -1.0
TRAIN_IMAGES = 1000


def digits_loaders(batch_size: int = 64) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Load the 1797 real digit images, always with the same 1000 for training and 797 for testing.

    Args:
        batch_size: Images in a training batch. The test images come in one batch.

    Returns:
        The training loader, shuffled by torch's global generator, and the test loader.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(1).unsqueeze(1)
    dataset = TensorDataset(images, torch.from_numpy(digits.target))
    # A generator of its own: the split must not change with the seed of the run.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = (TensorDataset(*dataset[part]) for part in (order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]))
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(test, len(test))


def augment(images: Tensor, shift: int = 1, noise: float = 0.1) -> Tensor:
    """Move each image by up to `shift` pixels along each axis, and add Gaussian noise."""
    count, _, height, width = images.shape
    padded = F.pad(images, [shift] * 4, value=BLANK)
    top, left = torch.randint(2 * shift + 1, (2, count, 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device)).unsqueeze(2)
    columns = (left + torch.arange(width, device=images.device)).unsqueeze(1)
    image = torch.arange(count, device=images.device).view(-1, 1, 1)
    moved = padded[image, 0, rows, columns].unsqueeze(1)
    return moved + noise * torch.randn_like(moved)


class Attention(nn.Module):
    """Multi-head self-attention over tokens; if it is causal, no token sees later tokens."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, dim / heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """A Pre-LN transformer block: each branch normalises its input, and the residual stream is not normalised."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


def with_warmup_and_cosine(optimizer: Optimizer, warmup_steps: int, steps: int) -> OptimizerLRSchedulerConfig:
    """Let the learning rate rise over `warmup_steps`, and then fall along half a cosine to zero at `steps`."""

    def factor(step: int) -> float:
        warmup = (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return min(warmup, (1 + math.cos(math.pi * max(0.0, progress))) / 2)

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class DigitsViT(LightningModule):
    """A vision transformer that reads an 8x8 digit as 16 patches of 2x2 pixels.

    Args:
        dim: Width of the residual stream.
        depth: Number of blocks, each with two LayerNorms; one more LayerNorm is before the head.
        heads: Attention heads of a block.
        lr: The peak learning rate, after `warmup_steps`. Then it falls along a cosine to zero at the end of the run,
            so the trainer must know the end: give it `max_steps` or `max_epochs`.
        warmup_steps: Optimizer steps over which the learning rate rises to `lr`.
        weight_decay: weight decay of AdamW.
    """

    def __init__(
        self,
        dim: int = 48,
        depth: int = 4,
        heads: int = 4,
        lr: float = 3e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # `stabnorm replay` builds the model from them
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.patches = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        # As large as the patches themselves: tokens are averaged at the end, and only this distinguishes them.
        self.positions = nn.Parameter(0.5 * torch.randn(16, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to the logits of the ten digits."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a newly augmented batch."""
        images, digits = batch
        loss = F.cross_entropy(self(augment(images)), digits)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the share of test images that are recognised."""
        images, digits = batch
        accuracy = (self(images).argmax(dim=1) == digits).float().mean()
        self.log("val/accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Use AdamW with a linear warm-up, and then half a cosine down to zero."""
        optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return with_warmup_and_cosine(optimizer, self.warmup_steps, int(self.trainer.estimated_stepping_batches))


class Destabilize(Callback):
    """A weight decay with the wrong sign: from some step on, one part of the model grows instead of shrinking.

    In each step AdamW multiplies every weight matrix by `1 - lr * weight_decay`. This callback also multiplies those of
    one submodule by `growth`. It changes nothing else, and until `start` the run has the bits of the healthy one.

    At first the fault cannot be seen in the loss. The branches add more and more to the residual stream, but the next
    LayerNorm divides by the growth again. So for some twenty steps the loss equals that of the healthy run, and it
    takes sixty or more until it has doubled. The *inputs* of the norms show the fault within fifteen steps.

    Args:
        target: Name of the submodule, such as "blocks.3"; "" is the whole model.
        start: Number of healthy optimizer steps.
        growth: The factor per step. A real fault is smaller and takes longer; the default shows it within a minute.
    """

    def __init__(self, target: str = "", start: int = 300, growth: float = 1.01) -> None:
        self.target = target
        self.start = start
        self.growth = growth

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the weights grow after the backward and before the update, at the place where AdamW decays them."""
        if trainer.global_step >= self.start:
            for parameter in pl_module.get_submodule(self.target).parameters():
                if parameter.ndim > 1:  # gains and biases have no decay to get wrong
                    parameter.mul_(self.growth)
