"""RepBN's running statistics in one launch equal those in many."""

import pytest
import torch

from stabnorm.nn import RepBN
from stabnorm.ops import use_kernels
from stabnorm.ops.running import track_batch_
from stabnorm.ops.selftest import Case, checks_of, truth
from tests.triton_kernels import DEVICE, MARKS, assert_close, nan_in_new_memory, random_rows

pytestmark = MARKS
__all__ = ["nan_in_new_memory"]


@pytest.mark.parametrize("channels", [1, 1500])
def test_three_batches_one_of_them_not_finite(channels: int) -> None:
    case = Case("", random_rows(2, channels), random_rows(2, channels), None, torch.randn(6, channels).to(DEVICE))
    check = checks_of(track_batch_)[0]
    wanted = truth(check, case)
    with use_kernels("triton"):
        results = check(case)
    for name, (got, natural, _) in results.items():
        assert_close(got.float(), wanted[name][0], natural)


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
