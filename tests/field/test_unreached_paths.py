"""Weights that no example reaches, and paths that depend on size or tokens: folded too, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import fold_norms
from stabnorm.nn import RepBN
from tests.fold.nets import Net, draw, error_of, ready

C, D, EXPERTS = 6, 5, 4
Build = Callable[[], nn.Module]


def only(result: Any) -> Any:
    """The one norm in a result."""
    (norm,) = (norm for norm in result.norms if norm.name == "norm")
    return norm


# --- experts ---


class Experts(nn.Module):
    """Every row goes to the expert that the sum of its signs names."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = RepBN(C)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(C, D, bias=bias), nn.Tanh()) for _ in range(EXPERTS))

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        h = self.norm(x)
        y = torch.zeros(len(x), D, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(to == number)
            if len(rows):
                y = y.index_add(0, rows, expert(h[rows]))
        return y


class ExpertsInOneParameter(Experts):
    """The same, with one parameter for all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RepBN(C, center=False)
        del self.experts
        self.weight = nn.Parameter(torch.empty(EXPERTS, D, C))

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        h = self.norm(x)
        y = torch.zeros(len(x), D, dtype=x.dtype)
        for number in to.unique().tolist():
            (rows,) = torch.where(to == number)
            y = y.index_add(0, rows, nn.functional.linear(h[rows], self.weight[number]))
        return y


@pytest.mark.parametrize("build", [Experts, lambda: Experts(bias=False), ExpertsInOneParameter])
def test_an_expert_that_no_token_reached_takes_the_change_of_the_others(build: Build) -> None:
    model = ready(build())
    few, all_of_them = torch.tensor([1, 1, 3]), torch.arange(8) % EXPERTS
    result = fold_norms(model, (draw(3, C), few), check=(draw(2, C, seed=1), few[1:]))
    assert only(result).status == "forward"
    assert error_of(result.model, model, [(draw(8, C, seed=2), all_of_them)]) < 1e-12


@pytest.mark.parametrize("build", [Experts, ExpertsInOneParameter])
def test_one_expert_alone_does_not_say_what_the_others_read(build: Build) -> None:
    model = ready(build())
    one = torch.tensor([2, 2])
    result = fold_norms(model, (draw(2, C), one), check=(draw(2, C, seed=1), one))
    assert only(result).status == "affine"
    assert "no example reaches that: pass one that does" in only(result).reason
    assert error_of(result.model, model, [(draw(8, C, seed=2), torch.arange(8) % EXPERTS)]) < 1e-12


def test_an_expert_that_is_called_with_no_token_was_not_reached() -> None:
    class Called(Experts):
        def forward(self, x: Tensor, to: Tensor) -> Tensor:
            h = self.norm(x)
            y = torch.zeros(len(x), D, dtype=x.dtype)
            for number, expert in enumerate(self.experts):
                (rows,) = torch.where(to == number)
                y = y.index_add(0, rows, expert(h[rows]))
            return y

    model = ready(Called())
    result = fold_norms(model, (draw(3, C), torch.tensor([1, 1, 3])))
    assert only(result).status == "forward"
    assert error_of(result.model, model, [(draw(8, C, seed=2), torch.arange(8) % EXPERTS)]) < 1e-12


# --- other adapters, domains, depths ---


def switch(function: Callable[..., Any], **parts: Any) -> nn.Module:
    """A model with a second argument that picks a path, 0 or 1; the example takes 0."""
    return ready(Net(function, **parts))


def two(make: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList([make(), make()])


class Frozen(nn.Module):
    """A linear layer that holds its weight as a buffer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.get_buffer("weight"))


PATHS = {
    "a second adapter": lambda: switch(
        lambda m, x, k=0: m.fc(m.norm(x)) + m.adapters[k](m.norm(x)),
        norm=RepBN(C), fc=nn.Linear(C, D), adapters=two(lambda: nn.Linear(C, D)),
    ),
    "a head that is an attribute": lambda: switch(
        lambda m, x, k=0: (m.other if k else m.fc)(m.norm(x)),
        norm=RepBN(C), fc=nn.Linear(C, D), other=nn.Linear(C, D),
    ),
    "another domain's norm": lambda: switch(
        lambda m, x, k=0: m.fc((m.other if k else m.norm)(x)), norm=RepBN(C), other=RepBN(C), fc=nn.Linear(C, D)
    ),
    "another way to the same layer": lambda: switch(
        lambda m, x, k=0: m.fc(m.project(x) if k else m.norm(x)),
        norm=RepBN(C), project=nn.Linear(C, C), fc=nn.Linear(C, D),
    ),
    "a layer that is skipped": lambda: switch(
        lambda m, x, k=0: m.fc(m.extra(m.norm(x)).tanh() if k else m.norm(x)),
        norm=RepBN(C), extra=nn.Linear(C, C), fc=nn.Linear(C, D),
    ),
    "a norm without weights": lambda: switch(
        lambda m, x, k=0: m.fc(m.extra(m.norm(x)) if k else m.norm(x)),
        norm=RepBN(C), extra=nn.LayerNorm(C, elementwise_affine=False), fc=nn.Linear(C, D),
    ),
    "an activation with one weight": lambda: switch(
        lambda m, x, k=0: m.fc(m.extra(m.norm(x)) if k else m.norm(x)),
        norm=RepBN(C), extra=nn.PReLU(), fc=nn.Linear(C, D),
    ),
    "a single number": lambda: switch(
        lambda m, x, k=0: m.fc(m.norm(x) + m.extra if k else m.norm(x)),
        norm=RepBN(C), extra=nn.Parameter(torch.zeros(1)), fc=nn.Linear(C, D),
    ),
    "weights that are buffers": lambda: switch(
        lambda m, x, k=0: (m.extra if k else m.fc)(m.norm(x)), norm=RepBN(C), fc=nn.Linear(C, D), extra=Frozen(C, D)
    ),
    "a layer in between, behind a producer": lambda: switch(
        lambda m, x, k=0: m.norm(m.extra(m.fc(x)) if k else m.fc(x)).tanh(),
        norm=RepBN(C), extra=nn.Linear(C, C), fc=nn.Linear(C, C),
    ),
    "deeper": lambda: switch(
        lambda m, x, k=0: m.head(m.blocks[1](m.blocks[0](m.norm(x))) if k else m.blocks[0](m.norm(x))),
        norm=RepBN(C), blocks=two(lambda: nn.Sequential(nn.Linear(C, C), nn.Tanh())), head=nn.Linear(C, D),
    ),
    "a branch of the stream": lambda: switch(
        lambda m, x, k=0: (lambda h: m.head(m.last(h + (m.other if k else m.fc)(h))))(m.norm(x)),
        norm=RepBN(C), fc=nn.Linear(C, C), other=nn.Linear(C, C), last=RepBN(C), head=nn.Linear(C, D),
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_no_example_takes_is_not_made_wrong(path: str) -> None:
    model = PATHS[path]()
    result = fold_norms(model, (draw(3, C), 0))
    assert error_of(result.model, model, [(draw(3, C, seed=1), k) for k in (0, 1)]) < 1e-12
    assert only(result).status == "affine"
    assert "no example reaches that" in only(result).reason


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("deeper", "a branch of the stream")])
def test_an_example_of_the_other_path_lets_the_norm_go_where_it_can(path: str) -> None:
    model = PATHS[path]()
    result = fold_norms(model, [(draw(3, C), 0), (draw(3, C), 1)])
    assert "no example" not in str(result)
    assert error_of(result.model, model, [(draw(3, C, seed=1), k) for k in (0, 1)]) < 1e-12


def test_named_siblings_take_the_change_because_a_dictionary_is_no_chain() -> None:
    heads = nn.ModuleDict({"a": nn.Linear(C, D), "b": nn.Linear(C, D)})
    model = ready(Net(lambda m, x, k="a": m.heads[k](m.norm(x)), norm=RepBN(C), heads=heads))
    result = fold_norms(model, draw(3, C))
    assert only(result).status == "forward"
    assert error_of(result.model, model, [(draw(3, C, seed=1), k) for k in ("a", "b")]) < 1e-12


def test_what_runs_without_being_called_does_not_keep_a_norm() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.fc(m.norm(x) * m.scale.exp()) + m.table.get_buffer("weight")[0, 0] + float(m.factor)

    parts: dict[str, Any] = {"scale": nn.Parameter(torch.zeros(())), "factor": nn.Parameter(torch.zeros(1))}
    model = ready(Net(forward, norm=RepBN(C), fc=nn.Linear(C, D), table=Frozen(C, D), **parts))
    assert [norm.status for norm in fold_norms(model, draw(3, C)).norms] == ["forward"]


def test_what_could_not_meet_the_norm_does_not_keep_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = RepBN(C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.fc(self.norm(x)).tanh()
            return y

    model = ready(Net(lambda m, x: m.head(m.block(x)), block=Block(), head=nn.Linear(C, D), never=nn.Linear(C, D)))
    assert [norm.status for norm in fold_norms(model, draw(3, C)).norms] == ["forward"]


# --- sizes and tokens ---


def by_size(function: Callable[..., Any], **parts: Any) -> nn.Module:
    return ready(Net(function, **{"norm": RepBN(C), "fc": nn.Linear(C, D), **parts}))


SIZES: dict[str, tuple[Build, Tensor, tuple[int, ...]]] = {
    "several rows, where the example has one": (
        lambda: by_size(lambda m, x: m.fc(m.norm(x) if len(x) == 1 else m.norm(x).relu())),
        draw(1, 4, C), (3, 4, C),
    ),
    "one row, where the example has several": (
        lambda: by_size(lambda m, x: m.fc(m.norm(x).relu() if len(x) == 1 else m.norm(x))),
        draw(3, 4, C), (1, 4, C),
    ),
    "a factor that follows the length": (
        lambda: by_size(lambda m, x: m.fc(m.norm(x) * x.shape[1] ** -0.5)), draw(2, 4, C), (2, 9, C),
    ),
    "a padding to a multiple": (
        lambda: by_size(lambda m, x: m.fc(nn.functional.pad(m.norm(x), (0, 0, 0, -x.shape[1] % 4)))),
        draw(2, 4, C), (2, 6, C),
    ),
    "a table of positions": (
        lambda: by_size(
            lambda m, x: m.fc(m.norm(x)) if x.shape[1] <= 4 else m.fc(m.norm(x) + m.table[: x.shape[1]]),
            table=nn.Parameter(draw(16, C)),
        ),
        draw(2, 4, C), (2, 6, C),
    ),
    "an image's size": (
        lambda: by_size(
            lambda m, x: m.fc(m.norm(x) if x.shape[-1] == 8 else m.norm(x).abs()),
            norm=RepBN(C, channel_dim=1), fc=nn.Conv2d(C, D, 1),
        ),
        draw(2, C, 8, 8), (2, C, 9, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_a_path_that_depends_on_the_size_is_found_by_the_second_input(size: str) -> None:
    build, example, other = SIZES[size]
    model = build()
    result = fold_norms(model, example)
    assert error_of(result.model, model, [(example,), (draw(*other, seed=1),)]) < 1e-12
    assert only(result).status == "affine"
    assert "rolled back" not in only(result).reason
    assert "another size" in result.checked_on


def test_a_path_that_depends_on_the_tokens_is_found_by_tokens_that_the_example_does_not_have() -> None:
    def by_token(m: Any, ids: Tensor) -> Any:
        h = m.norm(m.embedding(ids))
        return m.fc(h.relu() if bool((ids > 9).any()) else h)

    model = by_size(by_token, embedding=nn.Embedding(99, C))
    result = fold_norms(model, torch.tensor([[7, 5, 2]]))
    assert only(result).status == "affine"
    assert error_of(result.model, model, [(torch.tensor([[7, 50, 2]]),)]) < 1e-12


def test_who_ships_one_size_passes_it_as_check() -> None:
    build, example, _ = SIZES["a padding to a multiple"]
    result = fold_norms(build(), example, check=draw(*example.shape, seed=1))
    assert only(result).status == "forward"
    assert result.checked_on == "the example and check"


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 3, 16, 16)])
def test_sizes_that_the_model_does_not_take_are_left_alone(shape: tuple[int, ...]) -> None:
    seen: list[torch.Size] = []

    def fixed(m: Any, x: Tensor) -> Any:
        assert x.shape[2:] == (16, 16)
        seen.append(x.shape)
        return m.fc(m.norm(m.conv(x)).flatten(2).mT)

    model = by_size(fixed, norm=RepBN(C, channel_dim=1), conv=nn.Conv2d(3, C, 4, 4))
    assert fold_norms(model, draw(*shape)).norms[0].status == "forward"
    assert len({s[0] for s in seen}) > 1
