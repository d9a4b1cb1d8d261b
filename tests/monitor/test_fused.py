"""Norms that run in one pass with what observes them: the same history, the norm's output to rounding, and a way back.

On a CPU this is the C++ backend; the kernel's turn is in tests/ops/test_triton_observed.py.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from stabnorm import StabilityMonitor, valid_tokens
from stabnorm.ops import use_kernels
from stabnorm.ops.cpp import library
from stabnorm.ops.observed import observed_norm
from tests.monitor.one_history import History, Net, assert_same, everything, train


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    reason = library.why_not()
    if reason is not None:
        pytest.skip(reason)
    with use_kernels("cpp"):
        yield


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The inputs of the norms that ran in one pass."""
    calls: list[torch.Size] = []

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(x.shape)
        return observed_norm(x, *rest)

    monkeypatch.setattr("stabnorm.monitor.fused.observed_norm", counted)
    return calls


def close(got: History, want: History) -> None:
    """To what two backends of the norms differ by after a few steps of training."""
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=2e-4, atol=2e-4, equal_nan=True, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["off", "reentrant", "non-reentrant"])
def test_the_history_is_that_of_one_who_looks_on(recompute: str, fused_calls: list[torch.Size]) -> None:
    plain = train(Net())
    assert not fused_calls
    net = Net(recompute)
    close(train(net, monitor=everything(net, fused=True), parts=2), plain)
    times = 1 if recompute == "off" else 2  # the last norm stands outside of the checkpoints
    assert len(fused_calls) == 7 * 2 * (6 * times + 1)


@pytest.mark.slow
def test_exactly_once_under_recompute_to_the_bit_of_the_same_kernels() -> None:
    nets = [Net(recompute) for recompute in ("off", "reentrant", "non-reentrant")]
    first, *others = (train(net, monitor=everything(net, fused=True)) for net in nets)
    for other in others:
        assert_same(other, first)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(37),
    "layer without a bias": lambda: nn.LayerNorm(37, bias=False),
    "layer without a gain": lambda: nn.LayerNorm(37, elementwise_affine=False),
    "layer over two axes": lambda: nn.LayerNorm((5, 37)),
    "rms": lambda: nn.RMSNorm(37),
    "rms with an eps": lambda: nn.RMSNorm(37, eps=0.1),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_output_and_gradients_are_torchs_to_rounding(
    name: str, dtype: torch.dtype, masked: bool, fused_calls: list[torch.Size]
) -> None:
    norm = MODULES[name]().to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    exact = copy.deepcopy(norm).double()
    exact.eps = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps
    x = (torch.randn(4, 6, 5, 37) / 5 if "eps" in name else 3 * torch.randn(4, 6, 5, 37) + 100).to(dtype)
    dy, mask = torch.randn(4, 6, 5, 37).to(dtype), torch.rand(x.shape[: 2 if "two" in name else 3]) < 0.7
    outcomes = []
    with StabilityMonitor(norm, fused=True, gradients=False):
        for module, kind in ((norm, dtype), (exact, torch.float64)):
            given = x.to(kind).requires_grad_()
            with valid_tokens(*[mask] * masked):
                y = module(given)
            outcomes.append([y, *torch.autograd.grad(y, [given, *module.parameters()], dy.to(kind))])
    # Of an RMSNorm without one, torch's eps is that of the dtype it computes in.
    assert fused_calls == ([] if name == "rms" and dtype == torch.bfloat16 else [x.shape])
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for got, want in zip(*outcomes, strict=True):
        scale = float(want.detach().abs().amax())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale)


def test_padding_has_an_output_and_does_not_count_and_a_row_does_not_depend_on_the_others() -> None:
    norm, x = nn.LayerNorm(20), torch.randn(9, 20)
    mask = torch.arange(9) < 4
    with StabilityMonitor(norm, fused=True) as monitor, valid_tokens(mask):
        whole = norm(x)
        spoilt = norm(torch.where(mask[:, None], x, torch.nan))
        monitor.step()
    torch.testing.assert_close(whole, nn.functional.layer_norm(x, (20,)))
    assert torch.equal(spoilt[:4], whole[:4])
    assert monitor.history()["tokens"].item() == 8
    assert monitor.history()["amax"].item() == x[:4].abs().amax()
    with StabilityMonitor(norm, fused=True):
        assert torch.equal(norm(x[3:5]), norm(x)[3:5])
        assert torch.equal(norm(torch.cat([x[:1] * torch.nan, x[1:]]))[1:], norm(x)[1:])


def test_a_second_derivative_goes_through_torch() -> None:
    norm, x, dy = nn.LayerNorm(11), torch.randn(7, 11), torch.randn(7, 11)
    nn.init.normal_(norm.weight)
    gradients = []
    for fused in (True, False):
        given = x.clone().requires_grad_()
        with StabilityMonitor(norm, fused=fused):
            (dx,) = torch.autograd.grad(norm(given), given, dy, create_graph=True)
        gradients.append(torch.autograd.grad(dx.square().sum(), [given, norm.weight]))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's, in forward mode
def test_a_batch_of_gradients_and_a_forward_derivative_are_torchs() -> None:
    norm, x = nn.LayerNorm(5), torch.randn(3, 5)
    nn.init.normal_(norm.weight)
    wanted = torch.autograd.functional.jacobian(norm, x)
    with StabilityMonitor(norm, fused=True, gradients=False):
        jacobian = torch.autograd.functional.jacobian(norm, x, vectorize=True)
        with torch.autograd.forward_ad.dual_level():
            dual = norm(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(jacobian, wanted)
    torch.testing.assert_close(tangent, torch.einsum("abcd,cd->ab", wanted, torch.ones_like(x)))


def test_a_hook_on_the_input_runs_once_in_a_second_derivative() -> None:
    norm, x, dy = nn.LayerNorm(5), torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    outcomes = []
    for fused in (False, True):
        given = x * 1.0
        given.register_hook(lambda g: 2 * g)
        with StabilityMonitor(norm, fused=fused):
            (dx,) = torch.autograd.grad(norm(given), x, dy, create_graph=True)
        outcomes.append(dx)
    torch.testing.assert_close(outcomes[1], outcomes[0])


def test_an_activation_in_place_may_follow(fused_calls: list[torch.Size]) -> None:
    norm, dy = nn.LayerNorm(8), torch.randn(5, 2, 8)
    x = torch.randn(5, 2, 8, requires_grad=True)
    wanted = torch.autograd.grad(norm(x).relu(), x, dy)[0]
    with StabilityMonitor(norm, fused=True):
        y = nn.functional.relu_(norm(x))
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], wanted, rtol=1e-4, atol=1e-5)
    assert len(fused_calls) == 1


class Own(nn.LayerNorm):
    """A subclass of a user, which may call torch's kernel for a part of its work."""


def replaced() -> nn.Module:
    norm = nn.LayerNorm(8)
    forward = norm.forward
    norm.forward = lambda input: 2 * forward(input)  # type: ignore[method-assign]
    return norm


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda: Own(8), torch.float32),
        (replaced, torch.float32),
        (lambda: nn.LayerNorm(8), torch.bfloat16),
        (lambda: nn.LayerNorm(8).double(), torch.float64),
    ],
    ids=["a subclass", "a replaced forward", "weights of another dtype", "float64"],
)
def test_what_is_not_torchs_own_runs_as_it_did_and_is_counted(
    make: Callable[[], nn.Module], dtype: torch.dtype, fused_calls: list[torch.Size]
) -> None:
    norm, x = make(), torch.randn(5, 8, dtype=dtype)
    wanted = norm(x)
    with StabilityMonitor(norm, fused=True) as monitor:
        assert torch.equal(norm(x), wanted)
        monitor.step()
    assert monitor.history()["tokens"].item() == 5
    assert not fused_calls


def test_eps_weight_and_shape_are_those_of_the_forward() -> None:
    norm, x = nn.LayerNorm(8), torch.randn(2, 3, 8) / 5
    with StabilityMonitor(norm, fused=True) as monitor:
        norm.eps = 1.0
        norm.weight = nn.Parameter(torch.randn(16)[::2])
        torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (8,), norm.weight, norm.bias, 1.0))
        norm.weight = nn.Parameter(torch.randn(2))
        with pytest.raises(RuntimeError, match="Expected weight to be of same shape"):
            norm(x)
        norm.weight = nn.Parameter(torch.ones(8))
        with pytest.raises(RuntimeError, match="Given normalized_shape"):
            norm(torch.randn(2, 8, 3))
        monitor.step()


def test_an_input_that_another_hook_changes_is_counted_as_it_was_seen(fused_calls: list[torch.Size]) -> None:
    norm, x = nn.LayerNorm(8), torch.randn(5, 8)
    with StabilityMonitor(norm, fused=True) as monitor, valid_tokens(torch.arange(5) < 3):
        handle = norm.register_forward_pre_hook(lambda module, args: (args[0].repeat(9, 1) * 3,))
        assert norm(x).shape == (45, 8)
        handle.remove()
        monitor.step()
    assert monitor.history()["tokens"].item() == 3
    assert monitor.history()["amax"].item() == x[:3].abs().amax()
    assert not fused_calls


def test_a_replica_is_counted(fused_calls: list[torch.Size]) -> None:
    norm, x = nn.LayerNorm(8), torch.randn(5, 8)
    with StabilityMonitor(norm, fused=True) as monitor:
        replica = norm._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.weight, replica.bias = norm.weight, norm.bias  # as nn.DataParallel does
        replica(x)
        norm(x)
        monitor.step()
    assert monitor.history()["tokens"].item() == 10
    assert len(fused_calls) == 1


def test_the_norms_are_found_while_they_are_watched(fused_calls: list[torch.Size]) -> None:
    from stabnorm import find_norms

    net = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8))
    with StabilityMonitor(net, fused=True):
        assert [norm.kind for norm in find_norms(net)] == ["layer", "rms"]
        with StabilityMonitor(net, fused=True) as second:
            net[1](x=net[0](input=torch.randn(5, 8)))
            second.step()
    assert second.history()["tokens"].tolist() == [[5, 5]]
    assert len(fused_calls) == 2
    with StabilityMonitor(net), StabilityMonitor(net, fused=True) as second:
        net(torch.randn(5, 8))
        second.step()
    assert second.history()["tokens"].tolist() == [[5, 5]]
    assert len(fused_calls) == 4


def test_a_monitor_that_is_forgotten_holds_no_model() -> None:
    import gc
    import weakref

    norm = nn.LayerNorm(8)
    monitor = StabilityMonitor(norm, fused=True, gradients=False)
    monitor.attach()
    alive = weakref.ref(norm)
    del norm, monitor
    gc.collect()
    assert alive() is None


def test_under_autocast_a_low_precision_input_is_torchs_and_counted(fused_calls: list[torch.Size]) -> None:
    norm, x = nn.LayerNorm(8), torch.randn(5, 8)
    with StabilityMonitor(norm, fused=True) as monitor, torch.autocast("cpu", torch.bfloat16):
        norm(x.bfloat16())
        assert not fused_calls
        norm(x)
        assert len(fused_calls) == 1
        monitor.step()
    assert monitor.history()["tokens"].item() == 10


def test_evaluation_runs_torchs_norm_and_is_not_counted(fused_calls: list[torch.Size]) -> None:
    norm, x = nn.LayerNorm(8), torch.randn(5, 8)
    wanted = norm(x)
    with StabilityMonitor(norm, fused=True) as monitor:
        norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError()) if len(fused_calls) else None)
        norm(x)
        with pytest.raises(KeyError):
            norm(x)  # handed over, and then the forward never came
        norm._forward_pre_hooks.popitem()
        assert torch.equal(norm.eval()(x), wanted)
        norm.train()
        monitor.step()
    assert len(fused_calls) == 1
    assert monitor.history()["tokens"].item() == 5
    assert torch.equal(norm(x), wanted)
    assert type(norm) is nn.LayerNorm


def test_without_a_kernel_no_bit_changes(fused_calls: list[torch.Size]) -> None:
    norm, x = nn.LayerNorm(8), torch.randn(5, 8)
    wanted = norm(x)
    with use_kernels("aten"), StabilityMonitor(norm, fused=True):
        assert torch.equal(norm(x), wanted)
    assert not fused_calls


def test_a_compiled_model_keeps_its_own_norms_in_one_graph(fused_calls: list[torch.Size]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))
    run = torch.compile(net, backend=counter, fullgraph=True)
    with StabilityMonitor(net, fused=True) as monitor:
        for _ in range(3):
            run(torch.randn(5, 8)).backward(torch.randn(5, 8))
            monitor.step()
    assert monitor.history()["tokens"].tolist() == [[5, 5]] * 3
    assert counter.frame_count == 1
    assert not fused_calls
    torch._dynamo.reset()


def test_two_monitors_both_see_and_one_may_leave_first(fused_calls: list[torch.Size]) -> None:
    norm, x = nn.LayerNorm(8), torch.randn(5, 8)
    first, second = StabilityMonitor(norm, fused=True), StabilityMonitor(norm, fused=True)
    first.attach()
    second.attach()
    norm(x)
    first.step()
    first.detach()
    norm(x)
    second.step()
    second.detach()
    assert first.history()["tokens"].item() == 5
    assert second.history()["tokens"].item() == 10
    assert type(norm) is nn.LayerNorm
    assert len(fused_calls) == 1


def test_a_copy_and_a_file_hold_torchs_norm(fused_calls: list[torch.Size]) -> None:
    norm, x = nn.LayerNorm(8), torch.randn(5, 8)
    with StabilityMonitor(norm, fused=True):
        for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert type(other) is nn.LayerNorm
            assert torch.equal(other(x), nn.functional.layer_norm(x, (8,)))
    assert not fused_calls
