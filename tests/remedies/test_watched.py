"""A monitor and remedies do not disturb each other, whichever comes first."""

import copy
import pickle
from typing import Any

import torch
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.companions import AttentionCompanion, EmbeddingCompanion
from stabnorm.remedies import (
    peri_norm,
    qk_norm,
    scale_by_depth,
    scale_residuals,
    sigma_reparametrize,
    stable_embedding,
    undo,
)
from tests.remedies.family import net, tokens


def all_of_them(model: Any) -> list[Any]:
    return [
        scale_residuals(model, tokens(1), scale="1/n"),
        peri_norm(model, tokens(1)),
        scale_by_depth(model),
        stable_embedding(model),
        qk_norm(model),
        sigma_reparametrize(model),
    ]


def watched(model: Any) -> StabilityMonitor:
    return StabilityMonitor(model, companions=[AttentionCompanion(), EmbeddingCompanion()])


def test_a_monitor_that_is_attached_goes_on_watching_and_all_is_undone() -> None:
    model = net()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with watched(model) as monitor:
        model(tokens()).sum().backward()
        monitor.step()
        reports = all_of_them(model)
        model(tokens()).sum().backward()
        monitor.step()
        assert len(monitor.history()["token_std_mean"]) == 2
        assert bool(monitor.history()["token_std_mean"][-1].isfinite().all())
        for report in reversed(reports):
            undo(report)
        model(tokens()).sum().backward()
        monitor.step()
        assert bool(monitor.history()["token_std_mean"][-1].isfinite().all())
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_remedied_model_is_watched_copied_and_pickled_and_undone_after_it() -> None:
    model = net()
    reports = all_of_them(model)
    classes = [type(module) for module in model.modules()]
    with watched(model) as monitor:
        model(tokens()).sum().backward()
        monitor.step()
        expected = model.eval()(tokens())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(tokens()), expected)
        assert any(name.endswith("output_norm") for name in monitor.layers)
        assert any("head_norms" in name for name in monitor.layers)
    assert [type(module) for module in model.modules()] == classes
    for report in reversed(reports):
        undo(report)
    assert {type(module) for module in model.modules()} == {type(module) for module in net().modules()}


def test_the_monitor_changes_no_bit_of_a_remedied_model() -> None:
    outputs = []
    for watch in (False, True):
        model = net()
        sigma_reparametrize(model)
        peri_norm(model, tokens(1))
        monitor = watched(model) if watch else None
        if monitor is not None:
            monitor.attach()
        y = model(tokens())
        y.square().sum().backward()
        if monitor is not None:
            monitor.step()
            monitor.detach()
        outputs.append((y.detach(), model.head._parameters["weight"].grad))
    assert torch.equal(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-6, atol=1e-7)


def test_a_stack_of_modules_without_norms_can_be_remedied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    undo(sigma_reparametrize(model))
    assert type(model[0]) is nn.Linear
