"""The C++ backend of `groups`, see `rows.cpp`. Its functions are ops, so that compiled graphs can call them."""

import torch
from torch import Tensor

from stabnorm._registration import registered
from stabnorm.ops.cpp.library import call, empty_like, like, shape_of
from stabnorm.ops.groups import gradient_of_groups, scaled_groups


@scaled_groups.backend("cpp", in_graphs=True)
@registered(
    lambda rows, groups, eps: (empty_like(rows), rows.new_empty(len(rows), groups, dtype=torch.float32)),
)
def cpp_scale_groups(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """See `functional.scale_groups`; also return the factors."""
    rows = rows.contiguous()
    y, r = empty_like(rows), rows.new_empty(len(rows), groups, dtype=torch.float32)
    call("scale_groups", rows, *shape_of(rows), groups, eps, torch.get_num_threads(), y, r)
    return y, r


@gradient_of_groups.backend("cpp", in_graphs=True)
@registered(lambda dy, y, r, masked: empty_like(y))
def cpp_gradient_of_groups(dy: Tensor, y: Tensor, r: Tensor, masked: bool) -> Tensor:
    """See `ops.groups.gradient_of_groups`; if all of dy is 0, so is dx."""
    dx = empty_like(y)
    call("scale_groups_gradient", like(y, dy), y, *shape_of(y), r.shape[1], r, torch.get_num_threads(), dx)
    return dx
