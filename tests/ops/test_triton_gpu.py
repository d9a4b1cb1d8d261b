"""The kernels on a GPU, at full size: `pytest -m gpu`. Skipped where there is none.

The first test is the selftest, which records the device: from then on `auto` uses the kernels there. What needs no size
is in the other test_triton_*.py, which on a GPU run for real.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, functional
from stabnorm.functional import RawMoments
from stabnorm.functional.moments import MAX, REST_X, SHIFT_X, VAR_N, VAR_X
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from stabnorm.ops import dispatch, use_kernels
from stabnorm.ops.accumulators import empty_accumulators, merge_accumulators
from stabnorm.ops.dispatch import all_ops
from stabnorm.ops.moments import accumulate_moments_
from stabnorm.ops.observed import NormKind, Spec, backend_for, observed_norm, splits_for
from stabnorm.ops.rows import BatchMap, gradient_of_rows, moments_of_rows, sums_of_rows
from stabnorm.ops.selftest.__main__ import main
from tests.triton_kernels import DTYPES, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = [(16384, 768), (50432, 192), (1031, 4097), (7, 16384)]
NORMS: dict[str, Callable[[], nn.Module]] = {
    "RepBN": lambda: RepBN(384),
    "UnifiedNorm": lambda: UnifiedNorm(384, warmup_steps=0),
    "PowerNorm": lambda: PowerNorm(384, warmup_steps=0),
    "PowerNorm, groups": lambda: PowerNorm(384, groups=6, warmup_steps=0),
    "PRepBN": lambda: half_way(),
}


def half_way() -> nn.Module:
    norm = PRepBN(384)
    norm.lam.fill_(0.4)
    return norm


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_selftest_passes_and_the_device_is_recorded() -> None:
    assert main(["--device", "cuda:0"]) == 0
    with use_kernels("auto"):
        runs = {line.op: line.runs for line in dispatch.backends(["cuda:0"])}
    assert {runs.pop(name) for name in ("blended_norm", "blended_sums", "blended_gradient")} == {"reference"}  # opt-in
    assert {runs.pop(name) for name in ("add_detail_", "outliers_of_rows")} == {"reference"}  # for CPUs only
    assert set(runs.values()) == {"triton"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_full_size_equals_float64_and_is_the_same_every_time(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, dy = (torch.randn(size, device="cuda", dtype=dtype) * 2 + 3 for _ in range(2))
    valid = torch.rand(size[0], device="cuda") < 0.9
    scale, slope, offset = torch.randn(3, size[1], device="cuda").unbind()
    with use_kernels("triton"):
        once, again = (moments_of_rows(x, valid, center=True) for _ in range(2))
        sums, repeated = (sums_of_rows(dy, x, once.mean, valid) for _ in range(2))
        dx = gradient_of_rows(dy, x, valid, BatchMap(scale, slope, offset, once.mean))
        accumulators = empty_accumulators(1, size[1], x.device)
        seen, accumulator, token = (part[0] for part in accumulators)
        accumulate_moments_(x, valid, seen, accumulator, token, "layer", -1)
        channel = merge_accumulators(accumulators).channel[0].double()
    want = functional.batch_moments(x.double(), valid, center=True)
    assert once.mean is not None
    assert again.mean is not None
    assert want.mean is not None
    assert torch.equal(once.mean, again.mean)
    assert torch.equal(once.square, again.square)
    assert all(map(torch.equal, sums, repeated))
    assert_close(once.square, want.square)
    assert_close(once.mean, want.mean)
    assert_close(channel[VAR_X].float(), want.square)
    assert_close((channel[SHIFT_X] + channel[REST_X]).float(), want.mean)
    deviations = x.double() - once.mean
    exact = functional.upstream_sums(dy.double(), deviations, valid)
    for got, truth in zip(sums, exact, strict=True):
        assert_close(got, truth, size[0] ** 0.5 * 20)
    natural = (dy.double() * scale).abs() + (deviations * slope).abs() + offset.abs()
    truth = functional.input_gradient(dy.double(), deviations, valid, scale, slope, offset)
    assert_close(dx, truth, natural, of_rows=True)


@pytest.mark.parametrize("name", list(NORMS))
def test_a_compiled_norm_is_one_graph_with_the_kernels_in_it(name: str) -> None:
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        norm = NORMS[name]().cuda()
        call = torch.compile(norm, fullgraph=True) if compiled else norm
        with use_kernels("triton"):
            x = torch.randn(4, 300, 384, device="cuda", requires_grad=True)
            y = call(x)
            gradients = torch.autograd.grad(y, [x, *norm.parameters()], torch.randn_like(y))
        outcomes.append([y.detach(), *gradients])
    for eager, fused in zip(*outcomes, strict=True):
        torch.testing.assert_close(fused, eager, rtol=2e-5, atol=2e-5 * float(eager.abs().amax() + 1))


def test_moving_lam_compiles_nothing_anew() -> None:
    norm = PRepBN(384).cuda()
    compiled = torch.compile(norm, fullgraph=True)
    with use_kernels("triton"), torch.compiler.set_stance("default"):
        compiled(torch.randn(8, 384, device="cuda")).sum().backward()
        with torch.compiler.set_stance("fail_on_recompile"):
            for lam in (0.7, 0.0):
                norm.lam.fill_(lam)
                compiled(torch.randn(8, 384, device="cuda")).sum().backward()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(16384, 768), (50432, 192), (1031, 4095)], ids=str)
def test_a_norm_with_its_moments_equals_float64_at_full_size(
    size: tuple[int, int], dtype: torch.dtype, kind: NormKind
) -> None:
    x, dy = (torch.randn(size, device="cuda", dtype=dtype) * 2 + 3 for _ in range(2))
    weight = torch.randn(size[1], device="cuda", dtype=dtype).requires_grad_()
    valid, spec = torch.rand(size[0], device="cuda") < 0.9, Spec(kind, (size[1],), 1e-5, True, True)
    given, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    with use_kernels("triton"):
        accumulators = empty_accumulators(1, size[1], x.device, splits_for(size[1], x.device))
        into = RawMoments(*(part[0] for part in accumulators))
        backend = backend_for(given, weight, None, spec, into)
        assert backend == "triton"
        y = observed_norm(given, weight, None, spec, valid, into, backend)
        dx, of_weight = torch.autograd.grad(y, [given, weight], dy)
        merged = merge_accumulators(accumulators)
    gain = weight.detach().double().requires_grad_()
    want = functional.normalize_tokens(wide, kind, 1e-5) * gain
    wanted_dx, wanted_weight = torch.autograd.grad(want, [wide, gain], dy.double())
    assert_close(y, want, gain.abs(), of_rows=True)
    assert_close(dx, wanted_dx, float(wanted_dx.abs().amax()), of_rows=True)
    assert_close(of_weight, wanted_weight, size[0] ** 0.5 * 20, of_rows=True)
    moments = functional.raw_moments(x.double(), kind, 1e-5, valid=valid)
    assert int(merged.seen) == int(moments.seen)
    assert_close(merged.channel[0, VAR_X : VAR_N + 1], moments.channel[VAR_X : VAR_N + 1], 10.0)
    assert torch.equal(merged.channel[0, MAX:].double(), moments.channel[MAX:])
    assert_close(merged.token[0], moments.token, 3.0)


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize(("setting", "fused"), [("auto", False), ("triton", False), ("triton", True)])
def test_a_monitored_loop_never_waits_for_the_device(setting: str, fused: bool) -> None:
    net = nn.Sequential(
        nn.Linear(64, 384), *(make() for make in NORMS.values()), nn.LayerNorm(384), nn.RMSNorm(384), nn.Linear(384, 8)
    ).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    batches = torch.randn(40, 6, 50, 64, device="cuda")
    with use_kernels(setting), StabilityMonitor(net, flush_every=8, fused=fused) as monitor:
        for number, batch in enumerate(batches):
            if number == 3:  # the first steps compile and allocate
                torch.cuda.set_sync_debug_mode("error")
            loss = net(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)
        torch.cuda.set_sync_debug_mode("default")
        history = monitor.history()
    assert history["amax"].shape == (40, len(monitor.layers))
    assert torch.isfinite(history["amax"]).all()


@pytest.mark.parametrize("name", list(NORMS))
def test_a_captured_step_replays(name: str) -> None:
    torch.manual_seed(0)
    norm, other = NORMS[name]().cuda(), NORMS[name]().cuda()
    other.load_state_dict(norm.state_dict())
    x, dy = torch.randn(2, 500, 384, device="cuda").unbind()
    given = x.clone().requires_grad_()

    def step(module: nn.Module) -> tuple[Tensor, Tensor]:
        y = module(given)
        return y, torch.autograd.grad(y, given, dy)[0]

    with use_kernels("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(norm)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(norm)
        for _ in range(3):
            step(other)
        for number in range(3):
            with torch.no_grad():
                given.copy_(torch.randn_like(x) + number)
            graph.replay()
            eager = step(other)
            for a, b in zip(captured, eager, strict=True):
                assert torch.equal(a, b)
    for a, b in zip(norm.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_the_ops_tell_the_truth_about_themselves() -> None:
    x, vector = torch.randn(40, 70, device="cuda"), torch.randn(70, device="cuda")
    valid, lam = torch.rand(40, device="cuda") < 0.5, torch.tensor(0.3, device="cuda")
    all_ops()  # registers what is imported late

    ops = torch.ops.stabnorm
    for op, arguments in (
        (ops.triton_moments_of_rows, (x, valid, True)),
        (ops.triton_sums_of_rows, (x, x, vector, valid)),
        (ops.triton_affine_of_rows, (x, vector, None)),
        (ops.triton_gradient_of_rows, (x, x, valid, vector, vector, None, vector)),
        (ops.triton_blended_norm, (lam, x, vector, None, 1e-5, vector, vector)),
        (ops.triton_scale_groups, (x, 7, 1e-5)),
        (ops.triton_norm_gradient, (x, x, vector, x[:, 0].contiguous(), x[:, 1].contiguous(), False)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
