"""The kernel of `ops.observed` equals the formulas in float64; see tests/triton_kernels.py."""

import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.functional import RawMoments, empty_moments
from stabnorm.functional.moments import COV_XN, MAX, MIN, VAR_N, VAR_X
from stabnorm.ops import use_kernels
from stabnorm.ops.accumulators import empty_accumulators, merge_accumulators
from stabnorm.ops.moments import accumulate_moments_
from stabnorm.ops.observed import Spec, backend_for, norm_with_moments, observed_norm, splits_for
from stabnorm.ops.selftest import Case, checks_of, truth
from tests.triton_kernels import DEVICE, MARKS, assert_close, nan_in_new_memory, random_rows

pytestmark = MARKS
__all__ = ["nan_in_new_memory"]
CASES = [
    ((83, 70), torch.float32, 0.0, True),
    ((41, 33), torch.float32, 1e4, False),
    ((30, 150), torch.bfloat16, 0.0, True),
    ((9, 1), torch.float16, 0.0, False),
    ((3, 1100), torch.float32, 0.0, False),
]


@pytest.mark.parametrize("kind", [0, 1], ids=["layer", "rms"])
@pytest.mark.parametrize(("shape", "dtype", "offset", "masked"), CASES, ids=str)
def test_norm_moments_and_gradients_in_two_forwards(
    shape: tuple[int, int], dtype: torch.dtype, offset: float, masked: bool, kind: int
) -> None:
    x, dy = random_rows(*shape, dtype, offset), random_rows(*shape, dtype)
    valid = (torch.rand(shape[0]) < 0.7).to(DEVICE) if masked else None
    if valid is not None:
        valid[:5], valid[-1] = False, True  # a tile without a valid row
        x[~valid], dy[~valid] = torch.nan, 0
    case = Case("", x, dy, valid, torch.randn(6, shape[1]).to(DEVICE))
    check = checks_of(norm_with_moments)[kind]
    wanted = truth(check, case)
    with use_kernels("triton"):
        once, again = (check(case) for _ in range(2))
    for name, (got, _, of_rows) in once.items():
        want, natural, _ = wanted[name]
        in_dtype = got.to(dtype if of_rows else torch.float32)
        assert_close(in_dtype, want, natural, of_rows=of_rows)
        assert torch.equal(got.nan_to_num(0.5), again[name][0].nan_to_num(0.5)), name


def test_other_channels_of_a_wider_slab_are_left_alone_and_a_plain_forward_adds_to_the_same_accumulator() -> None:
    x, more = random_rows(30, 20), random_rows(9, 20)
    weight = torch.randn(40, device=DEVICE)[::2]  # neighbours apart
    with use_kernels("triton"):
        accumulators = empty_accumulators(2, 50, DEVICE, splits_for(50, DEVICE))
        into = RawMoments(accumulators.seen[1], accumulators.channel[1, ..., :20], accumulators.token[1])
        spec = Spec("layer", (20,), 1e-5, True, True)
        backend = backend_for(x, weight, None, spec, into)
        assert backend == "triton"
        y = observed_norm(x, weight, None, spec, None, into, backend)
        accumulate_moments_(more, None, *into, "layer", -1)
        merged = merge_accumulators(accumulators)
    assert_close(y, nn.functional.layer_norm(x.double(), (20,), weight.double()), 3.0, of_rows=True)
    assert merged.seen.tolist() == [0, 39]
    assert bool((merged.channel[1, :, 20:] == 0).all())
    alone = RawMoments(*(part[0] for part in empty_moments(1, 20, DEVICE)))
    with use_kernels("reference"):
        accumulate_moments_(torch.cat([x, more]), None, *alone, "layer", -1)
    spreads, extremes = [VAR_X, COV_XN, VAR_N], [MAX, MIN]
    assert_close(merged.channel[1, spreads, :20], alone.channel[spreads], 3.0)
    assert torch.equal(merged.channel[1, extremes, :20], alone.channel[extremes])
    assert_close(merged.token[1], alone.token, 3.0)


def test_a_monitor_that_runs_the_norms_sees_what_one_sees_that_looks_on() -> None:
    histories, weights = [], []
    for setting, fused in (("triton", True), ("reference", False)):
        torch.manual_seed(1)
        net = nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 12), nn.RMSNorm(12)).to(DEVICE)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with use_kernels(setting), StabilityMonitor(net, flush_every=2, fused=fused) as monitor:
            for _ in range(2):
                for size in (15, 4):  # two forwards a step
                    net(torch.randn(size, 20).to(DEVICE)).backward(torch.randn(size, 12).to(DEVICE))
                optimizer.step()
                optimizer.zero_grad()
                monitor.step()
            histories.append(monitor.history())
        weights.append([parameter.detach().clone() for parameter in net.parameters()])
    for name, values in histories[0].items():
        torch.testing.assert_close(values, histories[1][name], rtol=1e-4, atol=1e-5, equal_nan=True)
    for got, want in zip(*weights, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
