"""Vision transformers as timm writes them, and the MLP-Mixer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.family import Family, images, tensor

WIDTH, HEADS, CLASSES = 12, 2, 5


class PatchEmbed(nn.Module):
    def __init__(self, width: int = WIDTH, patch: int = 4) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.proj(x)).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.fc2(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return tensor(self.proj(y.transpose(1, 2).reshape(batch, length, width)))


class Block(nn.Module):
    def __init__(
        self, width: int = WIDTH, heads: int = HEADS, qk_norm: bool = False, layer_scale: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 2 * width)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return tensor(x + self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """The class token is read from `norm`, or `fc_norm` reads the tokens' mean."""

    def __init__(self, pool: str = "token", qk_norm: bool = False, layer_scale: bool = False) -> None:
        super().__init__()
        self.pool = pool
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH)) if pool == "token" else None
        self.pos_embed = nn.Parameter(torch.randn(1, 6 + (pool == "token"), WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(qk_norm=qk_norm, layer_scale=layer_scale) for _ in range(2)))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6) if pool == "token" else nn.Identity()
        self.fc_norm = nn.Identity() if pool == "token" else nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, CLASSES)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        x = x[:, 0] if self.pool == "token" else x.mean(1)
        return tensor(self.head(self.fc_norm(x)))


class DistilledVisionTransformer(nn.Module):
    """DeiT: two tokens, two heads on one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 8, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.head_dist = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token)]
        x = self.norm(self.blocks(torch.cat([*tokens, x], dim=1) + self.pos_embed))
        return tensor((self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2)


class MixerBlock(nn.Module):
    """The first norm's output is contracted over tokens, not channels."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp_tokens = Mlp(tokens, 2 * tokens)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp_channels = Mlp(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return tensor(x + self.mlp_channels(self.norm2(x)))


class MlpMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = PatchEmbed()
        self.blocks = nn.Sequential(*(MixerBlock(6) for _ in range(2)))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, CLASSES)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.stem(x)))
        return tensor(self.head(x.mean(1)))


def _vit(**options: str | bool) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(**options)  # type: ignore[arg-type]


_IMAGES = images(12, 8)  # 3 x 2 patches
FAMILIES = [
    Family("vit, class token", _vit(layer_scale=True), _IMAGES, 5),
    Family("vit, qk-norm", _vit(qk_norm=True), _IMAGES, 9),
    Family("vit, mean pool and fc_norm", _vit(pool="avg"), _IMAGES, 5),
    Family("deit, distilled", DistilledVisionTransformer, _IMAGES, 5),
    Family("mixer", MlpMixer, _IMAGES, 5),
]
