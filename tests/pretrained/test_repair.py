"""The repair: what it minimises, that it helps on data it did not see, and that it resumes to the same bits."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabNormError, convert_norms
from stabnorm.pretrained import Recipe, Repair, Runner, fit_norms, relative_error, repair_norms
from stabnorm.switch.lam import progressive_norms
from tests.pretrained.nets import Batch, batches, converted_pair, post_norm


def fitted() -> tuple[nn.Module, nn.Module]:
    original, model, levels = converted_pair(post_norm(), batches())
    fit_norms(model, original, batches(), levels, Runner())
    return original.requires_grad_(False), model


def test_the_loss_is_the_formula() -> None:
    original, model = fitted()
    batch = batches()[1]
    keep = batch["attention_mask"].bool()
    states: list[list[Tensor]] = []
    for part in (model, original):
        written: list[Tensor] = []
        norms = [part.get_submodule(name) for name in ("norm", "norms.0", "norms.1")]
        hooks = [norm.register_forward_hook(lambda m, a, y, w=written: w.append(y[keep].double())) for norm in norms]
        written.append(part(**batch).double())
        states.append([*written[:-1], written[-1]])
        for hook in hooks:
            hook.remove()
    parts = [(h - target).square().sum() / target.square().sum() for h, target in zip(*states, strict=True)]
    expected = torch.stack(parts).mean()
    computed = Repair(model, original, 5).loss(batch)
    assert computed.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("weights", ["all", "affine"])
def test_it_brings_the_output_closer_on_data_it_did_not_see(weights: Any) -> None:
    original, model = fitted()
    unseen = batches(3, seed=11)

    def error(part: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(relative_error(part(**batch), original(**batch))) for batch in unseen)

    before, state = error(model), copy.deepcopy(model.state_dict())
    repair = Repair(model, original, 60, Recipe(weights=weights, lr=3e-3, affine_lr=1e-2))
    losses = repair_norms(repair, batches(12))
    assert len(losses) == 60
    assert error(model) < (0.7 if weights == "all" else 0.95) * before
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    affine = {f"{name}.rep.{part}" for name in ("norm", "norms.0", "norms.1") for part in ("weight", "bias")}
    assert affine <= changed
    assert (changed == affine) == (weights == "affine")
    assert not {"words.weight", "positions.weight"} & changed
    assert not any(name.endswith((".running_mean", ".running_var", ".eta")) for name in changed)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_original_and_dropout_have_no_part_in_it() -> None:
    original, model = fitted()
    before = copy.deepcopy(original.state_dict())
    repair_norms(Repair(model, original, 3), batches())
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert all(parameter.grad is None for parameter in original.parameters())


RECIPES = [
    Recipe(),
    Recipe(homotopy=0.6, order="shallow_first", lr=1e-3),
    Recipe(accumulate=2, precision=torch.bfloat16, forcing=0.8),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["plain", "homotopy", "accumulated, bfloat16, forced"])
def test_resumed_it_ends_at_the_same_bits(recipe: Recipe) -> None:
    class Shuffled(list[Batch]):
        def __iter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
            return iter([self[int(i)] for i in torch.randperm(len(self))])

    original, model = fitted()
    whole, broken, resumed = (copy.deepcopy(model) for _ in range(3))
    losses = repair_norms(Repair(whole, original, 10, recipe), Shuffled(batches()))
    first = Repair(broken, original, 10, recipe)
    begun = repair_norms(first, Shuffled(batches()), until=7)
    second = Repair(resumed, original, 10, recipe)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    ended = repair_norms(second, Shuffled(batches()))
    assert begun + ended == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_accumulated_batches_are_one_larger_batch() -> None:
    original, model = fitted()
    other = copy.deepcopy(model)
    half = batches(2)
    half = [half[0], {name: value.clone() for name, value in half[0].items()}]
    one = repair_norms(Repair(model, original, 1, Recipe(accumulate=2)), half)
    two = repair_norms(Repair(other, original, 1), half[:1])
    assert one == pytest.approx(two)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_step_takes_no_gradient_larger_than_the_recipe_allows() -> None:
    original, model = fitted()
    repair = Repair(model, original, 4, Recipe(clip=1e-3))
    sizes: list[float] = []

    def note(*_: Any) -> None:
        gradients = [p.grad.flatten() for p in repair.parameters if p.grad is not None]
        sizes.append(float(torch.cat(gradients).norm()))

    repair.optimizer.register_step_pre_hook(note)
    repair_norms(repair, batches())
    assert sizes == pytest.approx([1e-3] * 4, rel=1e-2)


def test_with_several_processes_the_step_takes_the_mean_of_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model = fitted()
    repair = Repair(model, original, 4, Recipe(clip=1e9))
    repair.begin()
    repair.loss(batches()[0]).backward()
    own = [parameter.grad.clone() for parameter in repair.parameters if parameter.grad is not None]
    taken: list[Tensor] = []
    repair.optimizer.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.clone() for p in repair.parameters if p.grad is not None)
    )
    module = sys.modules[Repair.__module__]
    monkeypatch.setattr(module, "ranks", lambda: 2)
    monkeypatch.setattr(module, "gather_over_ranks", lambda gradient: torch.stack([gradient, 5 * gradient]))
    repair.step()
    assert len(taken) == len(own) > 0
    for mean, gradient in zip(taken, own, strict=True):
        torch.testing.assert_close(mean, 3 * gradient)


def test_lam_goes_from_one_to_zero_with_a_homotopy_and_is_zero_without() -> None:
    original, model = fitted()
    repair = Repair(model, original, 10, Recipe(homotopy=0.5))
    lams = []
    for step in range(10):
        repair.begin(step)
        lams.append([round(float(norm.lam), 6) for norm in progressive_norms(model).values()])
    assert [lam[0] for lam in lams] == [1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0]
    repair = Repair(model, original, 10)
    repair.begin(0)
    assert all(norm.lam == 0 for norm in progressive_norms(model).values())


def test_what_norms_hand_on_is_the_originals_at_first_and_their_own_at_the_end() -> None:
    original, model = fitted()
    batch = batches()[0]
    read: dict[nn.Module, Tensor] = {}
    for part in (original, model):
        layer = part.get_submodule("up.1")
        layer.register_forward_pre_hook(lambda m, args: read.__setitem__(m, args[0].detach()))
    repair = Repair(model, original, 10, Recipe(forcing=0.5))
    shares, apart = [], []
    for step in range(7):
        repair.begin(step)
        shares.append(round(repair.share, 6))
        assert float(repair.loss(batch).detach()) > 0
        apart.append(float((read[model.get_submodule("up.1")] - read[original.get_submodule("up.1")]).norm()))
    assert shares == [1, 0.8, 0.6, 0.4, 0.2, 0, 0]
    assert apart[0] < 1e-5 * apart[-1]
    assert apart == sorted(apart)
    assert apart[5] == apart[6]
    assert model.get_submodule("norms.0")._forward_hooks == {}


def test_an_activation_in_place_behind_a_norm_changes_no_loss() -> None:
    losses = []
    inputs = [torch.randn(30, 6) * torch.rand(30, 1) for _ in range(2)]
    for inplace in (False, True):
        torch.manual_seed(2)
        layers = [(nn.LayerNorm(6), nn.ReLU(inplace), nn.Linear(6, 6)) for _ in range(2)]
        original = nn.Sequential(*[part for three in layers for part in three]).eval()
        model = copy.deepcopy(original)
        convert_norms(model)
        fit_norms(model, original, inputs, [["0"], ["3"]], Runner())
        repair = Repair(model, original.requires_grad_(False), 10, Recipe(forcing=1.0))
        for step in (0, 10):
            repair.begin(step)
            losses.append(float(repair.loss(inputs[0]).detach()))
        repair.begin(0)
        repair.finish()
        assert repair.share == 0
    assert losses[2:] == pytest.approx(losses[:2])


def test_where_the_original_stands_in_each_part_learns_by_itself() -> None:
    original, model = fitted()
    repair = Repair(model, original, 10, Recipe(forcing=1.0), loss=lambda output, wanted: output.sum() * 0)
    repair.begin(0)
    repair.loss(batches()[0]).backward()
    early = {name: parameter.grad for name, parameter in model.named_parameters() if name.startswith("up.0")}
    alone = {name: gradient.clone() for name, gradient in early.items() if gradient is not None}
    repair.optimizer.zero_grad()
    with torch.no_grad():  # what comes later is no part of it
        model.get_submodule("up.1").weight.normal_()  # type: ignore[operator]
    repair.loss(batches()[0]).backward()
    assert len(alone) == 2
    for name, gradient in alone.items():
        now = model.get_parameter(name).grad
        assert now is not None
        assert gradient.abs().amax() > 0
        torch.testing.assert_close(now, gradient)


def test_a_kept_norm_stays_at_one_and_is_trained() -> None:
    original, model = fitted()
    kept = progressive_norms(model)["norms.0"]
    kept.lam.fill_(1)
    kept.leave_out_norm = False
    before = kept.weight.detach().clone()  # type: ignore[operator]
    repair_norms(Repair(model, original, 3), batches())
    assert kept.lam == 1
    assert not torch.equal(kept.weight, before)  # type: ignore[arg-type]
    assert all(norm.lam == 0 for name, norm in progressive_norms(model).items() if name != "norms.0")


def test_an_output_distance_of_ones_own_is_added() -> None:
    original, model = fitted()
    batch = batches()[0]
    plain = Repair(model, original, 1, loss=lambda output, wanted: output.sum() * 0).loss(batch)
    more = Repair(model, original, 1, loss=lambda output, wanted: output.sum() * 0 + 8).loss(batch)
    assert (more - plain).item() == pytest.approx(8 / 4)  # three norms and the output


def test_what_it_refuses() -> None:
    original, model = fitted()
    with pytest.raises(ValueError, match="steps=0"):
        Repair(model, original, 0)
    with pytest.raises(StabNormError, match="no norm that was fitted"):
        Repair(original, original, 3)
    with pytest.raises(ValueError, match="accumulate=0"):
        Recipe(accumulate=0)
    with pytest.raises(ValueError, match="lr=0"):
        Recipe(lr=0)
    with pytest.raises(ValueError, match="forcing=-1"):
        Recipe(forcing=-1)
    with pytest.raises(ValueError, match="homotopy=2"):
        Recipe(homotopy=2)
    with pytest.raises(ValueError, match="float16"):
        Recipe(precision=torch.float16)
    with pytest.raises(ValueError, match="weights='some'"):
        Recipe(weights="some")  # type: ignore[arg-type]
    state = Repair(model, original, 4).state_dict()
    with pytest.raises(StabNormError, match="in 4 steps"):
        Repair(model, original, 5).load_state_dict(state)
    with pytest.raises(StabNormError, match="empty"):
        repair_norms(Repair(model, original, 2), [])
    with pytest.raises(StabNormError, match="is nan"):
        repair_norms(Repair(model, original, 2, loss=lambda *_: torch.tensor(torch.nan)), batches())


def test_the_relative_error_leaves_padding_out_and_wants_something_to_compare() -> None:
    from stabnorm import valid_tokens

    wanted, output = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    output[1, 2] = torch.nan
    with valid_tokens(torch.tensor([[True] * 3, [True, True, False]])):
        assert relative_error({"logits": output}, {"logits": wanted}) == 0
    with pytest.raises(StabNormError, match="without a floating tensor"):
        relative_error(torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.long))
