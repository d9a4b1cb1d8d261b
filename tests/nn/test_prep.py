"""PRepBN: bit-identical at lam = 1, RepBN at lam = 0, the blend between, one cached class over each norm class."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import valid_tokens
from stabnorm.convert import convert_norms
from stabnorm.errors import StabNormError
from stabnorm.nn import PRepBN, RepBN
from stabnorm.nn._over_norm import class_over
from stabnorm.ops import use_kernels
from tests.nn_modules import compile_one_graph, run
from tests.versions import needs_inductor


def bits(t: Tensor | None) -> Tensor:
    assert t is not None
    t = torch.where(t.isnan(), torch.nan, t)  # a NaN's sign and payload mean nothing
    return t.contiguous().view({4: torch.int32, 2: torch.int16}[t.element_size()])


COMPILED = [needs_inductor, pytest.mark.slow]


def inputs(finite: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, dy = torch.randn(4, 6, 8, dtype=dtype), torch.randn(4, 6, 8, dtype=dtype)
    dy[0, 0] = -0.0
    if not finite:
        x[1, 2, 3], x[2, 0, 0], dy[3, 3, 3] = torch.nan, torch.inf, torch.inf
    return x, dy


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILED)], ids=["eager", "compiled"])
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_at_lam_one_it_is_bit_for_bit_the_norm_while_rep_learns(kind: str, finite: bool, compiled: bool) -> None:
    norm = PRepBN(8, kind=kind)  # type: ignore[arg-type]
    plain = nn.LayerNorm(8) if kind == "layer" else nn.RMSNorm(8, 1e-5)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    norm.load_state_dict(plain.state_dict(), strict=False)
    ours: nn.Module = norm
    theirs: nn.Module = plain
    if compiled:
        torch._dynamo.reset()
        ours, theirs = (compile_one_graph(m) for m in (norm, plain))
    x, dy = inputs(finite)
    for part in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert torch.equal(*map(bits, part))
    for name, parameter in plain.named_parameters():
        assert torch.equal(bits(norm.get_parameter(name).grad), bits(parameter.grad))
    for parameter in norm.rep.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))  # type: ignore[arg-type]
    assert norm.rep.step == 1
    assert norm.rep.skips == (0 if finite else 1)
    assert torch.equal(norm.rep.running_var, torch.ones(8)) == (not finite)


def test_at_lam_zero_it_is_rep_and_what_the_norm_computes_does_not_matter() -> None:
    norm = PRepBN(8)
    alone = copy.deepcopy(norm.rep)
    norm.lam.zero_()
    norm.get_parameter("weight").data.fill_(torch.inf)
    x, dy = inputs(True)
    for got, want in zip(run(norm, x, dy), run(alone, x, dy), strict=True):
        assert torch.equal(got, want)
    norm.leave_out_norm = True
    assert torch.equal(norm(x), alone(x))


def test_between_it_is_the_blend_and_its_gradient() -> None:
    norm = PRepBN(8)
    norm.lam.fill_(0.3)
    layer, rep = nn.LayerNorm(8), RepBN(8, init="norm")
    x, dy = inputs(True)
    y, dx = run(norm, x, dy)
    x.requires_grad_()
    want = 0.3 * layer(x) + 0.7 * rep(x)
    want.backward(dy)
    torch.testing.assert_close(y, want.detach())
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(norm.get_parameter("weight").grad, layer.weight.grad)
    torch.testing.assert_close(norm.rep.weight.grad, rep.weight.grad)
    torch.testing.assert_close(norm.rep.eta.grad, rep.eta.grad)


def test_t10_eval_blends_until_lam_is_zero_or_is_rep_alone() -> None:
    blend, published = PRepBN(8), PRepBN(8, eval_mode="rep")
    x = 3 * torch.randn(4, 6, 8) + 1
    for norm in (blend, published):
        norm(x)
        norm.lam.fill_(0.5)
        norm.eval()
    rep = blend.rep(x)
    torch.testing.assert_close(blend(x), 0.5 * nn.functional.layer_norm(x, (8,)) + 0.5 * rep)
    assert torch.equal(published(x), rep)
    with pytest.raises(StabNormError, match=r"lam=0\.5"):
        blend.fold_affine()
    assert torch.equal(published.fold_affine()[0], published.rep.fold_affine()[0])
    blend.lam.zero_()
    assert torch.equal(blend(x), rep)
    scale, shift, _ = blend.fold_affine()
    torch.testing.assert_close(rep.double(), x * scale + shift, rtol=1e-5, atol=1e-5)


def test_gradients_between_pass_gradcheck() -> None:
    norm = PRepBN(5).double()
    norm.lam.fill_(0.3)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


def test_two_checked_out_axes_are_normalised_together() -> None:
    norm = PRepBN((3, 4))
    x = torch.randn(5, 3, 4)
    assert torch.equal(norm(x), nn.functional.layer_norm(x, (3, 4)))
    norm.lam.zero_()
    torch.testing.assert_close(norm(x).flatten(1), RepBN(12, init="norm")(x.flatten(1)))


class Scaled(nn.Module):
    """Somebody's own RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.scale * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


def test_an_object_of_somebodys_own_class_changes_its_class_and_stays_itself() -> None:
    theirs = Scaled(8)
    scale, x = theirs.scale, torch.randn(4, 6, 8)
    before = theirs(x)
    what_it_is = {"num_features": 8, "eps": 1e-6, "weight": "scale", "bias": None}
    theirs.__class__ = class_over(PRepBN, Scaled, "rms", **what_it_is)  # type: ignore[assignment]
    assert isinstance(theirs, PRepBN)
    theirs.eval()
    theirs.adopt(RepBN(8, center=False))
    assert not theirs.rep.training
    theirs.train()
    assert isinstance(theirs, Scaled)
    assert theirs.scale is scale
    assert torch.equal(theirs(x), before)
    assert class_over(PRepBN, Scaled, "rms", **what_it_is) is type(theirs)
    twin = pickle.loads(pickle.dumps(theirs))
    assert torch.equal(twin(x), before)
    theirs.lam.zero_()
    theirs.reset_parameters()  # its class has none
    assert theirs.lam == 1


def test_names_are_the_norms_own_and_reps() -> None:
    assert [name for name, _ in PRepBN(8).named_parameters()] == ["weight", "bias", "rep.weight", "rep.bias", "rep.eta"]
    assert PRepBN(8).rep.eta.shape == (1,)
    assert PRepBN(8, kind="rms").rep.bias is None
    assert set(nn.LayerNorm(8).state_dict()) < set(PRepBN(8).state_dict())


def test_rep_options_reach_rep() -> None:
    rep = PRepBN(8, momentum=0.2, filtration="calibrated", init="language", sync=True).rep
    assert (rep.momentum, rep.filtration, rep.init, rep.sync) == (0.2, "calibrated", "language", True)


def test_t9_lam_is_saved_and_moves_in_place_between_forward_and_backward() -> None:
    norm = PRepBN(8)
    norm.lam.fill_(0.25)
    fresh = PRepBN(8)
    fresh.load_state_dict(norm.state_dict())
    assert fresh.lam == 0.25
    x = torch.randn(4, 8, requires_grad=True)
    y = norm(x)
    norm.lam.zero_()
    y.backward(torch.ones_like(y))
    assert norm.get_parameter("bias").grad is not None
    torch.testing.assert_close(norm.get_parameter("bias").grad, torch.full((8,), 1.0))


def test_the_official_variant_is_the_published_module_with_lam_from_outside() -> None:
    from stabnorm.nn.official import OfficialPRepBN

    norm, published = PRepBN(8, variant="official"), OfficialPRepBN(8, total_steps=6)
    for _ in range(8):
        norm.lam.fill_(published.lam)
        x, dy = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
        for got, want in zip(run(norm, x, dy), run(published, x, dy), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    norm.lam.fill_(0.5)
    torch.testing.assert_close(norm.eval()(x), published.eval()(x))


def test_a_norm_left_out_still_answers_with_gradients_of_zero() -> None:
    norm = PRepBN(8)
    norm.lam.zero_()
    norm.leave_out_norm = True
    alone = copy.deepcopy(norm.rep)
    x, dy = inputs(True)
    for got, want in zip(run(norm, x, dy), run(alone, x, dy), strict=True):
        assert torch.equal(got, want)
    for own, theirs in zip(norm.rep.parameters(), alone.parameters(), strict=True):
        assert torch.equal(bits(own.grad), bits(theirs.grad))
    for name in ("weight", "bias"):  # DistributedDataParallel waits for them
        assert torch.equal(bits(norm.get_parameter(name).grad), bits(torch.zeros(8)))
    norm.requires_grad_(False)
    assert not norm(x).requires_grad


@pytest.mark.parametrize("shape", [8, (2, 4)])
def test_its_branches_are_what_it_blends_and_leave_the_statistics_alone(shape: int | tuple[int, ...]) -> None:
    norm = PRepBN(shape)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 7, *norm.normalized_shape)  # type: ignore[misc]
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    of_norm, of_rep, valid = norm.branches(x)
    assert valid is None
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    for lam in (0.0, 0.3, 1.0):
        norm.lam.fill_(lam)
        torch.testing.assert_close(norm(x).reshape(-1, 8), lam * of_norm + (1 - lam) * of_rep)


def test_a_norm_that_was_left_out_is_back_when_a_state_is_loaded() -> None:
    norm = PRepBN(8)
    before = norm.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    norm.lam.zero_()
    norm.leave_out_norm = True
    norm.load_state_dict(before)
    x = torch.randn(4, 8)
    assert torch.equal(norm(x), nn.functional.layer_norm(x, (8,)))


def test_reset_it_is_its_norm_again_and_rep_follows_the_norm() -> None:
    norm = PRepBN(8)
    norm.lam.zero_()
    norm.leave_out_norm = norm.fitted = True
    norm.reset_parameters()
    x = torch.randn(4, 8)
    assert norm.lam == 1
    assert torch.equal(norm(x), nn.functional.layer_norm(x, (8,)))
    nn.init.constant_(norm.get_parameter("weight"), 3.0)
    norm.start_from_norm()
    assert torch.equal(norm.rep.weight, torch.full((8,), 3.0))


def test_rep_starts_with_the_norms_gain_and_bias_and_no_skip_path() -> None:
    norm = nn.LayerNorm(8)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    convert_norms(nn.ModuleList([norm]))
    assert isinstance(norm, PRepBN)
    assert torch.equal(norm.rep.weight, norm.weight)
    assert norm.rep.bias is not None
    assert torch.equal(norm.rep.bias, norm.bias)
    assert norm.rep.eta == 0


def test_with_an_init_of_the_papers_it_stays_as_that_says() -> None:
    norm = PRepBN(8, init="vision")
    nn.init.normal_(norm.get_parameter("weight"))
    norm.start_from_norm()
    assert torch.equal(norm.rep.weight, torch.ones(8))
    assert norm.rep.eta == 1
    assert PRepBN(8, variant="official").rep.init == "vision"


@pytest.mark.parametrize("setting", ["aten", "cpp", "reference"])
def test_a_mask_from_outside_keeps_padding_out_on_every_backend(setting: str) -> None:
    norm, mask = PRepBN(8), torch.rand(5, 7) < 0.6
    norm.lam.fill_(0.5)
    x = torch.where(mask[..., None], torch.randn(5, 7, 8), 1e6)
    with use_kernels(setting), valid_tokens(mask):
        y = norm(x)
    rep = norm.rep.running_mean
    assert rep is not None
    torch.testing.assert_close(rep, 0.1 * x[mask].mean(0), rtol=1e-5, atol=1e-6)
    with use_kernels("reference"):
        torch.testing.assert_close(y[mask], norm(x, mask)[mask], rtol=1e-5, atol=1e-5)


def test_a_rep_with_a_forward_of_its_own_is_called() -> None:
    class Doubled(RepBN):
        def apply_with(self, *args: Any) -> Tensor:
            return 2 * super().apply_with(*args)

    norm, plain = PRepBN(8), PRepBN(8)
    norm.adopt(Doubled(8, init="norm"))
    norm.lam.zero_()
    plain.lam.zero_()
    x = torch.randn(64, 8)
    torch.testing.assert_close(norm(x), 2 * plain(x))
