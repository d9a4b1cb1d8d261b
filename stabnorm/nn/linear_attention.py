"""SimplifiedLinearAttention: SLAB's attention, whose cost is linear in the number of tokens (arXiv 2405.11582)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._checks import check_count, check_flag, check_number, shown
from stabnorm._models.masks import mask_for

EPS = 1e-6  # added to the sum of weights, as published: a query that fits no key gets 0
CHUNK = 64  # tokens whose weights are computed at once where attention is causal


class SimplifiedLinearAttention(nn.Module):
    r"""Attention with ReLU in the place of the softmax, and a depthwise convolution beside it (arXiv:2405.11582, SLAB).

    .. math:: o_i = \frac{\phi(q_i) \sum_j \phi(k_j)^\top v_j}{\phi(q_i) \sum_j \phi(k_j)^\top + 10^{-6}}
              + \mathrm{DWC}(v)_i,\qquad \phi = \mathrm{ReLU}

    for each head; the sums are over all tokens, or with `causal` over those up to i. The keys get a learnt position
    before the ReLU. The convolution is over the grid of patches, or over the text, with a kernel for each channel of a
    head that all heads share.

    It takes the place of the attention of a vision transformer, with the names of timm's: ``block.attn =
    SimplifiedLinearAttention(dim, heads, grid=(14, 14), prefix=1)``. The norm in front of it is read by `qkv` alone, so
    it folds there. The authors published the layers for DeiT and Swin, and their language model keeps the softmax. So
    `causal` is ours: the same formula over the tokens so far, in chunks, with a convolution that sees no later token.

    The published code differs in this: it takes the mask of shifted windows and ignores it; it needs a square grid of
    patches and no class token; it leaves autocast on for what it computes in float32, except on CUDA; and the `eval` of
    its layer for Swin returns nothing. It also takes `attn_drop`, a scale and a focusing factor, and uses none of them.

    Args:
        dim: number of channels.
        num_heads: number of heads.
        grid: rows and columns of patches; None for text. Default: None.
        prefix: how many tokens stand before the patches, such as a class token. They attend and are attended to, and
            the convolution leaves them out. Default: 0.
        length: the largest number of tokens of a text, which get learnt positions; None where the model has positions
            already. With a grid, its patches and prefix have them. Default: None.
        causal: whether a token sees only those up to itself; for text. Default: False.
        kernel_size: of the convolution. Default: 5.
        qkv_bias: whether queries, keys and values have a bias. Default: True.
        proj_drop: dropout of the output. Default: 0.

    Shape:
        ``[B, N, dim]`` to the same shape, with N = prefix + rows * columns where there is a grid. `mask` is bool ``[B,
        N]``, True = valid token.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range, or does not go with another.

    >>> attention = SimplifiedLinearAttention(16, 4, grid=(3, 5), prefix=1)
    >>> attention(torch.randn(2, 16, 16)).shape
    torch.Size([2, 16, 16])
    >>> text = SimplifiedLinearAttention(16, 4, causal=True)
    >>> x = torch.randn(1, 9, 16)
    >>> torch.allclose(text(x)[:, :4], text(x[:, :4]), atol=1e-6)
    True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: Sequence[int] | None = None,
        prefix: int = 0,
        length: int | None = None,
        causal: bool = False,
        kernel_size: int = 5,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("dim", dim, hint=", the number of channels")
        check_count("num_heads", num_heads)
        check_count("prefix", prefix, 0)
        check_count("kernel_size", kernel_size)
        check_flag("causal", causal)
        check_flag("qkv_bias", qkv_bias)
        check_number("proj_drop", proj_drop, least=0, most=1)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}. Give a divisor")
        if grid is not None:
            if not isinstance(grid, tuple | list) or len(grid) != 2:
                raise ValueError(
                    f"grid={shown(grid)} is no pair. Give the rows and columns of patches, such as (14, 14)"
                )
            for size in grid:
                check_count("grid", size, hint=": rows and columns of patches")
            if causal or length is not None:
                raise ValueError("grid= is for images, causal= and length= are for text. Leave one of them out")
        elif prefix:
            raise ValueError(
                f"prefix={prefix} counts the tokens before the patches of a grid. Give grid=, or leave it out"
            )
        if length is not None:
            check_count("length", length, hint=": the largest number of tokens")
        if not causal and not kernel_size % 2:
            raise ValueError(f"kernel_size={kernel_size} has no middle. Give an odd number")
        self.dim, self.num_heads, self.head_dim, self.causal = dim, num_heads, dim // num_heads, causal
        self.grid = None if grid is None else (grid[0], grid[1])
        self.prefix, self.kernel_size = prefix, kernel_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        convolution: type[nn.Conv1d | nn.Conv2d] = nn.Conv1d if grid is None else nn.Conv2d
        around = 0 if causal else kernel_size // 2
        self.dwc = convolution(self.head_dim, self.head_dim, kernel_size, padding=around, groups=self.head_dim)
        places = length if self.grid is None else prefix + self.grid[0] * self.grid[1]
        self.positional_encoding = None if places is None else nn.Parameter(torch.zeros(1, places, dim))

    def reset_parameters(self) -> None:
        """Reset projections, convolution and positions."""
        for layer in (self.qkv, self.proj, self.dwc):
            layer.reset_parameters()
        if self.positional_encoding is not None:
            nn.init.zeros_(self.positional_encoding)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            x: the tokens.
            mask: which of them are valid. Default: those that `stabnorm.valid_tokens` says, or all.
            attn_mask: None; blocks of timm pass it on.
            is_causal: the same; True where the layer is causal.

        Raises:
            ValueError: x or `mask` has another shape, `attn_mask` is given, or the layer is not causal as asked.
        """
        valid = self._checked(x, mask, attn_mask, is_causal)
        if not x.shape[1]:  # torch convolves no text without tokens
            return self.proj(x)  # type: ignore[no-any-return]
        if valid is not None:  # not by a product: padding may hold NaN, which a gradient of 0 would keep
            x = torch.where(valid[..., None], x, 0)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.positional_encoding is not None:
            k = k + self.positional_encoding[:, : x.shape[1]].to(k.dtype)
        q, k = torch.relu(q), torch.relu(k)
        if valid is not None:  # of padding they are the biases
            k, v = torch.where(valid[..., None], k, 0), torch.where(valid[..., None], v, 0)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))  # [B, heads, N, C]
        with torch.autocast(x.device.type, enabled=False):
            wide = [part.double() if part.dtype == torch.float64 else part.float() for part in (q, k, v)]
            attended = (causal_attention if self.causal else linear_attention)(*wide)
        y = attended.to(v.dtype) + self._near(v)
        projected: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return projected

    def _near(self, v: Tensor) -> Tensor:
        """Convolve the values ``[B, heads, N, C]`` of each head over their places."""
        tokens = v.shape[2]
        channels = v[:, :, self.prefix :].flatten(0, 1).transpose(1, 2)
        if self.grid is not None:
            channels = channels.unflatten(-1, self.grid)
        elif self.causal:
            channels = nn.functional.pad(channels, (self.kernel_size - 1, 0))
        near = self.dwc(channels).flatten(2).transpose(1, 2).unflatten(0, v.shape[:2])
        return nn.functional.pad(near, (0, 0, tokens - near.shape[2], 0))

    def _checked(self, x: Tensor, mask: Tensor | None, attn_mask: Any, is_causal: bool) -> Tensor | None:
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, and it must be [B, N, {self.dim}]")
        if self.grid is not None and x.shape[1] != self.prefix + self.grid[0] * self.grid[1]:
            raise ValueError(
                f"x has {x.shape[1]} tokens, but grid={self.grid} and prefix={self.prefix} make "
                f"{self.prefix + self.grid[0] * self.grid[1]}. Build the layer with the grid that the model has"
            )
        if self.positional_encoding is not None and x.shape[1] > self.positional_encoding.shape[1]:
            raise ValueError(
                f"x has {x.shape[1]} tokens, more than length={self.positional_encoding.shape[1]}. Build the layer "
                "with a larger length"
            )
        if attn_mask is not None:
            raise ValueError(
                "linear attention sums over the keys once for all queries, so it has no mask of pairs. Leave attn_mask "
                "out; mask= takes valid tokens, and causal=True is an argument of the layer"
            )
        if is_causal and not self.causal:
            raise ValueError("is_causal=True asks for a causal layer. Build it with causal=True")
        if mask is None:
            return mask_for(x.shape[:2], type(self).__name__)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask is bool {tuple(x.shape[:2])}, True = valid token; got {given}")
        return mask

    def extra_repr(self) -> str:
        """Return the arguments; some only if they differ from their default."""
        options = "" if self.grid is None else f", grid={self.grid}"
        options += f", prefix={self.prefix}" if self.prefix else ""
        options += ", causal=True" if self.causal else ""
        options += f", kernel_size={self.kernel_size}" if self.kernel_size != 5 else ""
        return f"{self.dim}, num_heads={self.num_heads}{options}"


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return q (k' v) / (q sum k + eps) for ``[..., N, C]``, in the cheaper of two orders; q and k are not negative."""
    tokens, channels = q.shape[-2:]
    total = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    both = q @ (k.transpose(-2, -1) @ v) if tokens > channels else (q @ k.transpose(-2, -1)) @ v
    return both / (total + EPS)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same over the tokens up to each; linear in N: pairs within a chunk, sums over the chunks before."""
    tokens = q.shape[-2]
    chunk = min(CHUNK, tokens)
    # Contiguous, because the products of torch 2.6 in a compiled graph need it. Then [..., chunks, tokens, C].
    padded = (nn.functional.pad(part.contiguous(), (0, 0, 0, -tokens % chunk)) for part in (q, k, v))
    q, k, v = (part.unflatten(-2, (-1, chunk)) for part in padded)
    within = (q @ k.transpose(-2, -1)).tril()
    product = within @ v + q @ _before(k.transpose(-2, -1) @ v)
    total = within.sum(-1, keepdim=True) + q @ _before(k.sum(-2)[..., None])
    return (product / (total + EPS)).flatten(-3, -2)[..., :tokens, :]


def _before(sums: Tensor) -> Tensor:
    """Sum over the chunks ``[..., chunks, C, D]`` before each."""
    shifted = torch.cat([torch.zeros_like(sums[..., :1, :, :]), sums[..., :-1, :, :]], -3)
    return shifted.cumsum(-3)
