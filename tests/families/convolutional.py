"""ConvNeXt and PVT v2 as timm writes them: norms between convolutions, channels first and last."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.family import Family, images, merge_heads, split_heads, tensor
from tests.families.vision import CLASSES, Mlp

WIDTH = 8


class LayerNorm2d(nn.LayerNorm):
    """Channels first."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return tensor(x + y.mul(self.gamma.reshape(1, -1, 1, 1)))


class ConvNeXtHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(width, eps=1e-6)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.fc(self.norm(x.mean((2, 3), keepdim=True)).flatten(1)))


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 4, stride=4), LayerNorm2d(WIDTH, eps=1e-6))
        downsample = nn.Sequential(LayerNorm2d(WIDTH, eps=1e-6), nn.Conv2d(WIDTH, 2 * WIDTH, 2, stride=2))
        self.stages = nn.Sequential(
            ConvNeXtBlock(WIDTH), ConvNeXtBlock(WIDTH), downsample, ConvNeXtBlock(2 * WIDTH), ConvNeXtBlock(2 * WIDTH)
        )
        self.head = ConvNeXtHead(2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.head(self.stages(self.stem(x))))


class OverlapPatchEmbed(nn.Module):
    """A convolution with zero padding, and its norm."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.norm(self.proj(x).permute(0, 2, 3, 1)))  # [B, H, W, C]


class SpatialReductionAttention(nn.Module):
    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr = nn.Conv2d(width, width, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width) if reduction > 1 else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q = split_heads(self.q(x), 2)
        if self.sr is not None and self.norm is not None:
            x = self.sr(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
            x = self.norm(x)
        k, v = (split_heads(part, 2) for part in self.kv(x).chunk(2, dim=-1))
        return tensor(self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v))))


class MlpWithDepthwise(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.dwconv = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.dwconv(self.fc1(x).transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        return tensor(self.fc2(F.gelu(x)))


class PvtBlock(nn.Module):
    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SpatialReductionAttention(width, reduction)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MlpWithDepthwise(width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), size)
        return tensor(x + self.mlp(self.norm2(x), size))


class PvtStage(nn.Module):
    """Its last norm is read by the next stage's padded convolution."""

    def __init__(self, channels: int, width: int, reduction: int) -> None:
        super().__init__()
        first = reduction > 1
        self.downsample = OverlapPatchEmbed(channels, width, 7 if first else 3, 4 if first else 2)
        self.blocks = nn.ModuleList([PvtBlock(width, reduction)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, -1, channels)
        for block in self.blocks:
            x = block(x, (height, width))
        return tensor(self.norm(x).reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous())


class PyramidVisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(PvtStage(3, WIDTH, 2), PvtStage(WIDTH, 2 * WIDTH, 1))
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.head(self.stages(x).mean((-1, -2))))


FAMILIES = [
    Family("convnext", ConvNeXt, images(16, 24), 7),
    Family("pvt", PyramidVisionTransformer, images(16, 24), 9),
]
