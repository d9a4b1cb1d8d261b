"""The Triton backend of `blend`: one kernel over elements; lam stays on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from stabnorm.ops.blend import blend, join_gradients
from stabnorm.ops.triton.shared import blended, traceable

_FLAT = 4096  # elements per program


@triton.jit
def _elements(lam_ptr, a_ptr, b_ptr, out_ptr, size, ADD: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    lam = tl.load(lam_ptr).to(tl.float32)
    a = tl.load(a_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    if ADD:
        out = tl.where(lam == 1, a, tl.where(lam == 0, b, a + b))
    else:
        out = blended(lam, a, b)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=at < size)


@triton_op("stabnorm::triton_blend", mutates_args={})
def _elements_op(lam: Tensor, a: Tensor, b: Tensor, add: bool) -> Tensor:
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    traceable(_elements)[(triton.cdiv(a.numel(), _FLAT),)](lam, a, b, out, a.numel(), ADD=add, SIZE=_FLAT)
    return out


@blend.backend("triton", in_graphs=True)
def blend_elements(lam: Tensor, norm: Tensor, rep: Tensor) -> Tensor:
    """See `functional.blend`."""
    return _elements_op(lam, norm.contiguous(), rep.contiguous(), False)


@join_gradients.backend("triton", in_graphs=True)
def join_elements(lam: Tensor, of_norm: Tensor, of_rep: Tensor) -> Tensor:
    """See `functional.join_gradients`."""
    return _elements_op(lam, of_norm.contiguous(), of_rep.contiguous(), True)
