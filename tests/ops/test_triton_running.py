"""The running statistics of the norms in one launch equal those in many."""

from typing import Any

import pytest
import torch

from stabnorm.nn import RepBN
from stabnorm.ops import use_kernels
from stabnorm.ops.dispatch import Op
from stabnorm.ops.running import (
    quadratic_gradient_,
    smooth_gradient_,
    smooth_square_,
    track_batch_,
    track_quadratic_,
)
from stabnorm.ops.selftest import Case, checks_of, failures, truth
from tests.triton_kernels import DEVICE, MARKS, assert_close, nan_in_new_memory, random_rows

pytestmark = MARKS
__all__ = ["nan_in_new_memory"]


@pytest.mark.parametrize("channels", [1, 1500])
@pytest.mark.parametrize(
    "op",
    [track_batch_, smooth_square_, smooth_gradient_, track_quadratic_, quadratic_gradient_],
    ids=lambda op: op.name,
)
def test_batches_that_are_refused_and_some_that_are_not(op: Op[..., Any], channels: int) -> None:
    case = Case("", random_rows(2, channels), random_rows(2, channels), None, torch.randn(6, channels).to(DEVICE))
    for check in checks_of(op):
        assert failures(check, "triton", case, truth(check, case)) == []


@pytest.mark.parametrize("counting", [True, False])
def test_a_module_of_one_token_no_token_and_some(counting: bool) -> None:
    states = []
    for setting, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        norm = RepBN(6).to(DEVICE, dtype)
        norm.counts_steps = counting
        for tokens in (4, 1, 0, 7):
            mask = torch.arange(8, device=DEVICE) < tokens
            torch.manual_seed(tokens)
            with use_kernels(setting):
                norm(torch.randn(8, 6).to(DEVICE, dtype), mask)
        states.append(dict(norm.named_buffers()))
    for name, got in states[0].items():
        assert_close(got.float(), states[1][name])
    assert states[0]["skips"] == 2
    assert states[0]["step"] == (4 if counting else 0)
