"""A plan says what fold_norms will say after the switch, what a norm's own input says, and leaves the model alone."""

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import StabNormError, convert_norms, fold_norms, plan_fold
from stabnorm.fold import FoldPlan
from stabnorm.nn import PRepBN, RepBN
from tests.families import EVERY_FAMILY, FAMILIES, Family, randomize_
from tests.fold.nets import Net, draw
from tests.fold.test_families import FOLDED, TABLE

pytestmark = pytest.mark.filterwarnings("ignore:a bias was added to .* LoRA adapters")


def counts(plan: FoldPlan) -> tuple[int, ...]:
    return tuple(sum(norm.status == status for norm in plan.norms) for status in (*FOLDED, "affine"))


def planned(plan: FoldPlan) -> list[tuple[Any, ...]]:
    return [(norm.name, norm.status, norm.into, norm.reason) for norm in plan.norms]


# --- it says what will be ---


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_fresh_model_is_planned_as_it_will_fold_once_it_is_trained(family: Family) -> None:
    model = family.build()  # with its zeros and ones: what is planned must not rest on them
    plan = plan_fold(model, tuple(family.example()), center=True)
    assert counts(plan) == TABLE[family.name][0]
    convert_norms(model, center=True)
    randomize_(model, seed=1).eval()
    for norm in model.modules():
        if isinstance(norm, PRepBN):
            norm.rep.eta.data.mul_(0.2)  # so that nothing saturates
            norm.lam.zero_()
    result = fold_norms(model, tuple(family.example()))
    assert planned(plan) == [(norm.name, norm.status, norm.into, norm.reason) for norm in result.norms]


@pytest.mark.parametrize("name", ["swin, padded windows", "mixture of experts"])
def test_what_folds_without_a_shift_is_planned_so(name: str) -> None:
    family = FAMILIES[name]
    assert counts(plan_fold(family.build(), tuple(family.example()), center=False)) == TABLE[name][1]


def test_a_bias_that_training_will_move_counts_as_one() -> None:
    family = FAMILIES["swin, padded windows"]
    plan = plan_fold(family.build(), tuple(family.example()), to="unified")
    assert counts(plan)[3] == 4
    plan = plan_fold(family.build(), tuple(family.example()), init="language")
    assert counts(plan) == TABLE[family.name][0]  # and gains of zero do not vanish


def test_a_running_mean_that_training_will_move_counts_as_a_shift() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 2, 3, padding=1))
    x = torch.randn(4, 3, 6, 6)
    assert fold_norms(model.eval(), x).norms[0].status == "forward"  # its running mean is 0 now
    plan = plan_fold(model, x)
    assert plan.norms[0].status == "affine"
    model.train()(x)
    result = fold_norms(model.eval(), x)
    assert planned(plan) == [(norm.name, norm.status, norm.into, norm.reason) for norm in result.norms]


@pytest.mark.slow
def test_the_plan_is_the_same_before_a_switch_in_the_middle_of_one_and_after_it_in_both_modes() -> None:
    family = FAMILIES["bert"]
    model = randomize_(family.build()).eval()
    first = plan_fold(model, tuple(family.example()))
    assert [norm.kind for norm in first.norms] == ["layer"] * 5
    assert planned(plan_fold(model.train(), tuple(family.example()))) == planned(first)
    convert_norms(model)
    for lam in (1.0, 0.4, 0.0):
        for norm in model.modules():
            if isinstance(norm, PRepBN):
                norm.lam.fill_(lam)
        assert planned(plan_fold(model, tuple(family.example()))) == planned(first)


def test_batch_norms_are_planned_along() -> None:
    norm = nn.BatchNorm2d(6)
    nn.init.zeros_(norm.weight)  # as residual networks start
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Flatten(2), nn.LayerNorm(36))
    plan = plan_fold(model, torch.randn(2, 3, 8, 8))
    assert [(norm.kind, norm.status) for norm in plan.norms] == [("batch", "backward"), ("layer", "affine")]
    assert plan.norms[0].affine_residual != plan.norms[0].affine_residual
    assert plan.norms[0].share > 0


def test_what_cannot_be_switched_is_kept_for_the_conversions_reason() -> None:
    shared = nn.Parameter(torch.ones(8))
    parts = [nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.LayerNorm(8)]
    parts[0].weight = parts[2].weight = shared
    model = Net(lambda m, x: nn.Sequential(*list(m.parts)[:-1])(x), parts=nn.Sequential(*parts))
    plan = plan_fold(model, torch.randn(50, 8))
    assert [norm.status for norm in plan.norms] == ["kept"] * 4
    reasons = [norm.reason for norm in plan.norms]
    assert "its weight is also parts.2.weight" in reasons[0]
    assert "normalises every sample" in reasons[2]
    assert "no example reaches it" in reasons[3]
    assert plan.norms[0].affine_residual > 0
    assert np.isnan([plan.norms[3].affine_residual, plan.norms[3].share]).all()
    assert plan.norms[3].tokens == 0
    assert plan.share == 0


# --- what it loses and gains ---


def affine_residual(x: Tensor) -> float:
    """Of x [N, C], in float64: from the correlation coefficients that NumPy computes."""
    rows = x.double().numpy()
    normed = torch.nn.functional.layer_norm(x.double(), x.shape[-1:]).numpy()
    return float(1 - np.mean([np.corrcoef(rows[:, c], normed[:, c])[0, 1] ** 2 for c in range(rows.shape[1])]))


def test_the_loss_is_the_affine_residual_over_all_batches_at_once() -> None:
    first = nn.Linear(5, 9)
    model = nn.Sequential(first, nn.LayerNorm(9), nn.Dropout(0.5), nn.Linear(9, 2))
    scales = [draw(7, 3, 1, seed=seed).exp() for seed in range(3)]
    batches = [(scale * draw(7, 3, 5, seed=seed)).float() for seed, scale in enumerate(scales)]
    with torch.no_grad():
        x = first(torch.cat(batches)).flatten(0, 1)
    plan = plan_fold(model, batches)
    assert plan.norms[0].affine_residual == pytest.approx(affine_residual(x), abs=1e-6)
    assert plan.norms[0].tokens == 63
    alone = plan_fold(model, batches[0]).norms[0]
    assert abs(alone.affine_residual - plan.norms[0].affine_residual) > 1e-3


def test_a_layer_whose_tokens_differ_in_scale_loses_more_than_one_whose_tokens_do_not() -> None:
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3))
    x = draw(400, 32).float()
    even = plan_fold(net, x).norms[0]
    heavy = plan_fold(net, x * (2 * draw(400, 1, seed=1)).exp().float())
    assert even.affine_residual < 0.05 < 0.3 < heavy.norms[0].affine_residual
    assert "1 norms have an affine residual above 0.30" in str(heavy)


def test_the_gain_is_the_time_inside_a_norm_over_that_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class SlowNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            clock[0] += 1.0
            return super().forward(x)

    class SlowLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            clock[0] += 3.0
            return super().forward(x)

    monkeypatch.setattr("stabnorm.fold.planned.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    model = Net(
        lambda m, x: m.head(m.twice(m.twice(m.once(x)))), once=SlowNorm(8), twice=SlowNorm(8), head=SlowLinear(8, 2)
    )
    plan = plan_fold(model, [torch.randn(30, 8), torch.randn(4, 8)])
    assert plan.seconds == 12
    assert {norm.name: norm.share for norm in plan.norms} == {
        "once": pytest.approx(1 / 6),
        "twice": pytest.approx(1 / 3),
    }
    assert plan.share == pytest.approx(sum(norm.share for norm in plan.norms if norm.status in FOLDED))


def test_shares_never_add_up_to_more_than_a_forward_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, forwards = [0.0], [0]

    class SlowNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            clock[0] += 1.0 if forwards[0] % 2 else 5.0
            return super().forward(x)

    def counted(m: Any, x: Tensor) -> Any:
        forwards[0] += 1
        clock[0] += 0.5
        return m.head(m.after(m.norm(x)))

    monkeypatch.setattr("stabnorm.fold.planned.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    plan = plan_fold(Net(counted, norm=SlowNorm(8), after=SlowNorm(8), head=nn.Linear(8, 2)), torch.randn(30, 8))
    assert 0.5 < sum(norm.share for norm in plan.norms) < 1


def test_a_function_that_normalises_is_in_the_plan_and_is_not_timed() -> None:
    model = Net(lambda m, x: m.fc(F.group_norm(m.norm(x), 2)), norm=nn.LayerNorm(8), fc=nn.Linear(8, 2))
    plan = plan_fold(nn.Sequential(nn.Linear(8, 8), model), torch.randn(30, 8))
    function, norm = plan.norms
    assert (function.name, function.kind, function.status, norm.kind) == ("1", "unknown", "kept", "layer")
    assert np.isnan(function.share)
    assert 0 < norm.share < 1


# --- it changes nothing ---


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    modules = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [[t.detach().clone() for t in tensors], [id(t) for t in tensors], flags, modules]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_its_gradients_and_the_random_state_are_left_alone(training: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        y: Tensor = m.head(m.norm(m.batch(x)))
        return y

    model = Net(forward, batch=nn.BatchNorm1d(6), norm=nn.LayerNorm(6), head=nn.Linear(6, 2)).train(training)
    x = draw(20, 6).float()
    model(x).backward(torch.randn(20, 2))
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = copy.copy(state(model))
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    given = x.clone()
    plan_fold(model, x)
    after = state(model)
    assert all(map(torch.equal, before[0], after[0]))
    assert before[1:] == after[1:]
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters() if p.grad is not None]))
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(x, given)


# --- what it prints, and what it refuses ---


def test_the_table_has_a_line_for_each_norm_and_warns_of_few_tokens() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Tanh())
    lines = str(plan_fold(model, torch.randn(11, 4))).splitlines()
    assert lines[0].startswith("2 norms, if switched to prepbn: 1 forward, 1 backward; norms take ")
    assert lines[1].split() == ["name", "kind", "status", "affine", "residual", "share", "into,", "or", "why", "not"]
    assert lines[2].split()[:3] == ["1", "layer", "forward"]
    assert lines[2].endswith("%   2") or lines[2].endswith("%  2")
    assert lines[3].split()[:3] == ["3", "rms", "backward"]
    assert "measured on as few as 11 tokens, and read up to about 0.10 too low" in lines[-1]
    assert "tokens" not in str(plan_fold(model, torch.randn(200, 4)))


def test_a_layer_that_is_not_understood_is_warned_of_once() -> None:
    class OddNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    with pytest.warns(UserWarning, match="OddNorm") as warned:
        plan_fold(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), OddNorm()), torch.randn(9, 4))
    assert len(warned) == 1


class OptimizedModule(nn.Sequential):
    """By its name, as the fold knows torch.compile's."""


def test_what_is_wrong_is_said() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"example=.* is of type str"):
        plan_fold(model, "x")
    with pytest.raises(ValueError, match="does not run on the example"):
        plan_fold(model, torch.randn(3, 5))
    with pytest.raises(ValueError, match="to='batch' is unknown"):
        plan_fold(model, torch.randn(3, 4), to="batch")
    with pytest.raises(TypeError, match="no option 'centre'"):
        plan_fold(model, torch.randn(3, 4), centre=False)
    with pytest.raises(ValueError, match="Linear has no norm, so there is nothing to plan"):
        plan_fold(nn.Linear(4, 2), torch.randn(3, 4))
    with pytest.raises(StabNormError, match="itself a norm"):
        plan_fold(nn.LayerNorm(4), torch.randn(3, 4))
    with pytest.raises(StabNormError, match="compiled"):
        plan_fold(nn.Sequential(OptimizedModule(RepBN(4)), nn.Linear(4, 2)), torch.randn(3, 4))
