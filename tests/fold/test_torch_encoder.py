"""torch.nn.TransformerEncoder has a fused path for eval that reads its norms' weights and never calls them."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stabnorm import apply_manifest, fold_gains, fold_norms, to_pre_rms
from stabnorm.fold import FoldedNorm, FoldResult, FrozenAffine
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from tests.families import FAMILIES, randomize_
from tests.fold.nets import error_of, ready, swapped


def encoder(name: str) -> tuple[nn.Module, nn.Module]:
    family = FAMILIES[name]
    model = ready(swapped(family.build()))
    return model, fold_norms(model, tuple(family.example())).model


@pytest.mark.parametrize("name", ["torch encoder, pre-norm", "torch encoder, post-norm"])
def test_what_is_folded_is_computed_without_hooks_and_with_the_fast_path_on(name: str) -> None:
    model, folded = encoder(name)
    (ids,), _ = FAMILIES[name].example(4)
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        expected = model(ids)
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        assert torch.allclose(folded(ids), expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def test_padding_masks_go_without_nested_tensors() -> None:
    model, folded = encoder("torch encoder, post-norm")
    (ids,), _ = FAMILIES["torch encoder, post-norm"].example(4)
    padding = torch.zeros(ids.shape, dtype=torch.bool)
    padding[1, -2:] = True
    assert error_of(folded, model, [(ids, padding)]) < 1e-12
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # the fast path on: no nested tensor is built
        folded(ids, padding)


@pytest.mark.parametrize("fold", [fold_gains, to_pre_rms])
@pytest.mark.parametrize("grad", [False, True])
def test_norms_that_stay_are_computed_with_the_fast_path_on(fold: Callable[..., FoldResult], grad: bool) -> None:
    family = FAMILIES["torch encoder, pre-norm"]
    model = randomize_(family.build(), seed=1).eval()
    (ids,), _ = family.example(4)
    result = fold(model, (ids,))
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        expected = model(ids)
    torch.backends.mha.set_fastpath_enabled(True)
    loaded = apply_manifest(family.build().eval(), result.manifest)
    loaded.load_state_dict(result.model.state_dict(), strict=True)
    with torch.set_grad_enabled(grad):
        for folded in (result.model, loaded):
            assert torch.allclose(folded(ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert "5 kept, 5 of them without gain" in str(result) or fold is to_pre_rms


NORMS: dict[str, Callable[[], nn.Module]] = {
    "RepBN": lambda: RepBN(4),
    "RepBN, scale only": lambda: RepBN(4, center=False),
    "UnifiedNorm, no bias": lambda: UnifiedNorm(4, bias=False),
    "PRepBN": lambda: PRepBN(4, eval_mode="rep"),
    "PowerNorm": lambda: PowerNorm(4),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=list(NORMS))
@pytest.mark.parametrize("places", [("norm1", "norm2"), ("norm2",)])
def test_a_norm_put_there_by_hand_is_not_passed_over_before_it_is_folded(
    norm: Callable[[], nn.Module], places: tuple[str, ...]
) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    for place in places:
        setattr(layer, place, norm())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    layer = ready(layer)  # type: ignore[assignment]
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        slow = layer(x)
    torch.backends.mha.set_fastpath_enabled(True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), encoder):
        with torch.no_grad():
            assert torch.allclose(twin.eval()(x), slow, rtol=1e-9, atol=1e-9)


def test_an_encoder_built_before_says_what_to_do_about_nested_tensors() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).eval()
    model.layers[0].norm1, model.layers[0].norm2 = RepBN(4).eval(), RepBN(4).eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about nested tensors
        with pytest.raises(TypeError, match="use_nested_tensor = False"):
            model(torch.randn(2, 3, 4), src_key_padding_mask=padding)
        model.use_nested_tensor = False
        model(torch.randn(2, 3, 4), src_key_padding_mask=padding)


@pytest.mark.parametrize("left", [FoldedNorm(), FrozenAffine(torch.ones(4), torch.zeros(4))])
def test_what_stands_for_a_norm_never_has_another_s_eps(left: nn.Module) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    layer.norm1 = left  # type: ignore[assignment]
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        fast = layer(x)
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        slow = layer(x)
    torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(fast, slow, atol=1e-6)  # attention has a fused path of its own
