"""Whether a folded model computes what the model did."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stabnorm._models.examples import Example, run
from stabnorm._models.outputs import Picker, tensors_in

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

Outputs = list[list[Tensor]]


def run_all(model: nn.Module, examples: Sequence[Example], outputs: Picker) -> Outputs:
    """Run the model on each example, and list the floating tensors it returns, each in plain memory."""
    returned = []
    for example in examples:
        tensors = map(_plain, tensors_in(run(model, example), outputs))
        returned.append([t for t in tensors if t.is_floating_point()])
    return returned


def _plain(t: Tensor) -> Tensor:
    """Give the numbers of a sparse or nested tensor in plain memory, and complex ones as pairs of reals."""
    if t.is_nested:
        t = torch.cat([part.flatten() for part in t.unbind()])
    t = t if t.layout == torch.strided else t.to_dense()
    if t.itemsize == 1 and t.is_floating_point():
        return t.float()  # float8 has no arithmetic
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def largest_error(outputs: Outputs, expected: Outputs) -> float:
    """Give the largest difference, relative to the largest element that differs; inf where one is not finite.

    The elements of one output on all inputs are one scale: on a single row an output may be close to 0 by chance.
    """
    differences: dict[int, list[float]] = {}
    sizes: dict[int, list[float]] = {}
    for tensors, references in zip(outputs, expected, strict=True):
        if [t.shape for t in tensors] != [t.shape for t in references]:
            return float("inf")
        for number, (t, reference) in enumerate(zip(tensors, references, strict=True)):
            if t.numel():
                wide, other = t.double(), reference.double()
                same = (wide == other) | (wide.isnan() & other.isnan())
                differences.setdefault(number, []).append(float(torch.where(same, 0.0, (wide - other).abs()).max()))
                sizes.setdefault(number, []).append(float(_size(other, same)))
    worst = 0.0
    for number, largest in differences.items():
        error = max(largest) / max(*sizes[number], 1e-300)
        if error != error or any(value != value for value in largest):
            return float("inf")
        worst = max(worst, error)
    return worst


def _size(reference: Tensor, same: Tensor) -> Tensor:
    """Give the largest element that differs, not the -1e9 that masks a logit: beside that no fault would show."""
    finite = reference.isfinite()
    if not bool(finite.any()):
        return reference.new_ones(())
    differing = reference[finite & ~same].abs()
    usual = reference[finite].abs().median()
    return torch.maximum(differing.max(), usual) if len(differing) else usual


def finite(outputs: Sequence[Tensor]) -> bool:
    """Whether there is a finite number in the outputs, and no NaN."""
    return any(bool(t.isfinite().any()) for t in outputs) and not any(bool(t.isnan().any()) for t in outputs)


class Precision(TorchDispatchMode):
    """Records the lowest floating precision that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.dtype in TOLERANCE and TOLERANCE[t.dtype] > TOLERANCE[self.lowest]:
                self.lowest = t.dtype
        return out
