"""`sigma_reparametrize`: nothing changes at the call, the largest singular value is the gain, and the fold is exact."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabNormError, apply_manifest, fold_norms
from stabnorm.nn.sigma_reparam import SigmaReparam
from stabnorm.remedies import sigma_reparametrize
from tests.remedies.family import check_compiled, check_fold, in_the_family, largest, net, tokens, train


def encoder() -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@in_the_family
def test_sigma_reparametrize(check: Callable[..., None]) -> None:
    """T17, the conversion preserves the outputs to 1e-6; and what holds for every remedy."""
    check(net, tokens(), sigma_reparametrize)


@in_the_family
def test_sigma_reparametrize_of_torchs_encoder(check: Callable[..., None]) -> None:
    """Its fused path for eval reads the computed weights, too."""
    check(encoder, torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)), sigma_reparametrize)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_is_one_graph(training: bool) -> None:
    check_compiled(lambda: net(depth=1), tokens(), lambda model: sigma_reparametrize(model, r"q_proj|fc1"), training)


def test_the_fold_is_exact_and_leaves_plain_layers() -> None:
    """T17, the fold materialises the weight."""
    check_fold(net, tokens(), sigma_reparametrize)
    model = net()
    sigma_reparametrize(model)
    train(model, tokens())
    result = fold_norms(model.eval(), tokens())
    assert {type(module) for module in result.model.modules()} == {type(module) for module in net().modules()}
    fresh = net()
    sigma_reparametrize(fresh)
    for built in (apply_manifest(net(), result.manifest), apply_manifest(fresh, result.manifest)):
        built.load_state_dict(result.model.state_dict(), strict=True)
        assert largest(built.eval()(tokens()), model(tokens())) < 1e-6


def test_in_place_a_fold_that_fails_leaves_the_reparametrized_model() -> None:
    model = net().eval()
    sigma_reparametrize(model)
    before = model(tokens())
    with pytest.raises(ValueError, match="example"):
        fold_norms(model, torch.randn(2, 3), inplace=True)
    assert torch.equal(model(tokens()), before)
    assert isinstance(model.head, SigmaReparam)


def test_the_largest_singular_value_stays_the_gain_after_twenty_forwards() -> None:
    """T17: within 1 %, while the weight itself is trained."""
    model = net(width=32)
    sigma_reparametrize(model)
    train(model, tokens(), steps=20, lr=0.1)
    for module in model.modules():
        if isinstance(module, SigmaReparam):
            weight: Any = module.weight
            assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(
                module.spectral_norms.item(), rel=0.01
            )


def test_logits_cannot_leave_the_bound_that_the_gains_set_whatever_the_weights_do() -> None:
    """T18: with s the bound on the logits, the entropy is at least that of one key at +s and all others at -s."""
    torch.manual_seed(0)
    width, keys = 16, 12
    projections: Any = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in "qk"})
    sigma_reparametrize(projections)
    x = nn.functional.normalize(torch.randn(keys, width), dim=-1)
    with torch.no_grad():
        for projection in projections.values():
            projection._parameters["weight"].mul_(1e4).add_(torch.randn(width, width))
    for _ in range(50):  # each forward in training makes a power iteration
        q, k = projections["q"](x), projections["k"](x)
    bound = (projections["q"].spectral_norms * projections["k"].spectral_norms).item()
    logits = (q @ k.T).detach()
    assert float(logits.abs().max()) <= bound * 1.01
    assert float(_entropy(logits).min()) >= _least_entropy(1.01 * bound * math.sqrt(keys), keys)


def _entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def _least_entropy(norm: float, keys: int) -> float:
    """The bound of arXiv 2303.06296 for a row of logits of this length."""
    beta = math.exp(-norm * math.sqrt(keys / (keys - 1)))
    share = 1 + (keys - 1) * beta
    return math.log(share) + norm * math.sqrt(keys * (keys - 1)) * beta / share


def test_the_bound_of_the_entropy_is_attained() -> None:
    """T18: by one logit above the others, all of them with mean 0."""
    for norm in (0.5, 2.0, 6.0):
        row = torch.full((7,), -1.0)
        row[0] = 6
        row *= norm / row.norm()
        assert float(_entropy(row)) == pytest.approx(_least_entropy(norm, 7), rel=1e-4)


def test_queries_keys_and_values_in_one_weight_have_a_gain_each() -> None:
    model = encoder()
    sigma_reparametrize(model, include="self_attn$")
    attention = model.layers[0].self_attn
    assert attention.sigma_gain.shape == (3,)
    wanted = [torch.linalg.matrix_norm(part, 2) for part in attention.in_proj_weight.chunk(3)]
    torch.testing.assert_close(attention.spectral_norms, torch.stack(wanted), rtol=1e-5, atol=0)


def test_a_model_in_bfloat16_keeps_its_outputs() -> None:
    model = net().to(torch.bfloat16).eval()
    before = model(tokens())
    sigma_reparametrize(model)
    assert largest(model(tokens()).float(), before.float()) < 0.02
    assert model.head.sigma_left.dtype == torch.float32
    moved = net().eval()
    sigma_reparametrize(moved)
    assert torch.equal(moved.to(torch.bfloat16)(tokens()), model(tokens()))


def test_eval_mode_and_no_grad_change_no_state() -> None:
    model = net()
    sigma_reparametrize(model)
    with torch.no_grad():
        model.head._parameters["weight"].add_(1)
        left = model.head.sigma_left.clone()
        model(tokens())
    model.eval()(tokens())
    assert torch.equal(model.head.sigma_left, left)
    model.train()(tokens())
    assert not torch.equal(model.head.sigma_left, left)


def test_what_cannot_be_reparametrized_is_left_with_the_reason() -> None:
    model = net()
    nn.init.zeros_(model.blocks[0].fc2.weight)
    model.head.weight = model.embed.weight
    torch.nn.utils.parametrizations.orthogonal(model.blocks[0].fc1)
    nn.init.constant_(model.blocks[1].fc1.weight, float("nan"))
    left = sigma_reparametrize(model).left
    assert left["blocks.0.fc2"] == "its weight is zero, which has no direction to scale"
    assert left["head"].startswith("its weight is also embed.weight")
    assert "parametrized" in left["blocks.0.fc1"]
    assert "NaN" in left["blocks.1.fc1"]
    with pytest.raises(StabNormError, match="it is reparametrized already"):
        sigma_reparametrize(model, include="q_proj")


def test_the_gradient_is_that_of_the_formula_with_constant_vectors() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    sigma_reparametrize(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    weight = model[0]._parameters["weight"].detach().clone().requires_grad_()
    gain = torch.ones(1, dtype=torch.float64, requires_grad=True)
    u, v = model[0].sigma_left[0].double(), model[0].sigma_right[0].double()
    ((gain * model[0].sigma_start / (u @ weight @ v) * weight) @ x.T).square().sum().backward()
    torch.testing.assert_close(model[0]._parameters["weight"].grad, weight.grad)
    torch.testing.assert_close(model[0].sigma_gain.grad, gain.grad)


def test_transposed_weights_of_hugging_face_are_reparametrized() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"c_attn": conv1d(24, 8), "c_proj": conv1d(8, 8)})
    x = torch.randn(3, 8)
    before = model["c_attn"](x)
    sigma_reparametrize(model)
    assert largest(model["c_attn"](x), before) < 5e-6
    assert model["c_attn"].sigma_gain.shape == (3,)
    norms = torch.stack([torch.linalg.matrix_norm(part, 2) for part in model["c_attn"].weight.T.chunk(3)])
    torch.testing.assert_close(model["c_attn"].spectral_norms, norms, rtol=1e-5, atol=0)
