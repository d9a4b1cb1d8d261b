"""A second input made from an example, to verify a fold on."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stabnorm._models.examples import Example


def redrawn(example: Example, seed: int = 0) -> Example:
    """Make another input of these shapes: other floats, with another mean and scale, and shuffled integers.

    Masks and scalars stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(t: Tensor) -> Tensor:
        if t.is_nested or t.layout != torch.strided or (t.itemsize == 1 and t.is_floating_point()):
            return t  # its elements cannot be drawn anew, or it has no arithmetic, as float8
        if t.is_complex():
            return torch.view_as_complex(change(torch.view_as_real(t.resolve_conj())))
        if t.ndim == 0 or not t.numel() or t.dtype == torch.bool or _is_mask(t):
            return t
        if t.is_floating_point():
            finite = t[torch.isfinite(t)].double()
            mean, scale = finite.mean(), finite.std(correction=0)
            scale = scale if scale > 0 else scale + 1
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
            return (mean + 0.7 * scale + 1.6 * scale * noise).to(t.dtype)
        order = torch.randperm(t.numel(), generator=generator).to(t.device)
        return t.flatten()[order].view(t.shape)

    return example.map(change)


def is_same(one: Example, other: Example) -> bool:
    """Whether the two hold the same tensors, not just equal ones."""
    tensors, others = (pytree.tree_leaves((example.args, example.kwargs)) for example in (one, other))
    return all(t is u for t, u in zip(tensors, others, strict=True))


def _is_mask(t: Tensor) -> bool:
    values = torch.unique(t)
    return values.numel() == 2 and bool(((values == 0) | (values == 1) | (values < -1e3)).all())


def cast(example: Example, dtype: torch.dtype) -> Example:
    """Convert the floating tensors to another precision."""
    return example.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
