"""A conversion is done whole or not at all, and a norm's successor has what the norm had."""

import contextlib
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import (
    StabNormError,
    apply_manifest,
    convert_norms,
    fold_gains,
    fold_norms,
    recalibrate_norms,
    register_norm,
)
from stabnorm.fold import _apply
from stabnorm.nn import PRepBN, RepBN

TARGETS = ["prepbn", "repbn", "unified", "power"]
every_target = pytest.mark.parametrize("to", TARGETS)


def structure(model: nn.Module) -> list[Any]:
    """All that a failed call may not change: objects, classes, keys, hooks and flags."""
    return [
        (
            name,
            id(module),
            type(module),
            sorted(vars(module)),
            [(key, id(tensor), tensor.requires_grad) for key, tensor in module.state_dict(keep_vars=True).items()],
            {key: list(table) for key, table in vars(module).items() if "_hooks" in key},
            module.training,
        )
        for name, module in model.named_modules()
    ]


# --- nothing half done ---


class Sealed(nn.LayerNorm):
    """Takes no new attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rep":
            raise AttributeError("sealed")
        super().__setattr__(name, value)


class PerHead(nn.Module):
    """Normalises a head, and has a gain for each head: Cohere's, Chameleon's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps, self.num_features = nn.Parameter(torch.rand(2, 4)), 1e-5, 4

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def test_a_conversion_that_fails_at_one_norm_changes_none_and_names_it() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.LayerNorm(8), encoder, Sealed(8), nn.LayerNorm(8))
    model[0].register_forward_hook(lambda *_: None)
    before, x = structure(model), torch.randn(2, 3, 8)
    y = model.eval()(x)
    model.train()
    with pytest.raises(StabNormError, match=r"layer '2' \(Sealed\) cannot be converted to prepbn.*sealed.*exclude="):
        convert_norms(model)
    assert structure(model) == before
    assert torch.equal(model.eval()(x), y)
    assert len(convert_norms(model, exclude="^2$").converted) == 4


def test_a_place_that_takes_no_other_module_changes_no_norm() -> None:
    class Fixed(nn.Sequential):
        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, RepBN):
                raise TypeError("only LayerNorm here")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.LayerNorm(8), Fixed(nn.LayerNorm(8)))
    before = structure(model)
    with pytest.raises(StabNormError, match=r"layer '1\.0' \(LayerNorm\).*only LayerNorm here"):
        convert_norms(model, "repbn")
    assert structure(model) == before


def test_a_gain_of_another_size_than_the_channels_is_a_reason_to_leave_the_norm() -> None:
    register_norm(PerHead, "layer", bias=None)
    model = nn.Sequential(nn.LayerNorm(8), nn.Unflatten(-1, (2, 4)), PerHead())
    report = convert_norms(model)
    assert report.converted == ["0"]
    assert report.left == {"2": "its weight has 8 numbers, not one for each of its 4 channels"}
    assert model(torch.randn(3, 8)).shape == (3, 2, 4)


def test_a_manifest_that_does_not_fit_changes_nothing() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), RepBN(8), nn.Linear(8, 8), RepBN(8), nn.Linear(8, 2)).eval()

    manifest = fold_norms(build(), torch.randn(6, 4)).manifest
    manifest |= {"folded": ["1"], "affine": {"3": {}}}
    model = build()
    before = structure(model)
    with pytest.raises(KeyError):
        apply_manifest(model, manifest)
    assert structure(model) == before


class Tied(nn.Module):
    """Its fold changes a tied head, adds a bias, and switches its configuration's flag off."""

    def __init__(self, norm: type[nn.Module] = RepBN) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(9, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 9)
        self.inner, self.last = norm(8), norm(8)
        self.head.weight = self.embed.weight
        self.config = type("Config", (), {"tie_word_embeddings": True})()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.last(x + self.fc(self.inner(x))))  # type: ignore[no-any-return]


def drawn(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("step", "fold"), [("_edit", fold_norms), ("set_gain", fold_gains)])
def test_a_fold_in_place_that_is_interrupted_changes_nothing(
    step: str, fold: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = drawn(Tied(RepBN if fold is fold_norms else nn.LayerNorm))
    before, state = structure(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    own = getattr(_apply, step)

    def interrupted(changed: nn.Module, *rest: Any) -> None:
        own(changed, *rest)
        if changed is model:
            raise error("now")

    monkeypatch.setattr(_apply, step, interrupted)
    with pytest.raises(error, match="now"):
        fold(model, torch.arange(6).view(2, 3), inplace=True)
    assert structure(model) == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings


def test_a_manifest_that_does_not_fit_leaves_the_configuration() -> None:
    manifest = fold_norms(drawn(Tied()), torch.arange(6).view(2, 3)).manifest
    model: Any = Tied()
    with pytest.raises(KeyError):
        apply_manifest(model, {**manifest, "affine": {"last": {}}})
    assert model.config.tie_word_embeddings


def test_gains_that_are_folded_in_place_do_not_change_for_their_other_holders() -> None:
    model: Any = drawn(Tied(nn.LayerNorm))
    held = model.inner.weight
    numbers = held.clone()
    fold_gains(model, torch.arange(6).view(2, 3), inplace=True)
    assert torch.equal(held, numbers)
    assert model.inner.weight.unique().tolist() == [1.0]


def test_weights_that_are_folded_in_place_keep_their_marks() -> None:
    model: Any = drawn(nn.Sequential(RepBN(8), nn.Linear(8, 8)))
    model[1].weight.sequence_parallel, model[1].bias._no_weight_decay = True, True
    model[1].weight.requires_grad_(False)
    before = model[1].weight
    fold_norms(model, torch.randn(3, 8), inplace=True)
    assert model[1].weight is not before
    assert model[1].weight.sequence_parallel
    assert model[1].bias._no_weight_decay
    assert (model[1].weight.requires_grad, model[1].bias.requires_grad) == (False, True)


def test_a_fold_in_place_goes_past_a_layer_that_takes_no_new_attribute() -> None:
    class SealedLinear(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            if "weight" in vars(self).get("_parameters", {}) and name == "weight":
                raise AttributeError("sealed")
            super().__setattr__(name, value)

    model = drawn(nn.Sequential(RepBN(8), SealedLinear(8, 8)))
    assert [norm.status for norm in fold_norms(model, torch.randn(3, 8), inplace=True).norms] == ["forward"]


def test_an_input_that_the_norm_refuses_moves_no_statistics() -> None:
    norm = PRepBN(8)
    state = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    with pytest.raises(RuntimeError, match="dtype"):
        norm(torch.randn(6, 8).double())
    assert all(torch.equal(tensor, state[key]) for key, tensor in norm.state_dict().items())
    assert norm.double()(torch.randn(6, 8).double()).dtype == torch.float64


def test_a_recalibration_that_fails_changes_nothing() -> None:
    def batches() -> Any:
        yield torch.randn(6, 4)
        raise OSError("the disk is gone")

    model = nn.Sequential(nn.Linear(4, 8), RepBN(8), nn.Dropout())
    before, state = structure(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(OSError, match="the disk is gone"):
        recalibrate_norms(model, batches(), 2)
    assert structure(model) == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


# --- what the norm had ---


def successors(to: str, freeze: Callable[[Any], object]) -> dict[str, bool]:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    freeze(model)
    convert_norms(model, to)
    return {name: parameter.requires_grad for name, parameter in model[1].named_parameters()}


@every_target
def test_a_frozen_norm_has_a_frozen_successor(to: str) -> None:
    assert not any(successors(to, lambda model: model[1].requires_grad_(False)).values())
    assert all(successors(to, lambda model: model[0].requires_grad_(False)).values())


@every_target
def test_where_only_the_bias_is_trained_only_a_bias_is_trained_afterwards(to: str) -> None:
    trained = successors(to, lambda model: model[1].weight.requires_grad_(False))
    assert {name for name, is_trained in trained.items() if is_trained} <= {"bias", "rep.bias"}
    assert any(trained.values())


@every_target
def test_a_norm_without_weights_is_frozen_with_what_surrounds_it(to: str) -> None:
    for frozen in (True, False):
        model: Any = nn.Sequential(
            nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False)), nn.Linear(8, 2)
        )
        if frozen:
            model[0].requires_grad_(False)
        convert_norms(model, to)
        assert {parameter.requires_grad for parameter in model[0][1].parameters()} == {not frozen}


@every_target
def test_marks_on_module_and_parameters_stay(to: str) -> None:
    model: Any = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    model[0]._is_hf_initialized = True
    model[0].weight.sequence_parallel = True
    model[0].bias._no_weight_decay = True
    convert_norms(model, to)
    norm = model[0]
    rep: Any = norm.rep if to == "prepbn" else norm
    assert norm._is_hf_initialized
    assert rep._is_hf_initialized
    assert norm.weight.sequence_parallel
    assert rep.weight.sequence_parallel
    assert norm.bias._no_weight_decay
    assert rep.bias._no_weight_decay


@every_target
def test_mode_hooks_and_attributes_stay(to: str) -> None:
    class Watched(nn.LayerNorm):
        def __init__(self, width: int) -> None:
            super().__init__(width, eps=1e-3)
            self.variance_epsilon, self.role = 1e-3, "query"

    calls: list[str] = []
    model: Any = nn.Sequential(Watched(8), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8, requires_grad=True)
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    handle = model[0].register_forward_hook(lambda *_: calls.append("forward"), always_call=True)
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    convert_norms(model, to)
    norm = model[0]
    assert (norm.training, norm.role, norm.variance_epsilon, norm.normalized_shape) == (False, "query", 1e-3, (8,))
    model(x).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    handle.remove()
    model(x)
    assert calls[3:] == ["pre"]


def test_buffers_that_are_not_saved_are_not_saved_afterwards() -> None:
    class Counting(nn.LayerNorm):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

    model = nn.Sequential(Counting(8))
    convert_norms(model)
    assert "0.calls" not in model.state_dict()
    assert "calls" in dict(model[0].named_buffers())


# --- exports of a model that is not folded ---


class LayerNorm2d(nn.LayerNorm):
    """timm's."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("to", ["prepbn", "repbn"])
@pytest.mark.parametrize("then_fold", [False, True], ids=["converted", "an affine left"])
def test_the_older_onnx_exporter_writes_a_valid_file(to: str, then_fold: bool) -> None:
    onnx = pytest.importorskip("onnx")
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), LayerNorm2d(4), nn.ReLU()).eval()
    convert_norms(model, to)
    x = torch.randn(1, 3, 4, 4)
    if then_fold:
        for module in model.modules():
            if isinstance(module, PRepBN):
                module.lam.zero_()
        result = fold_norms(model, x)
        assert [norm.status for norm in result.norms] == ["affine"]
        model = result.model
    exported: Any = io.BytesIO()
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(model, (x,), exported, opset_version=17, dynamo=False)
    finally:
        logging.disable(logging.NOTSET)
    onnx.checker.check_model(onnx.load_from_string(exported.getvalue()), full_check=True)
