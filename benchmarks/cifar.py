"""CIFAR-10 (Krizhevsky, 2009) from one file of JPEGs, and a small vision transformer for it; data for the studies."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stabnorm.examples.digits import Batch, DigitsViT

TRAIN_IMAGES, TEST_IMAGES = 10_000, 2_000


def cifar_loaders(path: Path, batch_size: int) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Load the first 10 000 training and 2 000 test images, with pixels from -1 to 1.

    Args:
        path: An npz file that holds, for "train" and "test", `*_jpeg` (all files end to end), `*_offsets` and
            `*_labels`.
        batch_size: Images in a training batch. The test images come in one batch.
    """
    with np.load(path) as file:
        train, test = _decode(file, "train", TRAIN_IMAGES), _decode(file, "test", TEST_IMAGES)
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(test, len(test))


def _decode(file: Any, part: str, count: int) -> TensorDataset:
    joined, offsets = file[f"{part}_jpeg"], file[f"{part}_offsets"]
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(joined[offsets[i] : offsets[i + 1]].tobytes()))) for i in range(count)]
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return TensorDataset(pixels, torch.from_numpy(file[f"{part}_labels"][:count].astype(np.int64)))


class CifarViT(DigitsViT):
    """The vision transformer of `examples.digits`, for 32x32 colour images as 64 patches of 4x4 pixels."""

    def __init__(self, dim: int = 64, **options: Any) -> None:
        super().__init__(dim, **options)
        self.patches = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.positions = nn.Parameter(0.5 * torch.randn(64, dim))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch in which each image is mirrored at random."""
        images, labels = batch
        mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        loss = F.cross_entropy(self(mirrored), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss
