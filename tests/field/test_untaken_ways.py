"""Ways through a forward's code without weights of their own that no example takes: the norms that they meet stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import fold_norms
from stabnorm.nn import RepBN
from tests.fold.nets import Net, draw, error_of, ready

C, D = 6, 5
Forward = Callable[..., Any]


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(C, C), RepBN(C)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.fc(x))
        return y


class Bypass(nn.Module):
    """A norm that an argument leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RepBN(C)

    def forward(self, x: Tensor, off: int = 0) -> Tensor:
        if off:
            return x
        y: Tensor = self.norm(x)
        return y


def exits_early(m: Any, x: Tensor, k: int = 0) -> Any:
    h = m.norm(x)
    if k:
        return m.fc(h)
    return m.fc(m.body(h).tanh())


def leaves_a_layer_out(m: Any, x: Tensor, k: int = 0) -> Any:
    h = m.norm(x)
    if not k:
        h = m.body(h).tanh()
    return m.fc(h)


def leaves_the_norm_out(m: Any, x: Tensor, k: int = 0) -> Any:
    if not k:
        x = m.norm(x)
    return m.fc(x)


def chooses_in_an_expression(m: Any, x: Tensor, k: int = 0) -> Any:
    return m.fc(m.norm(x).abs() if k else m.norm(x))


def asks_the_values(m: Any, x: Tensor, k: int = 0) -> Any:
    h = m.norm(x)
    if float(x.abs().max()) * (1 + k) > 20:
        h = h.relu()
    return m.fc(h)


def _absolute(h: Tensor, k: int) -> Tensor:
    return h.abs() if k else h


def calls_a_function(m: Any, x: Tensor, k: int = 0) -> Any:
    return m.fc(_absolute(m.norm(x), k))


def is_asked_inside_a_module(m: Any, x: Tensor, k: int = 0) -> Any:
    return m.fc(m.bypass(x, k))


def leaves_the_norm_out_behind_a_layer(m: Any, x: Tensor, k: int = 0) -> Any:
    h = m.fc(x)
    if not k:
        h = m.last(h)
    return h.tanh()


def has_fewer_rounds(m: Any, x: Tensor, k: int = 0) -> Any:
    for block in m.blocks[: 3 - k]:
        x = block(x)
    return m.fc(x)


def exits_from_a_loop(m: Any, x: Tensor, k: int = 0) -> Any:
    for number, block in enumerate(m.blocks):
        x = block(x)
        if number + 2 * k == 2:
            return m.fc(x)
    return m.fc(x)


def drops_a_round(m: Any, x: Tensor, k: int = 0) -> Any:
    for number, block in enumerate(m.blocks):
        if number == 1 and k:
            continue
        x = block(x)
    return m.fc(x)


def repeats_while(m: Any, x: Tensor, k: int = 0) -> Any:
    while k >= 0:
        x, k = m.fc(m.norm(x)) if k == 0 else m.norm(x), k - 1
    return x


WAYS: list[Forward] = [
    exits_early, leaves_a_layer_out, leaves_the_norm_out, chooses_in_an_expression, asks_the_values, calls_a_function,
    is_asked_inside_a_module, leaves_the_norm_out_behind_a_layer, has_fewer_rounds, exits_from_a_loop, drops_a_round,
    repeats_while,
]  # fmt: skip


def model_of(forward: Forward) -> nn.Module:
    names = {*forward.__code__.co_names}
    parts: dict[str, Callable[[], nn.Module]] = {
        "norm": lambda: RepBN(C), "body": lambda: nn.Linear(C, C), "fc": lambda: nn.Linear(C, D), "bypass": Bypass,
        "last": lambda: RepBN(D), "blocks": lambda: nn.ModuleList(PostNorm() for _ in range(3)),
    }  # fmt: skip
    return ready(Net(forward, **{name: make() for name, make in parts.items() if name in names}))


@pytest.mark.parametrize("forward", WAYS, ids=lambda forward: forward.__name__)
def test_a_way_that_no_example_takes_is_not_made_wrong(forward: Forward) -> None:
    model = model_of(forward)
    result = fold_norms(model, (draw(3, C), 0))
    inputs = [(10 * draw(3, C, seed=1), k) for k in (0, 1)]
    assert error_of(result.model, model, inputs) < 1e-12
    stays = [norm for norm in result.norms if norm.status == "affine"]
    assert any("no example reaches that: pass one that does" in norm.reason for norm in stays)
    assert any("test_untaken_ways.py (`" in norm.reason for norm in stays)


@pytest.mark.parametrize("forward", [leaves_the_norm_out_behind_a_layer, has_fewer_rounds], ids=lambda f: f.__name__)
def test_an_example_of_each_way_is_followed_instead(forward: Forward) -> None:
    model = model_of(forward)
    examples = [(draw(3, C), k) for k in (0, 1)]
    assert error_of(fold_norms(model, examples).model, model, [(draw(3, C, seed=1), k) for k in (0, 1)]) < 1e-12


# --- what does not keep a norm ---


def has_a_loss(m: Any, x: Tensor, target: Tensor | None = None) -> Any:
    h = m.norm(x)
    if target is not None:
        logits = m.fc(h)
        return nn.functional.mse_loss(logits, target)
    return m.fc(h[:, -1:])


def asks_an_attribute(m: Any, x: Tensor, **_: Any) -> Any:
    h = m.norm(x)
    if m.training or hasattr(m, "flag"):
        h = h.relu()
    return m.fc(h)


def asks_the_type(m: Any, x: Tensor, **_: Any) -> Any:
    h = m.norm(x)
    if h.dtype == torch.float16:
        h = h.clamp(-1e4, 1e4)
    return m.fc(h)


def checks_the_shape(m: Any, x: Tensor, **_: Any) -> Any:
    h = m.norm(x)
    if h.ndim > 4:
        raise ValueError(f"the shape {h.shape} has too many axes")
    return m.fc(h)


def _head(m: Any, h: Tensor, features: bool = False) -> Any:
    return h if features else m.fc(h)


def leaves_an_option_alone(m: Any, x: Tensor, **_: Any) -> Any:
    return _head(m, m.norm(x))


def adds_a_mask(m: Any, x: Tensor, mask: Tensor | None = None) -> Any:
    h = m.norm(x)
    y = m.fc(h)
    if mask is not None:
        y = y + mask.repeat(len(h), 1)
    return y


@pytest.mark.parametrize(
    "forward",
    [has_a_loss, asks_an_attribute, asks_the_type, checks_the_shape, leaves_an_option_alone, adds_a_mask],
    ids=lambda forward: forward.__name__,
)
def test_a_way_that_cannot_meet_the_norm_does_not_keep_it(forward: Forward) -> None:
    names = {"norm": RepBN(C), "fc": nn.Linear(C, D)}
    result = fold_norms(ready(Net(forward, **names)), draw(2, 3, C))
    assert [norm.status for norm in result.norms] == ["forward"], result


def test_a_tracer_of_the_user_stays() -> None:
    import sys

    before = sys.gettrace()
    fold_norms(model_of(exits_early), (draw(3, C), 0))
    assert sys.gettrace() is before


@pytest.mark.parametrize("bends", [False, True])
def test_what_a_forward_closed_over_before_the_model_ran_is_fixed(bends: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return m.fc(h.tanh() if bends else h)

    result = fold_norms(model_of(forward), draw(3, C))
    assert [norm.status for norm in result.norms] == ["affine" if bends else "forward"]


def test_what_a_function_closes_over_while_the_model_runs_is_not_fixed() -> None:
    def forward(m: Any, x: Tensor, bends: int = 0) -> Any:
        h, fc = m.norm(x), m.fc

        def out() -> Any:
            return fc(h.tanh() if bends else h)

        return out()

    result = fold_norms(model_of(forward), (draw(3, C), 0))
    assert [norm.status for norm in result.norms] == ["affine"]
    assert "no example reaches that" in result.norms[0].reason
