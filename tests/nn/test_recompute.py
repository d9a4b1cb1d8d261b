"""A recomputed forward of a norm module changes no state, and returns the output of the first one."""

import copy
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabnorm.nn import UnifiedNorm
from stabnorm.ops import use_kernels
from stabnorm.ops.cpp import library
from tests.nn_modules import MODULES, batches, built, close_states, run, state

every = pytest.mark.parametrize("name", list(MODULES))


@pytest.fixture(params=["aten", "cpp"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "cpp" and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    with use_kernels(request.param):
        yield


@every
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reentrant", [False, True])
def test_t7_a_recompute_changes_no_state_and_returns_the_first_output(name: str, reentrant: bool) -> None:
    plain = built(name)
    seen: list[Tensor] = []

    def recording(norm: nn.Module) -> nn.Module:
        norm.register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
        return norm

    again = recording(copy.deepcopy(plain))
    for x, dy in batches(8, 4, 6, 8):
        y, _ = run(plain, x, dy)
        seen.clear()
        x = x.requires_grad_()
        out = checkpoint(lambda t: again(t).tanh(), x, use_reentrant=reentrant)
        out.backward(dy)
        assert len(seen) == 2
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], y)
        x.grad = None
    for key in ("step", "skips", "rep.step"):
        if key in state(plain):
            assert torch.equal(state(plain)[key], state(again)[key])
    forward = [key for key in state(plain) if "gradient" not in key and key != "nu"]
    for key in forward:
        assert torch.equal(state(plain)[key], state(again)[key]), key


@every
def test_t7_two_checkpointed_forwards_before_one_backward(name: str) -> None:
    plain = built(name)
    again = copy.deepcopy(plain)
    for pair in zip(batches(6, 4, 6, 8), batches(6, 4, 6, 8, seed=1), strict=True):
        (a, da), (b, db) = pair
        a, b = a.requires_grad_(), b.requires_grad_()
        expected = torch.autograd.grad([plain(a), plain(b)], [a, b], [da, db])
        outputs = [checkpoint(again, t, use_reentrant=False) for t in (a, b)]
        for got, want in zip(torch.autograd.grad(outputs, [a, b], [da, db]), expected, strict=True):
            torch.testing.assert_close(got, want)
    close_states(plain, again)


@pytest.mark.parametrize("order", range(3))
def test_recomputes_come_in_any_order(order: int) -> None:
    norm = UnifiedNorm(8, warmup_steps=0)
    for x, dy in batches(6, 4, 6, 8):
        run(norm, x, dy)
    inputs = [x.requires_grad_() for x, _ in batches(5, 4, 6, 8, seed=1)]
    seen: dict[int, list[Tensor]] = {i: [] for i in range(5)}

    def forward(x: Tensor, index: int) -> Tensor:
        y: Tensor = norm(x)
        seen[index].append(y.detach().clone())
        return y.tanh()

    outputs = [checkpoint(forward, x, i, use_reentrant=False) for i, x in enumerate(inputs)]
    for index in random.Random(order).sample(range(5), 5):
        outputs[index].backward(torch.randn_like(outputs[index]))
    for first, second in seen.values():
        assert torch.equal(first, second)
