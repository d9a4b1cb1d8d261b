"""What the user has stays as it was: random state, gradients, and whatever shares memory with a folded weight."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import fold_norms
from stabnorm.fold import to_pre_rms
from stabnorm.nn import RepBN
from tests.families import FAMILIES
from tests.fold.nets import Net, draw, ready

C, D = 6, 5


def beside() -> Any:
    """A norm and its reader, and another reader of the raw input."""
    model = Net(lambda m, x: m.fc(m.norm(x)) + m.raw(x), norm=RepBN(C), fc=nn.Linear(C, D), raw=nn.Linear(C, D))
    return ready(model)


def alone() -> Any:
    """A norm and its reader."""
    model = beside()
    del model.raw
    model.function = lambda m, x: m.fc(m.norm(x))
    return model


def same_memory(m: Any) -> None:
    m.raw.weight = nn.Parameter(m.fc.weight.data)


def same_parameter(m: Any) -> None:
    m.raw.weight = m.fc.weight


def buffer_in_a_parameter_s_memory(m: Any) -> None:
    del m.raw
    m.register_buffer("w", m.fc.weight.data)
    m.function = lambda m, x: m.fc(m.norm(x)) + F.linear(x, m.w)


def parameter_in_a_closure(m: Any) -> None:
    del m.raw
    w = m.fc.weight
    m.function = lambda m, x: m.fc(m.norm(x)) + F.linear(x, w)


def every_other_column(m: Any) -> None:
    m.fc.weight = nn.Parameter(draw(D, 2 * C, seed=3)[:, ::2])


@pytest.mark.parametrize(
    "change",
    [same_memory, same_parameter, buffer_in_a_parameter_s_memory, parameter_in_a_closure, every_other_column],
)
@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_what_shares_memory_with_a_weight_does_not_change_with_it(change: Any, inplace: bool) -> None:
    model = beside()
    change(model)
    inputs = [draw(3, C), draw(2, C, seed=4)]
    expected = [model(x).clone() for x in inputs]
    result = fold_norms(model, inputs[0], inplace=inplace)
    assert [n.status for n in result.norms] == ["forward"]
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(result.model(x), y, rtol=1e-12, atol=1e-12)
        if not inplace:
            assert torch.equal(model(x), y)


def test_the_random_state_stays_though_the_model_draws() -> None:
    model = beside()
    model.function = lambda m, x: (torch.rand(3), m.fc(m.norm(x)))[1]
    family = FAMILIES["vit, class token"]
    vit: Any = family.build().eval()
    forward = vit.forward
    vit.forward = lambda x: (torch.rand(3), forward(x))[1]
    before = torch.get_rng_state()
    fold_norms(model, draw(3, C))
    assert torch.equal(torch.get_rng_state(), before)
    to_pre_rms(vit, tuple(family.example()))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_stay_and_the_folded_copy_has_none_where_it_changed() -> None:
    model = beside()
    y = model(draw(3, C))
    y.backward(torch.randn_like(y))
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    folded = fold_norms(model, draw(3, C)).model
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    assert folded.get_parameter("fc.weight").requires_grad
    assert folded.get_parameter("fc.weight").grad is None


def test_a_norm_under_inference_mode_folds_into_weights_that_train_on() -> None:
    model = beside()
    with torch.inference_mode():
        folded = fold_norms(model, draw(3, C)).model
    y = folded(draw(3, C))
    y.backward(torch.randn_like(y))
    gradient = folded.get_parameter("fc.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_what_a_forward_with_gradients_left_on_a_module_does_not_hinder_the_copy() -> None:
    def stashes(m: Any, x: Tensor) -> Any:
        m.feature = m.norm(x)
        return m.fc(m.feature)

    model = alone()
    model.function = stashes
    y = model(draw(3, C))
    result = fold_norms(model, draw(3, C))
    assert [n.status for n in result.norms] == ["forward"]
    torch.testing.assert_close(result.model(draw(3, C)), y, rtol=1e-12, atol=1e-12)
