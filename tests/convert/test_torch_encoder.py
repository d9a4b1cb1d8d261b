"""torch's encoder computes in eval what the converted norms say, and not what its fused path would make of them."""

import copy
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from stabnorm import convert_norms
from stabnorm.convert import Target
from stabnorm.nn import PRepBN
from tests.families import randomize_
from tests.families.family import padding

BATCH, LENGTH, WIDTH = 3, 7, 12

both_orders = pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
masks = pytest.mark.parametrize("mask", [None, padding(BATCH, LENGTH)], ids=["whole", "padded"])


@pytest.fixture(autouse=True)
def _nested_tensors_say_that_they_are_a_prototype() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        yield


def encoder(norm_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=not norm_first)
    randomize_(model, seed=1)
    return model.eval().double()


def with_lam(model: nn.Module, lam: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.fill_(lam)
    return model


def by_hand(model: nn.TransformerEncoder, x: Tensor, mask: Tensor | None) -> Tensor:
    """The layers' Python, step by step."""
    norm_first = model.layers[0].norm_first
    for layer in model.layers:
        h = layer.norm1(x) if norm_first else x
        x = x + layer.self_attn(h, h, h, key_padding_mask=mask, need_weights=False)[0]
        x = x if norm_first else layer.norm1(x)
        h = layer.norm2(x) if norm_first else x
        x = x + layer.linear2(torch.relu(layer.linear1(h)))
        x = x if norm_first else layer.norm2(x)
    y: Tensor = x if model.norm is None else model.norm(x)
    return y


@both_orders
@masks
@pytest.mark.parametrize("lam", [1.0, 0.3, 0.0])
def test_eval_is_what_the_norms_say_with_no_hook_and_no_gradient(
    norm_first: bool, mask: Tensor | None, lam: float
) -> None:
    plain = encoder(norm_first)
    model = copy.deepcopy(plain)
    convert_norms(model)
    randomize_(model, seed=2).load_state_dict(plain.state_dict())
    with_lam(model, lam)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool) if mask is None else ~mask
    with torch.no_grad():
        y = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(y, by_hand(model, x, mask), rtol=1e-9, atol=1e-9)
        assert y.shape == x.shape
        fused = plain(x, src_key_padding_mask=mask)
    apart = (y - fused)[valid].abs().max()
    assert apart < 1e-9 if lam == 1 else apart > 0.1


@both_orders
def test_the_fused_path_would_be_wrong(norm_first: bool) -> None:
    """What the test above holds off: with torch's switches as they were, the converted norms are passed over."""
    model = encoder(norm_first)
    convert_norms(model)
    with_lam(model, 0.0)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        right = model(x)
        for layer in model.layers:
            layer.activation_relu_or_gelu = 1
        assert (model(x) - right).abs().max() > 0.1


@both_orders
@pytest.mark.parametrize("to", ["repbn", "unified", "power"])
def test_other_norms_are_not_passed_over_either(norm_first: bool, to: Target) -> None:
    model = encoder(norm_first)
    convert_norms(model, to)
    randomize_(model, seed=2)
    x, mask = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64), padding(BATCH, LENGTH)
    with torch.no_grad():
        y = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(y, by_hand(model, x, mask), rtol=1e-9, atol=1e-9)


def test_copies_and_pickles_keep_off_it_too() -> None:
    model = encoder(norm_first=False)
    convert_norms(model)
    with_lam(model, 0.0)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), y)


def test_a_layer_without_a_converted_norm_stays_on_it() -> None:
    model = encoder(norm_first=False)
    convert_norms(model, include=[r"layers\.1\.", "^norm$"])
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 0]
    last_only = encoder(norm_first=False)
    convert_norms(last_only, include="^norm$")
    assert last_only.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in last_only.layers] == [1, 1]


def test_norms_that_were_put_there_by_hand_are_kept_off_it_as_well() -> None:
    model = encoder(norm_first=False)
    for layer in model.layers:
        layer.norm1, layer.norm2 = PRepBN(WIDTH).double(), PRepBN(WIDTH).double()
    with_lam(randomize_(model, seed=2).eval(), 0.0)
    convert_norms(model, exclude="^norm$")
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model, x, None), rtol=1e-9, atol=1e-9)
