"""SimplifiedLinearAttention: the published formula, causal text, padding, and PRepBN beside it as published."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import convert_norms, fold_norms, valid_tokens
from stabnorm.nn import SimplifiedLinearAttention
from stabnorm.nn._progressive import ProgressiveNorm
from stabnorm.nn.linear_attention import CHUNK, causal_attention, linear_attention


def drawn(**options: Any) -> SimplifiedLinearAttention:
    torch.manual_seed(0)
    attention = SimplifiedLinearAttention(12, 3, **options).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return attention


def published(layer: SimplifiedLinearAttention, x: Tensor) -> Tensor:
    """The formula of the paper, head by head and token by token."""
    q, k, v = layer.qkv(x).chunk(3, -1)
    if layer.positional_encoding is not None:
        k = k + layer.positional_encoding[:, : x.shape[1]]
    q, k = q.clamp(min=0), k.clamp(min=0)
    batch, tokens, _ = x.shape
    width, y = layer.head_dim, torch.zeros_like(v)
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        for b in range(batch):
            values = v[b, layer.prefix :, part].T  # [C, places]
            weight, bias, half = layer.dwc.weight, layer.dwc.bias, layer.kernel_size // 2
            assert bias is not None
            for i in range(tokens):
                seen = i + 1 if layer.causal else tokens
                weights = k[b, :seen, part] @ q[b, i, part]
                y[b, i, part] = weights @ v[b, :seen, part] / (weights.sum() + 1e-6)
                place = i - layer.prefix
                if place < 0:
                    continue
                y[b, i, part] += bias
                if layer.grid is None:
                    for tap in range(layer.kernel_size):
                        other = place + tap - (layer.kernel_size - 1 if layer.causal else half)
                        if 0 <= other < values.shape[1]:
                            y[b, i, part] += weight[:, 0, tap] * values[:, other]
                else:
                    rows, columns = layer.grid
                    for down in range(layer.kernel_size):
                        for right in range(layer.kernel_size):
                            r, c = place // columns + down - half, place % columns + right - half
                            if 0 <= r < rows and 0 <= c < columns:
                                y[b, i, part] += weight[:, 0, down, right] * values[:, r * columns + c]
    projected: Tensor = layer.proj(y)
    return projected


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"grid": (3, 4), "prefix": 1}, 13),
        ({"grid": (2, 2), "kernel_size": 3}, 4),
        ({"length": 9}, 7),
        ({"causal": True, "kernel_size": 4}, 7),
        ({"causal": True, "length": 5, "qkv_bias": False}, 5),
    ],
    ids=str,
)
@torch.no_grad()
def test_it_is_the_published_formula(options: dict[str, Any], tokens: int) -> None:
    layer = drawn(**options)
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), published(layer, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 3, CHUNK, 2 * CHUNK + 5])
def test_both_orders_and_the_chunks_give_the_sums_over_pairs(tokens: int) -> None:
    q, k, v = (torch.randn(2, 3, tokens, 4, dtype=torch.float64).abs() for _ in range(3))
    weights = q @ k.transpose(-2, -1)
    torch.testing.assert_close(linear_attention(q, k, v), weights @ v / (weights.sum(-1, keepdim=True) + 1e-6))
    weights = weights.tril()
    torch.testing.assert_close(causal_attention(q, k, v), weights @ v / (weights.sum(-1, keepdim=True) + 1e-6))


def test_a_later_token_changes_nothing_before_it() -> None:
    layer = drawn(causal=True)
    x = torch.randn(1, CHUNK + 9, 12, dtype=torch.float64)
    y = layer(x)
    x[:, 40:] = torch.randn_like(x[:, 40:])
    again = layer(x)
    torch.testing.assert_close(again[:, :40], y[:, :40])
    assert not torch.allclose(again[:, 40:], y[:, 40:])


@pytest.mark.parametrize("by_context", [False, True])
@pytest.mark.parametrize(("causal", "padding"), [(False, 1e6), (True, 1e6), (True, torch.nan)])
def test_padding_of_any_value_changes_no_valid_token_and_no_gradient(
    causal: bool, padding: float, by_context: bool
) -> None:
    layer = drawn(causal=causal)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    padded = torch.cat([x, torch.full((2, 3, 12), padding, dtype=torch.float64)], 1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    want = layer(x)
    if by_context:
        with valid_tokens(mask):
            y = twin(padded)
    else:
        y = twin(padded, mask)
    torch.testing.assert_close(y[:, :6], want)
    want.square().sum().backward()
    y[:, :6].square().sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_gradients_pass_gradcheck() -> None:
    layer = drawn(causal=True)
    x = torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_under_autocast_and_in_bfloat16_the_sums_are_float32() -> None:
    layer = drawn(grid=(4, 4)).float()
    x = torch.randn(2, 16, 12)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    torch.testing.assert_close(low.float(), want, rtol=0.1, atol=0.3)
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"grid": (3, 3)}, {"causal": True}], ids=str)
def test_it_compiles_to_one_graph(options: dict[str, Any]) -> None:
    layer = drawn(**options).float()
    x = torch.randn(2, 9, 12)
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(0, 6, 12), (2, 0, 12)])
def test_an_empty_batch_and_a_text_without_tokens_give_as_much(shape: tuple[int, ...], causal: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = drawn(causal=causal)(x)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    assert y.shape == x.shape == x.grad.shape


def test_it_saves_loads_copies_and_says_what_it_is() -> None:
    layer = drawn(grid=(2, 3), prefix=1)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    fresh = SimplifiedLinearAttention(12, 3, grid=(2, 3), prefix=1).double()
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(fresh(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    assert "12, num_heads=3, grid=(2, 3), prefix=1" in repr(layer)
    fresh.reset_parameters()
    assert not fresh.positional_encoding.any()  # type: ignore[union-attr]


class Block(nn.Module):
    """A pre-norm block as in SLAB."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attn = SimplifiedLinearAttention(12, 3, **options)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


@pytest.mark.slow
@pytest.mark.parametrize("to", ["prepbn", "taper"])
@pytest.mark.parametrize("options", [{"grid": (3, 3)}, {"causal": True}], ids=str)
def test_the_norms_before_it_fold_into_it_exactly(options: dict[str, Any], to: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), Block(**options), Block(**options), nn.LayerNorm(12), nn.Linear(12, 2))
    model = model.double()
    convert_norms(model, to)
    x = torch.randn(4, 9, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(4):
        for norm in model.modules():
            if isinstance(norm, ProgressiveNorm):
                norm.lam.fill_(max(0.0, 1 - step / 3))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    result = fold_norms(model, x)
    assert [norm.status for norm in result.norms] == ["forward"] * 5
    want = model(x)
    assert (result.model(x) - want).abs().max() < 1e-12 * want.abs().max()


def test_it_takes_the_place_of_the_attention_of_a_vision_transformer() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
    for block in model.blocks:
        block.attn = SimplifiedLinearAttention(192, 3, grid=(4, 4), prefix=1)
    images = torch.randn(2, 3, 64, 64)
    convert_norms(model)
    model(images).square().mean().backward()
    assert all(block.attn.dwc.weight.grad is not None for block in model.blocks)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        SimplifiedLinearAttention(12, 5)
    with pytest.raises(ValueError, match="grid=7 is no pair"):
        SimplifiedLinearAttention(12, 3, grid=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid= is for images"):
        SimplifiedLinearAttention(12, 3, grid=(2, 2), causal=True)
    with pytest.raises(ValueError, match="prefix=1"):
        SimplifiedLinearAttention(12, 3, prefix=1)
    with pytest.raises(ValueError, match="kernel_size=4 has no middle"):
        SimplifiedLinearAttention(12, 3, kernel_size=4)
    layer = SimplifiedLinearAttention(12, 3, grid=(2, 2))
    with pytest.raises(ValueError, match="x has 5 tokens"):
        layer(torch.randn(1, 5, 12))
    with pytest.raises(ValueError, match="no mask of pairs"):
        layer(torch.randn(1, 4, 12), attn_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="causal=True"):
        layer(torch.randn(1, 4, 12), is_causal=True)
    with pytest.raises(ValueError, match="mask is bool"):
        layer(torch.randn(1, 4, 12), torch.ones(1, 4))
    with pytest.raises(ValueError, match="more than length=3"):
        SimplifiedLinearAttention(12, 3, length=3)(torch.randn(1, 4, 12))
