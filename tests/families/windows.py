"""Swin and SwinV2 as timm writes them: windows, cyclic shift, padding where the windows do not divide the grid."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.family import Family, images, tensor
from tests.families.vision import CLASSES, Mlp

WINDOW, WIDTH, HEADS = 4, 8, 2


def partition(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B windows, WINDOW^2, C]."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, WINDOW * WINDOW, channels)


def reverse(windows: Tensor, height: int, width: int) -> Tensor:
    """The way back."""
    channels = windows.shape[-1]
    x = windows.view(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def shift_mask(height: int, width: int, shift: int) -> Tensor | None:
    """[windows, 1, WINDOW^2, WINDOW^2]: -100 where a shifted window joins what is not neighbouring."""
    if not shift:
        return None
    edges = (slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None))
    region = torch.zeros(1, height, width, 1)
    for number, (rows, columns) in enumerate((rows, columns) for rows in edges for columns in edges):
        region[:, rows, columns] = number
    of_window = partition(region).squeeze(-1)
    return (of_window[:, None] != of_window[:, :, None]).float().mul(-100)[:, None]


def relative_position_index() -> Tensor:
    at = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
    apart = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + WINDOW - 1
    return apart[..., 0] * (2 * WINDOW - 1) + apart[..., 1]


class WindowAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, HEADS) * 0.02)
        self.register_buffer("relative_position_index", relative_position_index(), persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask.repeat(len(x) // len(mask), 1, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return tensor(self.proj(y.transpose(1, 2).flatten(2)))


class WindowAttentionV2(nn.Module):
    """Cosine attention; the qkv weight is read with a bias put together on the way; positions through an MLP."""

    k_bias: Tensor
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, HEADS, bias=False))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        side = torch.arange(1 - WINDOW, WINDOW).float() / (WINDOW - 1) * 8
        table = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)
        table = table.sign() * torch.log2(table.abs() + 1) / math.log2(8)
        self.register_buffer("relative_coords_table", table, persistent=False)
        self.register_buffer("relative_position_index", relative_position_index(), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        table = self.cpb_mlp(self.relative_coords_table).view(-1, HEADS)
        scores = scores + 16 * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))
        if mask is not None:
            scores = scores + mask.repeat(len(x) // len(mask), 1, 1, 1)
        return tensor(self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


class SwinBlock(nn.Module):
    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(width)
        self.attn: nn.Module = WindowAttention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 2 * width)

    def attend(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))  # zeros where the windows do not divide
        rows, columns = x.shape[1:3]
        x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2)) if self.shift else x
        x = reverse(self.attn(partition(x), shift_mask(rows, columns, self.shift)), rows, columns)
        x = torch.roll(x, (self.shift, self.shift), dims=(1, 2)) if self.shift else x
        return x[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        tokens = x.flatten(1, 2)
        return tensor(tokens + self.mlp(self.norm2(tokens))).view(x.shape)


class SwinV2Block(SwinBlock):
    """Norms after the branches, before the residual add."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__(width, shift)
        self.attn = WindowAttentionV2(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attend(x))
        tokens = x.flatten(1, 2)
        return tensor(tokens + self.norm2(self.mlp(tokens))).view(x.shape)


class PatchMerging(nn.Module):
    """Four neighbours side by side, then norm and linear; linear and norm in V2."""

    def __init__(self, width: int, norm_last: bool) -> None:
        super().__init__()
        self.norm_last = norm_last
        self.norm = nn.LayerNorm(2 * width if norm_last else 4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.view(batch, x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return tensor(self.norm(self.reduction(x)) if self.norm_last else self.reduction(self.norm(x)))


class WindowPatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.norm(self.proj(x).permute(0, 2, 3, 1)))


class SwinTransformer(nn.Module):
    def __init__(self, version: int = 1) -> None:
        super().__init__()
        block = SwinBlock if version == 1 else SwinV2Block
        self.patch_embed = WindowPatchEmbed()
        self.layers = nn.Sequential(
            nn.Sequential(block(WIDTH, 0), block(WIDTH, WINDOW // 2)),
            PatchMerging(WIDTH, norm_last=version == 2),
            nn.Sequential(block(2 * WIDTH, 0), block(2 * WIDTH, 0)),
        )
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layers(self.patch_embed(x)))
        return tensor(self.head(x.mean((1, 2))))


FAMILIES = [
    Family("swin", SwinTransformer, images(16, 16), 11),
    Family("swin, padded windows", SwinTransformer, images(12, 14), 11),
    Family("swin v2", lambda: SwinTransformer(version=2), images(16, 16), 11),
]
