"""The largest singular value of matrices, from where the last power iteration ended."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def power_step(matrices: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    r"""Make one power iteration.

    .. math:: v = \frac{W^T u}{|W^T u|}, \qquad u' = \frac{W v}{|W v|}

    Args:
        matrices: ``[P, outputs, inputs]``.
        left: ``[P, outputs]``, of length 1 each, u.

    Returns:
        The next left and right vectors.

    >>> left, right = power_step(torch.diag(torch.tensor([2.0, 1.0]))[None], torch.tensor([[1.0, 0.0]]))
    >>> top_value(torch.diag(torch.tensor([2.0, 1.0]))[None], left, right)
    tensor([2.])
    """
    right = normalize(torch.einsum("poi,po->pi", matrices, left), dim=-1)
    return normalize(torch.einsum("poi,pi->po", matrices, right), dim=-1), right


def top_value(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    r"""Return :math:`u^T W v` of each matrix, ``[P]``: the largest singular value where the vectors have converged."""
    return torch.einsum("po,poi,pi->p", left, matrices, right)


_EXACT = 1024  # a smaller matrix is decomposed, a larger one iterated
_WIDTH, _ROUNDS = 16, 40


@torch.no_grad()
def top_vectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left and right vectors of the largest singular value of each matrix ``[P, outputs, inputs]``.

    Large matrices are iterated with a block of vectors; no random state is used.
    """
    if min(matrices.shape[1:]) <= _EXACT:
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        return u[..., 0].contiguous(), vh[..., 0, :].contiguous()
    start = torch.randn(matrices.shape[-1], _WIDTH, generator=torch.Generator().manual_seed(0))
    block = start.to(matrices).expand(len(matrices), -1, -1)
    for _ in range(_ROUNDS):
        block = torch.linalg.qr(matrices.mT @ (matrices @ block)).Q
    image = matrices @ block
    u, _, wh = torch.linalg.svd(image, full_matrices=False)
    return u[..., 0].contiguous(), torch.einsum("piw,pw->pi", block, wh[..., 0, :])
