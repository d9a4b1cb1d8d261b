"""`fold_norms`: what it takes, what it leaves alone, what it verifies and takes back, and what it says."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import StabNormError, fold_norms
from stabnorm.fold import FoldedNorm, FrozenAffine
from stabnorm.nn import PRepBN, RepBN
from tests.families import FAMILIES
from tests.fold.nets import Net, draw, error_of, net, ready, swapped

C, D = 6, 5


def simple() -> nn.Module:
    return ready(Net(lambda m, x: m.fc(m.norm(x)), norm=RepBN(C), fc=nn.Linear(C, D)))


def statuses(result: Any) -> dict[str, str]:
    return {norm.name: norm.status for norm in result.norms}


# --- what it takes ---


@pytest.mark.parametrize(
    "example",
    [
        draw(3, C),
        (draw(3, C),),
        {"x": draw(3, C)},
        ((draw(3, C),), {}),
        ((), {"x": draw(3, C), "gain": 2.0}),
        {"x": draw(3, C), "gain": torch.tensor(2.0, dtype=torch.float64)},
        [draw(3, C), (draw(2, 4, C), 3.0)],
    ],
)
def test_an_example_is_a_tensor_positional_or_keyword_arguments_both_or_several(example: Any) -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = RepBN(C), nn.Linear(C, D)

        def forward(self, x: Tensor, gain: Any = 1.0) -> Tensor:
            y: Tensor = self.fc(self.norm(x)) * gain
            return y

    assert statuses(fold_norms(ready(Gained()), example)) == {"norm": "forward"}


@pytest.mark.parametrize(("example", "says"), [(3, "int"), ([], "no input"), (["text"], "str")])
def test_anything_else_is_told_what_to_pass(example: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        fold_norms(simple(), example)


def test_a_model_in_training_mode_is_told_to_leave_it() -> None:
    with pytest.raises(StabNormError, match=r"eval\(\)"):
        fold_norms(simple().train(), draw(3, C))
    half = simple()
    half.get_submodule("norm").train()
    with pytest.raises(StabNormError, match="'norm' is in training mode"):
        fold_norms(half, draw(3, C))


def test_an_example_that_does_not_run_says_so_with_the_model_s_own_words() -> None:
    with pytest.raises(ValueError, match=r"does not run on the example.*num_features=6"):
        fold_norms(simple(), draw(3, C + 1))
    with pytest.raises(ValueError, match="does not run on check"):
        fold_norms(simple(), draw(3, C), check=draw(3, C + 1))


@pytest.mark.parametrize("options", [{"residual": "yes"}, {"tied": "no"}])
def test_an_unknown_option_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Choose"):
        fold_norms(simple(), draw(3, C), **options)


def test_what_cannot_be_followed_is_named() -> None:
    with pytest.raises(StabNormError, match="itself a norm"):
        fold_norms(RepBN(C).eval(), torch.randn(3, C))
    with pytest.raises(StabNormError, match=r"is compiled.*Fold first"):
        fold_norms(torch.compile(simple(), backend="eager"), draw(3, C))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about scripting
        model = nn.Sequential(simple(), torch.jit.trace(nn.Linear(D, D).double(), draw(2, D))).eval()
    with pytest.raises(StabNormError, match=r"'1' is scripted.*Fold first"):
        fold_norms(model, draw(3, C))


def test_a_model_that_draws_in_eval_is_told() -> None:
    model = ready(Net(lambda m, x: F.dropout(m.fc(m.norm(x)), training=True), norm=RepBN(C), fc=nn.Linear(C, D)))
    with pytest.raises(ValueError, match="something else each time"):
        fold_norms(model, draw(3, C))


def test_one_tensor_passed_three_times_stays_one() -> None:
    def same(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        assert q is k is v
        return m.fc(m.norm(q))

    x = draw(3, C)
    model = ready(Net(same, norm=RepBN(C), fc=nn.Linear(C, D)))
    assert fold_norms(model, (x, x, x)).checked_on == "the example and a second input of another size"


# --- what it leaves alone ---


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = simple()
    before, modules, random = copy.deepcopy(model.state_dict()), list(model.modules()), torch.get_rng_state()
    result = fold_norms(model, draw(3, C))
    assert result.model is not model
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_in_place_folds_the_model_itself_and_nothing_on_an_error() -> None:
    model, twin = simple(), simple()
    result = fold_norms(model, draw(3, C), inplace=True)
    assert result.model is model
    assert isinstance(model.get_submodule("norm"), FoldedNorm)
    assert error_of(model, twin, [(draw(2, C, seed=4),)]) < 1e-12
    stays = ready(nn.Sequential(nn.Linear(C, C), RepBN(C), nn.Linear(C, C), nn.LayerNorm(C)))
    before = copy.deepcopy(stays.state_dict())
    with pytest.raises(StabNormError, match="1 norms are kept, the first is '3'"):
        fold_norms(stays, draw(3, C), strict=True, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in stays.state_dict().items())


# --- what it keeps, and says ---


def test_norms_that_normalise_stay_and_are_named() -> None:
    parts = [RepBN(C), nn.Linear(C, C), nn.LayerNorm(C), nn.RMSNorm(C), nn.GroupNorm(2, C), PRepBN(C)]
    model = ready(nn.Sequential(*parts, nn.BatchNorm1d(C, track_running_stats=False), nn.Linear(C, D)))
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"0": "forward", **{str(i): "kept" for i in range(2, 7)}}
    reasons = {norm.name: norm.reason for norm in result.norms}
    assert "convert_norms" in reasons["2"]
    assert "lam=1" in reasons["5"]
    assert "running statistics" in reasons["6"]
    assert "6 norms: 1 forward, 5 kept" in str(result)


def test_a_norm_with_hooks_stays_since_they_would_go_with_it() -> None:
    model = simple()
    model.get_submodule("norm").register_forward_hook(lambda *_: None)
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"norm": "kept"}
    assert "hooks" in result.norms[0].reason


def test_a_norm_that_no_example_reaches_stays() -> None:
    parts = {"norm": RepBN(C), "fc": nn.Linear(C, D)}
    model = ready(Net(lambda m, x, use=False: m.fc(m.norm(x) if use else x), **parts))
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"norm": "kept"}
    assert "no example reaches it" in result.norms[0].reason
    assert isinstance(result.model.get_submodule("norm"), RepBN)


def test_several_examples_are_the_union_of_what_reads_a_norm() -> None:
    parts = {"norm": RepBN(C), "fc": nn.Linear(C, D)}
    model = ready(Net(lambda m, x, act=False: m.fc(m.norm(x).relu() if act else m.norm(x)), **parts))
    assert statuses(fold_norms(model, [draw(3, C), (draw(3, C), True)])) == {"norm": "affine"}


def test_a_factor_that_follows_the_shape_is_seen_with_two_shapes() -> None:
    model = ready(Net(lambda m, x: m.fc(m.norm(x) * x.shape[1] ** -0.5), norm=RepBN(C), fc=nn.Linear(C, D)))
    result = fold_norms(model, [draw(2, 4, C), draw(2, 9, C)])
    assert statuses(result) == {"norm": "affine"}


def test_a_padding_that_follows_the_shape_is_seen_with_two_shapes() -> None:
    model = ready(
        Net(lambda m, x: m.fc(F.pad(m.norm(x), (0, 0, 0, -x.shape[1] % 4))), norm=RepBN(C), fc=nn.Linear(C, D))
    )
    only = fold_norms(model, draw(2, 4, C), check=draw(3, 4, C, seed=1))
    assert statuses(only) == {"norm": "forward"}
    for example in (draw(2, 4, C), [draw(2, 4, C), draw(2, 5, C)]):
        result = fold_norms(model, example)
        assert statuses(result) == {"norm": "affine"}
        assert "zeros of a padding" in result.norms[0].reason
    scale_only = ready(Net(model.function, norm=RepBN(C, center=False), fc=nn.Linear(C, D)))  # type: ignore[arg-type]
    assert statuses(fold_norms(scale_only, [draw(2, 4, C), draw(2, 5, C)])) == {"norm": "forward"}


def test_an_output_left_out_frees_the_norm_that_makes_it() -> None:
    model = ready(Net(lambda m, x: (m.fc(m.norm(x)), m.norm(x)), norm=RepBN(C), fc=nn.Linear(C, D)))
    assert statuses(fold_norms(model, draw(3, C))) == {"norm": "affine"}
    result = fold_norms(model, draw(3, C), outputs=lambda output: output[0])
    assert statuses(result) == {"norm": "forward"}


def test_a_norm_that_leaves_by_numpy_is_not_folded() -> None:
    parts = {"norm": RepBN(C), "fc": nn.Linear(C, D)}
    model = ready(Net(lambda m, x: m.fc(torch.from_numpy(m.norm(x).numpy() ** 2)), **parts))
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"norm": "affine"}
    assert "rolled back" not in result.norms[0].reason


# --- tied weights ---


def tied() -> nn.Module:
    model = net(lambda m, ids: m.head(m.norm(m.embedding(ids))), embedding=nn.Embedding(9, C), norm=RepBN(C),
                head=nn.Linear(C, 9, bias=False))()  # fmt: skip
    model.get_submodule("head").weight = model.get_submodule("embedding").weight
    return ready(model)


def test_a_tied_head_gets_a_weight_of_its_own() -> None:
    model, ids = tied(), torch.arange(8).view(2, 4)
    result = fold_norms(model, ids)
    assert statuses(result) == {"norm": "forward"}
    assert result.manifest["untied"] == ["head.weight"]
    assert torch.equal(result.model.get_parameter("embedding.weight"), model.get_parameter("embedding.weight"))
    assert error_of(result.model, model, [(ids.flip(1),)]) < 1e-12


def test_a_tied_head_is_left_on_request_and_stays_tied() -> None:
    result = fold_norms(tied(), torch.arange(8).view(2, 4), tied="refuse")
    assert statuses(result) == {"norm": "affine"}
    assert "tied='untie'" in result.norms[0].reason
    assert result.model.get_parameter("embedding.weight") is result.model.get_submodule("head").weight


def test_a_bias_on_a_lora_adapter_is_warned_of() -> None:
    family = FAMILIES["nanogpt with lora"]
    model = ready(swapped(family.build()))
    with pytest.warns(UserWarning, match=r"4 LoRA adapters, first 'h\.0\.attn\.c_attn\.lora_A\.bias'.*Merge"):
        fold_norms(model, tuple(family.example()))


# --- what it verifies and takes back ---


class Liar(nn.Module):
    """Says it is affine, and is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs().mean(-1, keepdim=True)

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        return torch.ones(C), torch.zeros(C), -1


def test_a_norm_that_is_not_what_it_says_is_kept_and_the_others_fold() -> None:
    parts = {"norm": RepBN(C), "fc": nn.Linear(C, C), "liar": Liar(), "head": nn.Linear(C, D)}
    model = ready(Net(lambda m, x: m.head(m.liar(m.fc(m.norm(x)))), **parts))
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"norm": "forward", "liar": "kept"}
    assert "rolled back" in result.norms[1].reason
    assert error_of(result.model, model, [(draw(2, C, seed=3),)]) < 1e-12


def test_an_overflow_in_the_model_s_own_precision_does_not_hide_a_fault_in_float64() -> None:
    parts = {"liar": Liar(), "fc": nn.Linear(C, D)}
    model = ready(Net(lambda m, x: 1e4 * m.fc(m.liar(x)), **parts)).half()
    x = draw(3, C).half()
    assert model(9 * x).isinf().any()
    result = fold_norms(model, [x, 9 * x])
    assert statuses(result) == {"liar": "kept"}
    assert "rolled back" in result.norms[0].reason


def test_a_norm_whose_weight_the_model_computes_with_stays_and_says_so() -> None:
    model = ready(Net(lambda m, x: m.fc(m.norm(x)) * m.norm.weight[0], norm=RepBN(C), fc=nn.Linear(C, D)))
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"norm": "kept"}
    assert "does not run (IndexError" in result.norms[0].reason


def test_a_path_the_example_does_not_take_is_found_by_the_second_input() -> None:
    def signed(m: Any, x: Tensor) -> Any:
        return m.fc(m.norm(x)) if x.std() < 1.2 else m.fc(m.norm(x).relu())

    model = ready(Net(signed, norm=RepBN(C), fc=nn.Linear(C, D)))
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"norm": "affine"}
    assert "relu in the model's own forward reads it, on a second input of another size" in result.norms[0].reason
    assert error_of(result.model, model, [(draw(3, C),), (9 * draw(3, C),)]) < 1e-12


def test_a_stream_changed_in_place_behind_a_norm_is_taken_back() -> None:
    def hurried(m: Any, x: Tensor) -> Any:
        x = x.clone()
        h = m.norm(x)
        x += 1.0
        return m.fc(h) + x[..., :D]

    model = ready(Net(hurried, norm=RepBN(C), fc=nn.Linear(C, D)))
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"norm": "affine"}
    assert error_of(result.model, model, [(draw(3, C, seed=5),)]) < 1e-12


def test_a_check_that_cannot_see_a_fault_is_said_to_be_vacuous() -> None:
    model = simple()
    nn.init.zeros_(model.get_parameter("fc.weight"))
    with pytest.warns(UserWarning, match="check of the fold says nothing"):
        result = fold_norms(model, draw(3, C))
    assert result.vacuous
    assert "says nothing" in result.summary


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float64).min, -torch.inf])
def test_masked_logits_do_not_hide_a_fault(mask: float) -> None:
    def masked(m: Any, x: Tensor) -> Any:
        return m.head(m.liar(m.fc(m.norm(x)))).masked_fill(torch.arange(D) == 1, mask)

    parts = {"norm": RepBN(C), "fc": nn.Linear(C, C), "liar": Liar(), "head": nn.Linear(C, D)}
    result = fold_norms(ready(Net(masked, **parts)), draw(3, C))
    assert statuses(result) == {"norm": "forward", "liar": "kept"}
    assert not result.vacuous


def test_a_second_input_that_does_not_run_is_done_without() -> None:
    def strict(m: Any, x: Tensor) -> Any:
        assert x.shape == (3, C)
        return m.fc(m.norm(x / (x.std() < 0.12)))

    model = ready(net(strict, norm=RepBN(C), fc=nn.Linear(C, D))())
    assert fold_norms(model, 0.1 * draw(3, C) + 2).checked_on == "the example"
    model.function = lambda m, x: m.fc(m.norm(x)) if x.shape == (3, C) else None  # type: ignore[assignment]
    assert fold_norms(model, draw(3, C)).checked_on == "the example and a second input"
    assert fold_norms(simple(), draw(3, C), check=[draw(2, C), draw(1, C)]).checked_on == "the example and check"


def test_where_float64_does_not_run_the_check_says_what_it_ran_in() -> None:
    model = nn.Sequential(nn.Linear(C, C), RepBN(C), nn.Linear(C, D), nn.ReLU(), nn.Linear(D, D)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model[2:], {nn.Linear}, dtype=torch.qint8)
    model = nn.Sequential(*list(model)[:2], quantised).eval()
    result = fold_norms(model, torch.randn(3, C))
    assert statuses(result) == {"1": "backward"}
    assert result.precision == "float32"
    refused = fold_norms(nn.Sequential(RepBN(C), quantised).eval(), torch.randn(3, C))
    assert statuses(refused) == {"0": "affine"}
    assert refused.max_rel_error < 1e-9
    assert refused.precision == "float32"  # though its error is none
    assert "linear_dynamic" in refused.norms[0].reason


# --- numbers ---


def test_what_is_left_is_one_multiply_add_per_channel() -> None:
    affine = FrozenAffine(draw(C), draw(C, seed=1), 1)
    x = draw(2, C, 3, 4, seed=2)
    expected = x * affine.scale.view(C, 1, 1) + affine.shift.view(C, 1, 1)
    assert torch.allclose(affine(x), expected, rtol=1e-14)
    assert affine.bfloat16()(x.bfloat16(), None).dtype == torch.bfloat16


def test_residual_can_be_forbidden_and_auto_leaves_float16_alone() -> None:
    parts = {"norm": RepBN(C), "fc": nn.Linear(C, C), "last": RepBN(C), "head": nn.Linear(C, D)}

    def post(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return m.head(m.last(h + m.fc(h)))

    model = ready(Net(post, **parts))
    assert statuses(fold_norms(model, draw(3, C))) == {"norm": "residual", "last": "forward"}
    assert fold_norms(model, draw(3, C)).max_gauge > 1
    forbidden = fold_norms(model, draw(3, C), residual=False)
    assert statuses(forbidden) == {"norm": "affine", "last": "forward"}
    assert "residual=True" in forbidden.norms[0].reason
    half = fold_norms(model.half(), draw(3, C).half(), residual="auto")
    assert statuses(half) == {"norm": "affine", "last": "forward"}


def test_a_stream_whose_scale_vanishes_is_not_divided_by_it() -> None:
    parts = {"norm": RepBN(C), "fc": nn.Linear(C, C), "last": RepBN(C), "head": nn.Linear(C, D)}
    model = ready(Net(lambda m, x: (lambda h: m.head(m.last(h + m.fc(h))))(m.norm(x)), **parts))
    with torch.no_grad():
        rstd = (model.get_buffer("norm.running_var") + 1e-5).rsqrt()
        model.get_parameter("norm.weight")[2] = -(model.get_parameter("norm.eta") / rstd[2])[0]
    result = fold_norms(model, draw(3, C))
    assert statuses(result) == {"norm": "affine", "last": "forward"}
    assert "vanishes" in result.norms[0].reason
