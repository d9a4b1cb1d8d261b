"""PowerNorm in one pass: the kernels equal the formulas, and so does a module that trains through its warm-up."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stabnorm.nn import PowerNorm, _one_pass
from stabnorm.ops import use_kernels
from stabnorm.ops.one_pass import affine_with_square
from stabnorm.ops.selftest import Case, checks_of, truth
from tests.triton_kernels import DEVICE, MARKS, assert_close, nan_in_new_memory, random_rows

pytestmark = MARKS
__all__ = ["nan_in_new_memory"]


@pytest.mark.parametrize(
    ("shape", "dtype", "masked"),
    [((83, 70), torch.float32, True), ((40, 33), torch.bfloat16, False), ((1, 3), torch.float16, True)],
    ids=str,
)
def test_a_map_and_the_sums_of_what_it_reads(shape: tuple[int, int], dtype: torch.dtype, masked: bool) -> None:
    x, dy = random_rows(*shape, dtype), random_rows(*shape, dtype)
    valid = (torch.rand(shape[0]) < 0.7).to(DEVICE) if masked else None
    if valid is not None:
        valid[-1] = True
        x[~valid], dy[~valid] = torch.nan, 0
    case = Case("", x, dy, valid, torch.randn(6, shape[1]).to(DEVICE))
    (check,) = checks_of(affine_with_square)
    wanted = truth(check, case)
    with use_kernels("triton"):
        results = check(case)
    for name, (got, _, of_rows) in results.items():
        want, natural, _ = wanted[name]
        assert_close(got.to(dtype if of_rows else torch.float32), want, natural, of_rows=of_rows)


def trained(setting: str, dtype: torch.dtype, masked: bool, recompute: bool) -> dict[str, Tensor]:
    """Five steps, two of them in the warm-up and one that is not finite."""
    torch.manual_seed(1)
    norm = PowerNorm(20, warmup_steps=2).to(DEVICE)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.3)
    norm.to(dtype)
    results: dict[str, Tensor] = {}
    for step in range(5):
        x = random_rows(30, 20).to(dtype).requires_grad_()
        dy = torch.randn(30, 20).to(DEVICE, dtype)
        mask = (torch.rand(30) < 0.8).to(DEVICE) if masked else None
        if step == 3:
            with torch.no_grad():
                x[4, 3] = torch.nan
            if mask is not None:
                mask[4] = True
        with use_kernels(setting):
            y = checkpoint(norm, x, mask, use_reentrant=False) if recompute else norm(x, mask)
            gradients = torch.autograd.grad(y, [x, *norm.parameters()], dy)
        if step != 3:
            results |= {f"{step} {i}": t.detach() for i, t in enumerate((y, *gradients))}
    return results | {name: buffer for name, buffer in norm.named_buffers() if name != "recent"}


def test_past_the_warm_up_nothing_is_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    right: dict[str, list[bool]] = {"redo_affine_": [], "redo_gradient_": []}
    for name, flags in right.items():
        own = getattr(_one_pass, name)
        monkeypatch.setattr(_one_pass, name, lambda *a, own=own, flags=flags: (flags.append(bool(a[1])), own(*a)))
    trained("triton", torch.float32, masked=False, recompute=False)
    assert right == {
        "redo_affine_": [False, False, True, True, True],
        "redo_gradient_": [False, False, True, True, True],
    }


@pytest.mark.parametrize(("masked", "recompute"), [(False, False), (True, False), (False, True)])
def test_a_module_trains_as_with_the_formulas(masked: bool, recompute: bool) -> None:
    got = trained("triton", torch.float32, masked, recompute)
    for name, want in trained("reference", torch.float64, masked, False).items():
        if want.dtype.is_floating_point:
            assert_close(got[name].float(), want, 4 * float(want.abs().amax()) + 1)
        else:
            assert torch.equal(got[name], want), name
