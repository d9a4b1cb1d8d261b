"""Unusual models: each folds exactly, or is left as it is with a helpful reason."""

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from stabnorm import StabNormError, fold_norms
from stabnorm.nn import RepBN
from tests.fold.nets import Net, draw, net, ready

C, D = 6, 5
Build = Callable[[], nn.Module]


class Case(NamedTuple):
    """A model, what becomes of the norm called `norm`, what the reason holds, and the input."""

    build: Build
    status: str = "forward"
    says: str = ""
    inputs: tuple[Any, ...] = (draw(3, 4, C),)


def norm(channels: int = C, **options: Any) -> RepBN:
    return RepBN(channels, **options)


def reader(function: Callable[..., Any], **parts: Any) -> Build:
    return net(function, **{"norm": norm(), "fc": nn.Linear(C, D), **parts})


def after(change: Callable[[Any], Any], **parts: Any) -> Build:
    """A norm and its reader, after something was done to the model."""
    build = reader(lambda m, x: m.fc(m.norm(x)), **parts)

    def changed() -> nn.Module:
        model = build()
        change(model)
        return model

    return changed


class Plus(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.square()


def pruned(m: Any) -> None:
    prune.l1_unstructured(m.fc, "weight", 0.3)


def channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    return conv


def with_buffer(m: Any) -> None:
    m.register_buffer("w", draw(D, C, seed=9))


def on_buffer(m: Any) -> None:
    with_buffer(m)
    m.function = lambda m, x: F.linear(m.norm(x), m.w)


def energy(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(m.fc(m.norm(x)).square().sum(), x)[0]


def in_place_of_a_view(m: Any, x: Tensor) -> Any:
    h = m.norm(x)
    h.view(-1)[:2] = 0
    return m.fc(h)


def jagged(m: Any, x: Tensor) -> Tensor:
    rows = torch.nested.as_nested_tensor(list(m.norm(x)), layout=torch.jagged)
    return m.fc(rows).to_padded_tensor(0.0)  # type: ignore[no-any-return]


def stream_as_bias(m: Any, x: Tensor) -> Any:
    h = m.norm(x[0])
    return m.fc(h) + m.head(torch.addmm(h, m.other(x[0]), m.w))


CASES = {
    # by keyword
    "x=": Case(reader(lambda m, x: m.fc(m.norm(x=x)))),
    "mask first": Case(reader(lambda m, x: m.fc(m.norm(mask=x[..., 0] > 0, x=x)))),
    "x=, left": Case(reader(lambda m, x: m.norm(x=x).relu()), "affine", "relu"),
    "input=": Case(reader(lambda m, x: m.fc(m.norm(input=x)), norm=nn.BatchNorm1d(C)), inputs=(draw(4, C),)),
    "input=, left": Case(
        reader(lambda m, x: m.norm(input=x).relu(), norm=nn.BatchNorm1d(C)), "affine", "relu", (draw(4, C),)
    ),
    # views and parts
    "some channels": Case(reader(lambda m, x: m.fc(m.norm(x)[..., :3]), fc=nn.Linear(3, D))),
    "two halves, two readers": Case(
        reader(
            lambda m, x: (lambda a, b: m.fc(a) + m.o(b))(*m.norm(x).chunk(2, -1)),
            fc=nn.Linear(3, D),
            o=nn.Linear(3, D),
        )
    ),
    "two halves, one reader": Case(
        reader(lambda m, x: sum(map(m.fc, m.norm(x).chunk(2, -1))), fc=nn.Linear(3, D)), "affine", "more than one thing"
    ),
    "gated by its other half": Case(
        reader(lambda m, x: (lambda a, b: m.fc(a * b.sigmoid()))(*m.norm(x).chunk(2, -1)), fc=nn.Linear(3, D)),
        "affine",
        "sigmoid",
    ),
    "stacked with itself": Case(
        reader(lambda m, x: m.fc(torch.stack([m.norm(x), m.norm(x).flip(1)], -1).flatten(-2)), fc=nn.Linear(2 * C, D))
    ),
    "channels rolled and flipped": Case(reader(lambda m, x: m.fc(m.norm(x).roll(1, -1).flip(-1)))),
    "tokens chosen by the input": Case(reader(lambda m, x: m.fc(m.norm(x)[x[..., 0] > 0]).sum(0))),
    "in place, of a view": Case(reader(in_place_of_a_view), "affine", "in place"),
    "a read and a nonlinear one": Case(reader(lambda m, x: m.fc(m.norm(x)) + m.norm(x).exp().mean()), "affine", "exp"),
    "a zero beside the channels": Case(reader(lambda m, x: m.fc(F.pad(m.norm(x), (0, 1))), fc=nn.Linear(C + 1, D))),
    "positions added": Case(reader(lambda m, x: m.fc(m.norm(x) + m.p), p=nn.Parameter(draw(4, C))), "affine", "add"),
    # weights
    "transposed by hand": Case(
        reader(
            lambda m, x: F.linear(m.norm(x), m.w.t(), m.b),
            fc=None,
            w=nn.Parameter(draw(C, D)),
            b=nn.Parameter(draw(D)),
        )
    ),
    "a batch of matrices and biases": Case(
        reader(
            lambda m, x: torch.baddbmm(m.b, m.norm(x), m.w),
            fc=None,
            w=nn.Parameter(draw(3, C, D)),
            b=nn.Parameter(draw(3, 1, D)),
        )
    ),
    "a stream where a bias goes": Case(
        reader(stream_as_bias, other=norm(), w=nn.Parameter(draw(C, C)), head=nn.Linear(C, D)),
        "affine",
        "adds it to its own output",
    ),
    "data of a weight": Case(reader(lambda m, x: F.linear(m.norm(x), m.fc.weight.data, m.fc.bias.data))),
    "copy of a weight": Case(reader(lambda m, x: F.linear(m.norm(x), m.fc.weight.clone())), "affine", "no Parameter"),
    "buffer as a weight": Case(after(on_buffer), "affine", "no Parameter"),
    "product of two parameters": Case(
        reader(lambda m, x: m.norm(x) @ (m.u @ m.v), u=nn.Parameter(draw(C, 2)), v=nn.Parameter(draw(2, D))),
        "affine",
        "no Parameter",
    ),
    "parametrized": Case(
        after(lambda m: parametrize.register_parametrization(m.fc, "weight", Plus())), "affine", "no Parameter"
    ),
    "orthogonal": Case(after(lambda m: parametrizations.orthogonal(m.fc)), "affine", "no Parameter"),
    "pruned": Case(after(pruned), "affine", "no Parameter"),
    "frozen": Case(after(lambda m: m.fc.requires_grad_(False))),
    "one module, two names": Case(
        reader(lambda m, x: m.fc(m.norm(x)) + m.d["fc"](m.norm(x)), d=nn.ModuleDict({"fc": nn.Linear(C, D)}))
    ),
    "columns of one weight": Case(
        reader(lambda m, x: m.norm(x)[..., :3] @ m.fc.weight[:, :3].T + x[..., 3:] @ m.fc.weight[:, 3:].T),
        "affine",
        "also read by",
    ),
    "bilinear": Case(reader(lambda m, x: m.fc(m.norm(x), x), fc=nn.Bilinear(C, C, D)), "affine", "_trilinear"),
    "reflecting convolution": Case(
        reader(
            lambda m, x: m.fc(m.norm(x)),
            norm=norm(channel_dim=1),
            fc=nn.Conv1d(C, D, 3, padding=1, padding_mode="reflect"),
        ),
        inputs=(draw(2, C, 8),),
    ),
    "weights in channels_last": Case(
        reader(
            lambda m, x: m.fc(m.norm(x)),
            norm=norm(channel_dim=1),
            fc=channels_last(nn.Conv2d(C, D, 2)),
        ),
        inputs=(draw(2, C, 4, 4),),
    ),
    "keys and values": Case(
        reader(
            lambda m, x: m.fc(x, m.norm(x), m.norm(x))[0],
            fc=nn.MultiheadAttention(C, 2, batch_first=True, add_bias_kv=True),
        )
    ),
    "queries that are a parameter": Case(
        reader(lambda m, x: m.q @ m.norm(x).mT, norm=norm(center=False), fc=None, q=nn.Parameter(draw(2, C)))
    ),
    # backward
    "frozen, before it": Case(
        reader(lambda m, x: m.norm(m.fc(x)).sin(), fc=nn.Linear(C, C).requires_grad_(False)), "backward"
    ),
    "zeros beside its input": Case(
        reader(lambda m, x: m.norm(F.pad(m.fc(x), (0, 0, 1, 1))).sin(), fc=nn.Linear(C, C)), "affine", "sin"
    ),
    "input returned": Case(
        reader(lambda m, x: (lambda h: (h, m.norm(h).sin()))(m.fc(x)), fc=nn.Linear(C, C)), "affine", "sin"
    ),
    # how the forward runs
    "its weight's gradient": Case(reader(energy), "affine", "also read by"),
    "functional_call": Case(
        reader(lambda m, x: torch.func.functional_call(m.fc, dict(m.fc.named_parameters()), (m.norm(x),)))
    ),
    "functional_call, other weights": Case(
        reader(
            lambda m, x: torch.func.functional_call(m.fc, {k: 2 * p for k, p in m.fc.named_parameters()}, (m.norm(x),))
        ),
        "affine",
        "no Parameter",
    ),
    "vmap": Case(reader(lambda m, x: torch.func.vmap(lambda t: m.fc(m.norm(t)))(x)), "affine", "nothing was seen"),
    "jvp": Case(
        reader(lambda m, x: torch.func.jvp(lambda t: m.fc(m.norm(t)), (x,), (x,))), "affine", "nothing was seen"
    ),
    "jagged tensors": Case(reader(jagged)),
    "nested tensors": Case(
        reader(lambda m, x: m.fc(torch.nested.as_nested_tensor(list(m.norm(x)))).to_padded_tensor(0.0)),
        "affine",
        "_nested_tensor_from_tensor_list",
    ),
    "sparse mixing": Case(
        reader(lambda m, x: m.fc(torch.sparse.mm(torch.eye(4).to(x).to_sparse(), m.norm(x[0])))), "affine", "sparse"
    ),
    "compiled reader": Case(after(lambda m: m.fc.compile(backend="eager"))),
    "hook on the reader": Case(after(lambda m: m.fc.register_forward_pre_hook(lambda _, args: (2 * args[0],)))),
    "called past its hooks": Case(reader(lambda m, x: m.fc(m.norm.forward(x))), "kept", "no example reaches it"),
    "one of two, by name": Case(reader(lambda m, x, k: m.fc(m.get_submodule(k)(x))), inputs=(draw(3, C), "norm")),
    # inputs
    "sparse": Case(reader(lambda m, x: m.fc(m.norm(x.to_dense()))), inputs=(draw(3, C).to_sparse(),)),
    "complex": Case(reader(lambda m, x: m.fc(m.norm(x.real))), inputs=(torch.view_as_complex(draw(3, C, 2)),)),
    "float8": Case(reader(lambda m, x: m.fc(m.norm(x.double()))), inputs=(draw(3, C).to(torch.float8_e4m3fn),)),
    "a list and None": Case(
        reader(lambda m, xs, mask: sum(m.fc(m.norm(x)) for x in xs)), inputs=([draw(3, C), draw(3, C)], None)
    ),
    "no tokens yet in a cache": Case(
        reader(lambda m, x, c: torch.cat([c, m.fc(m.norm(x))], 1)), inputs=(draw(3, 4, C), draw(3, 0, D))
    ),
}


def other(value: Any) -> Any:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and value.itemsize > 1
    return 1.7 * value + 0.3 if plain else value


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*check of the fold says nothing")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_it_folds_exactly_or_says_why_not(case: Case) -> None:
    model = ready(case.build())
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    result = fold_norms(model, case.inputs)
    (site,) = (n for n in result.norms if n.name == "norm")
    assert site.status == case.status, str(result)
    assert case.says in site.reason
    assert "rolled back" not in site.reason  # seen in the trace, not found out by the check
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for inputs in (case.inputs, tuple(map(other, case.inputs))):
            actual, expected = result.model(*inputs), model(*inputs)
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# --- what a norm's output can hide in ---


@dataclass(slots=True)
class Slotted:
    y: Tensor
    hidden: Tensor


HIDDEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "an object with slots": Slotted,
    "a deque": lambda y, h: deque([y, h]),
    "a frozenset": lambda y, h: (y, frozenset([h])),
    "an array": lambda y, h: (y, h.numpy()),
    "an array of objects": lambda y, h: (y, np.array([h.numpy(), None], dtype=object)),
    "lists of numbers": lambda y, h: {"y": y, "hidden": h.tolist()},
    "complex numbers": lambda y, h: (y, torch.view_as_complex(h.unflatten(-1, (3, 2)).contiguous())),
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=list(HIDDEN))
def test_an_output_that_holds_the_norm_s_own_is_found_wherever_it_is(hide: Callable[..., Any]) -> None:
    def function(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return hide(m.fc(h), h)

    result = fold_norms(ready(Net(function, norm=norm(), fc=nn.Linear(C, D))), draw(3, 4, C))
    assert [n.status for n in result.norms] == ["affine"]
    assert not result.vacuous


def test_complex_outputs_are_compared() -> None:
    result = fold_norms(
        ready(Net(lambda m, x: torch.fft.rfft(m.fc(m.norm(x))), norm=norm(), fc=nn.Linear(C, D))), draw(3, C)
    )
    assert [n.status for n in result.norms] == ["forward"]
    assert not result.vacuous


# --- what cannot be done, and what to do ---


class Says(nn.Module):
    """A module whose `fold_affine` returns what the test wants."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.said = returned

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def fold_affine(self) -> Any:
        return self.said


SAID = {
    "two of three": ((torch.ones(C), torch.ones(C)), "does not return"),
    "numbers": ((2.0, 0.0, -1), "does not return"),
    "two lengths": ((torch.ones(C), torch.ones(1), -1), "does not return"),
    "other channels": ((torch.full((C + 1,), 2.0), torch.zeros(C + 1), -1), r"'norm'.*7 channels on axis -1.*4, 6\)"),
    "one for all": ((torch.full((1,), 2.0), torch.zeros(1), -1), "1 channels"),
    "another axis": ((torch.full((C,), 2.0), torch.zeros(C), 7), "on axis 7"),
}


@pytest.mark.parametrize(("returned", "why"), SAID.values(), ids=list(SAID))
@pytest.mark.parametrize("backward", [False, True])
def test_a_fold_affine_that_is_none_is_told_what_it_should_be(returned: Any, why: str, backward: bool) -> None:
    fc = nn.Linear(C, C)
    model = nn.Sequential()
    model.add_module("fc" if backward else "norm", fc if backward else Says(returned))
    model.add_module("norm" if backward else "fc", Says(returned) if backward else fc)
    with pytest.raises((TypeError, StabNormError), match=why):
        fold_norms(model.double().eval(), draw(3, 4, C))


def refused(change: Callable[[nn.Module], Any], example: Any = None, **options: Any) -> str:
    model = ready(Net(lambda m, x: m.fc(m.norm(x)), norm=norm(), fc=nn.Linear(C, D)))
    with pytest.raises((TypeError, ValueError, StabNormError)) as raised:
        fold_norms(change(model) or model, draw(3, C) if example is None else example, **options)
    return str(raised.value)


def test_what_is_wrong_with_a_call_is_said_with_what_to_do() -> None:
    assert "no nn.Module" not in refused(lambda m: "a path")
    assert "is of type str. Give an nn.Module" in refused(lambda m: "a path")
    assert "on the meta device" in refused(lambda m: m.to("meta"), torch.empty(3, C, device="meta"))
    assert "Run one batch" in refused(lambda m: nn.Sequential(norm(), nn.LazyLinear(D)).eval())
    assert "outputs= fails on what the model returns, a Tensor" in refused(lambda m: None, outputs=lambda y: y.logits)

    def iterates(m: Any) -> None:
        m.function = lambda m, x: (m.fc(m.norm(x)), iter([m.norm(x)]))

    assert "Return a list, or name the outputs" in refused(iterates)
    assert fold_norms_of_first(iterates) == ["forward"]

    def branches(m: Any) -> None:
        m.function = lambda m, x: torch.cond(x.sum() > 0, lambda t: m.fc(t), lambda t: m.fc(-t), (m.norm(x),))

    assert "torch.cond, fold it with plain" in refused(branches)

    def counts(m: Any) -> None:
        calls: list[int] = []
        m.function = lambda m, x: (calls.append(1), len(calls) * m.fc(m.norm(x)))[1]  # type: ignore[func-returns-value]

    assert "left over from the forward before" in refused(counts)


def fold_norms_of_first(change: Callable[[nn.Module], Any]) -> list[str]:
    model = ready(Net(None, norm=norm(), fc=nn.Linear(C, D)))  # type: ignore[arg-type]
    change(model)
    return [n.status for n in fold_norms(model, draw(3, C), outputs=lambda outputs: outputs[0]).norms]
