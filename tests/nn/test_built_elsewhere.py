"""Modules built on the meta device or under another default dtype, float64 modules, and traced ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from stabnorm.nn import PowerNorm, UnifiedNorm
from tests.nn_modules import MODULES, built, run, state

every = pytest.mark.parametrize("name", list(MODULES))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained(name: str) -> nn.Module:
    norm = built(name)
    for _ in range(6):
        run(norm, torch.randn(4, 6, 8), torch.randn(4, 6, 8))
    return norm


@every
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
def test_built_on_the_meta_device_and_loaded_it_is_the_same_module(name: str, assign: bool) -> None:
    norm = trained(name)
    with torch.device("meta"):
        loaded = MODULES[name](8)
    if not assign:
        loaded._apply(lambda t: torch.full_like(t, 77, device="cpu"))  # to_empty, where the memory held something
    loaded.load_state_dict({key: value.clone() for key, value in norm.state_dict().items()}, assign=assign)
    for _ in range(4):
        x, dy = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
        for got, want in zip(run(loaded, x, dy), run(norm, x, dy), strict=True):
            assert torch.equal(got, want)
    theirs = norm.state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    if "loss_scale" in state(loaded):
        assert loaded.get_buffer("loss_scale") == 1


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("low", [False, True], ids=["float32 input", "bfloat16 input"])
def test_the_default_dtype_changes_no_figure(name: str, dtype: torch.dtype, low: bool) -> None:
    first, second = built(name), built(name)
    second.load_state_dict(first.state_dict())
    if low:
        first.to(torch.bfloat16)
        second.to(torch.bfloat16)
    for _ in range(6):
        x, dy = (torch.randn(4, 60, 8).to(torch.bfloat16 if low else torch.float32) for _ in range(2))
        want = run(first, 3 * x + 1, dy)
        with default_dtype(dtype):
            got = run(second, 3 * x + 1, dy)
        for own, theirs in zip(got, want, strict=True):
            assert torch.equal(own, theirs)
    for key, value in state(second).items():
        assert torch.equal(value, state(first)[key]), key


@every
def test_buffers_are_float32_also_when_built_in_low_precision(name: str) -> None:
    with default_dtype(torch.bfloat16):
        norm = MODULES[name](8)
    assert all(parameter.dtype == torch.bfloat16 for parameter in norm.parameters())
    assert {buffer.dtype for buffer in norm.buffers()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("warmup", [0, 100])
def test_a_float64_norm_averages_in_float64(warmup: int) -> None:
    unified = UnifiedNorm(8, warmup_steps=warmup, filtration=None).double()
    power = PowerNorm(8, warmup_steps=warmup).double()
    squares: list[Tensor] = []
    average, quadratic = torch.ones(2, 8, dtype=torch.float64).unbind()
    for step in range(30):
        x = torch.randn(64, 8, dtype=torch.float64)
        unified(x), power(x)
        squares.append(x.square().mean(0))
        smooth = warmup == 0 and step >= 4
        square = torch.stack(squares[-4:]).log().mean(0).exp() if smooth else squares[-1]
        average = 0.9 * average + 0.1 * square if step else square
        quadratic = 0.9 * quadratic + 0.1 * squares[-1] if warmup == 0 else torch.stack(squares).mean(0)
    torch.testing.assert_close(unified.running_square, average, rtol=1e-13, atol=0)
    torch.testing.assert_close(power.running_square, quadratic, rtol=1e-13, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every
def test_traced_in_eval_it_computes_the_same(name: str) -> None:
    norm = trained(name).eval()
    with torch.no_grad():
        traced = torch.jit.trace(norm, (torch.randn(4, 6, 8),))
        x = torch.randn(3, 6, 8)
        torch.testing.assert_close(traced(x), norm(x))


@every
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_read_back_to_the_host(name: str, masked: bool) -> None:
    # On the meta device there is nothing to read: `.item()`, `bool(tensor)` and a boolean index raise. The ops' bodies
    # run here, which a compiled graph would hide.
    with torch.device("meta"):
        norm = built(name)
        mask = torch.ones(4, 6, dtype=torch.bool) if masked else None
        for _ in range(2):
            run(norm, torch.randn(4, 6, 8), torch.randn(4, 6, 8), mask)
        norm.eval()(torch.randn(4, 6, 8))
