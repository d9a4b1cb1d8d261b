"""What all remedies share: all steps or none, a report in words, and `undo`, which brings the very bits back."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import StabNormError
from stabnorm.remedies import RemedyReport, freeze_embedding, train_only_norms, undo
from stabnorm.remedies.report import Step, carried_out


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7))


class Halved(nn.Linear):
    pass


def halving(module: Any) -> Step:
    """A step that changes everything a step may change: class, numbers, an attribute, a parameter and a buffer."""

    def carry_out() -> None:
        module.__class__ = Halved
        module.weight.mul_(0.5)
        module.halved = True
        module.register_parameter("gain", nn.Parameter(torch.ones(1)))
        module.register_buffer("seen", torch.zeros(1))
        module.bias = None  # type: ignore[assignment]

    return Step("1", "halved", carry_out, (module,), (module.weight,))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_as_before(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


def test_undo_brings_back_class_numbers_parameters_and_attributes() -> None:
    model = net()
    before, weight = state_of(model), model[1].weight
    report = carried_out("halve", model, [halving(model[1])], {}, "no")
    assert type(model[1]) is Halved
    undo(report)
    assert type(model[1]) is nn.Linear
    assert is_as_before(model, before)
    assert model[1].weight is weight
    assert not hasattr(model[1], "halved")


def test_a_step_that_fails_leaves_the_model_as_it_was() -> None:
    model = net()
    before = state_of(model)

    def fails() -> None:
        raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        carried_out("halve", model, [halving(model[1]), Step("2", "fails", fails)], {}, "no")
    assert type(model[1]) is nn.Linear
    assert is_as_before(model, before)


@pytest.mark.parametrize("fused", [False, True])
def test_undo_is_refused_after_a_step_of_an_optimizer_and_changes_nothing(fused: bool) -> None:
    model = net()
    report = carried_out("halve", model, [halving(model[1])], {}, "no")
    model(torch.arange(7)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1e-6, fused=fused).step()
    trained = state_of(model)
    with pytest.raises(StabNormError, match="has changed since halve"):
        undo(report)
    assert is_as_before(model, trained)


def test_undo_is_refused_after_a_checkpoint_was_loaded() -> None:
    model = net()
    report = freeze_embedding(model)
    other = net()
    nn.init.normal_(other[3].bias)
    model.load_state_dict(other.state_dict())
    with pytest.raises(StabNormError, match="trained or loaded"):
        undo(report)


def test_two_remedies_are_undone_in_reverse_order_only() -> None:
    model = net()
    before = state_of(model)
    first = carried_out("halve", model, [halving(model[1])], {}, "no")

    def swap() -> None:
        model[1].__class__ = nn.Linear

    second = carried_out("swap", model, [Step("1", "swapped", swap, (model[1],))], {}, "no")
    with pytest.raises(StabNormError, match="Undo the later remedies first"):
        undo(first)
    undo(second)
    undo(first)
    assert is_as_before(model, before)


def test_a_hook_that_was_put_on_since_stays_on() -> None:
    model = net()
    report = carried_out("halve", model, [halving(model[1])], {}, "no")
    seen = []
    model[1].register_forward_hook(lambda *call: seen.append(1))
    undo(report)
    model(torch.arange(7))
    assert seen == [1]


def test_a_report_is_undone_once_and_its_copy_never() -> None:
    report = freeze_embedding(net())
    same: Callable[[RemedyReport], RemedyReport] = copy.deepcopy
    for other in (same(report), pickle.loads(pickle.dumps(report))):
        assert str(other) == str(report)
        with pytest.raises(StabNormError, match="it is a copy"):
            undo(other)
    undo(report)
    with pytest.raises(StabNormError, match="undone already"):
        undo(report)


def test_a_report_says_what_was_changed_left_and_kept() -> None:
    report = carried_out("halve", net(), [Step("1", "halved", lambda: None)], {"3": "it is the head"}, "no")
    assert str(report).splitlines() == [
        "halve: 1 changed; outputs are changed", "  1  halved", "  3  left: it is the head",
    ]  # fmt: skip
    assert report.changed == ["1"]


def test_nothing_to_change_is_an_error_with_the_reasons() -> None:
    with pytest.raises(StabNormError, match="nothing to change in Sequential:\n  3  it is the head"):
        carried_out("halve", net(), [], {"3": "it is the head"}, "no")


def test_train_only_norms_trains_gains_and_biases_only() -> None:
    """methods.md section 4, train-only-norm: the set of parameters."""
    model = net()
    model[2].weight.requires_grad_(False)
    report = train_only_norms(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.weight", "2.bias"]
    assert dict((c.name, c.action) for c in report.changes)["2.weight"] == "trained"
    undo(report)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["2.weight"]


def test_only_what_a_remedy_froze_is_thawed_again() -> None:
    model = net()
    report = freeze_embedding(model)
    model[3].requires_grad_(False)
    undo(report)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["3.weight", "3.bias"]


@pytest.mark.parametrize("apply", [train_only_norms, freeze_embedding])
def test_names_that_match_nothing_are_refused(apply: Callable[..., RemedyReport]) -> None:
    with pytest.raises(ValueError, match=r"include='nothing' matches none of the 1"):
        apply(net(), include="nothing")
    with pytest.raises(StabNormError, match="leave none of the 1"):
        apply(net(), exclude=".")
    with pytest.raises(StabNormError, match="the model has no"):
        apply(nn.Linear(2, 2))


def test_a_compiled_or_wrapped_model_is_refused() -> None:
    with pytest.raises(StabNormError, match="compiled already"):
        freeze_embedding(torch.compile(net(), backend="eager"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model"):
        freeze_embedding("net")  # type: ignore[arg-type]
