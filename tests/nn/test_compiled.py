"""Every module compiles to one graph, computes the same, counts a recompute once, and is not compiled again."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabnorm.nn._progressive import ProgressiveNorm
from tests.nn_modules import MODULES, built, compile_one_graph, run, state
from tests.versions import needs_inductor

pytestmark = pytest.mark.slow


class Counter:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def same(first: nn.Module, second: nn.Module) -> None:
    theirs = state(second)
    for name, value in state(first).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", list(MODULES))
def test_one_graph_and_the_same_numbers(name: str, masked: bool) -> None:
    norm, counter = built(name), Counter()
    twin = copy.deepcopy(norm)
    compiled = compile_one_graph(twin, counter)
    for index in range(8):
        x, dy = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
        if index == 6:
            x[0] = torch.nan
        mask = torch.rand(4, 6) > 0.3 if masked else None
        for got, want in zip(run(compiled, x, dy, mask), run(norm, x, dy, mask), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
        if isinstance(twin, ProgressiveNorm) and isinstance(norm, ProgressiveNorm):
            for each in (twin, norm):
                each.lam.sub_(0.05).clamp_(min=0)
    same(norm, twin)
    assert counter.graphs == 1


@pytest.mark.parametrize("outside", [True, False], ids=["checkpoint(compiled)", "compiled(checkpoint)"])
@pytest.mark.parametrize("name", list(MODULES))
def test_a_recompute_in_a_compiled_model_is_no_batch(name: str, outside: bool) -> None:
    norm = built(name)
    twin = copy.deepcopy(norm)
    if outside:
        compiled = compile_one_graph(twin, "aot_eager")

        def call(x: Tensor) -> Tensor:
            y: Tensor = checkpoint(compiled, x, use_reentrant=False)
            return y
    else:

        def checkpointed(x: Tensor) -> Tensor:
            y: Tensor = checkpoint(twin, x, use_reentrant=False)
            return y

        call = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    for _ in range(8):
        x, dy = torch.randn(4, 6, 8, requires_grad=True), torch.randn(4, 6, 8)
        y, y_twin = norm(x), call(x)
        torch.testing.assert_close(y_twin, y, rtol=1e-5, atol=1e-5)
        (want,), (got,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(y_twin, x, dy)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    same(norm, twin)


@pytest.mark.parametrize("name", list(MODULES))
def test_a_loaded_state_and_eval_need_no_other_code(name: str) -> None:
    norm = built(name)
    compiled = compile_one_graph(norm, "aot_eager")
    for _ in range(3):
        run(compiled, torch.randn(4, 6, 8), torch.randn(4, 6, 8))
    norm.eval()
    x = torch.randn(4, 6, 8)
    torch.testing.assert_close(compiled(x), norm(x))


@needs_inductor
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("name", ["unified", "rep", "power"])
def test_inductor_computes_the_same(name: str) -> None:
    norm = built(name)
    twin = copy.deepcopy(norm)
    compiled = compile_one_graph(twin)
    for _ in range(6):
        x, dy = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
        for got, want in zip(run(compiled, x, dy), run(norm, x, dy), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    same(norm, twin)
