"""`SigmaReparam`: the weight of a linear layer with a learnable largest singular value (arXiv 2303.06296)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from stabnorm.functional.spectral import top_value, top_vectors
from stabnorm.nn.mixed_in import ComputedWeights
from stabnorm.ops.power_step import power_step_


class SigmaReparam(ComputedWeights):
    r"""A mixin over a layer with a weight, see `stabnorm.remedies.sigma_reparametrize`.

    .. math:: \hat W = g\, \frac{\sigma_0}{\sigma(W)}\, W, \qquad \sigma(W) = u^T W v

    The vectors u and v are constants for the gradient, and every forward in training makes one power iteration.
    :math:`\sigma_0` is the largest singular value at the start, so that g = 1 changes nothing, in any precision.

    Attributes:
        sigma_gain: g, ``[P]``, trained; P is 3 where queries, keys and values are one weight, else 1.
        sigma_start: :math:`\sigma_0`, ``[P]``.
        sigma_left: u, ``[P, outputs / P]``.
        sigma_right: v, ``[P, inputs]``.
        sigma_transposed: whether the weight is ``[inputs, outputs]``, as in Hugging Face's Conv1D.
    """

    adds: ClassVar[tuple[str, ...]] = (
        "sigma_gain", "sigma_start", "sigma_left", "sigma_right", "sigma_transposed", "sigma_weight",
    )  # fmt: skip
    sigma_gain: Tensor
    sigma_start: Tensor
    sigma_left: Tensor
    sigma_right: Tensor
    sigma_transposed: bool
    sigma_weight: str

    def adopt(self, weight: str, parts: int, transposed: bool) -> None:
        """Add gain and buffers to a module whose class was set to this mixin over its own."""
        self.sigma_weight, self.sigma_transposed = weight, transposed
        parameter = self._parameters[weight]
        assert parameter is not None
        self.register_parameter("sigma_gain", nn.Parameter(parameter.new_ones(parts), parameter.requires_grad))
        left, right = top_vectors(self._matrices(parameter.detach(), parts))
        self.register_buffer("sigma_start", left.new_ones(parts))
        self.register_buffer("sigma_left", left)
        self.register_buffer("sigma_right", right)
        self._keep_start(parameter)

    @torch.no_grad()
    def begin(self) -> None:
        """Start again from the weight as it is, with a gain of 1."""
        parameter = self._parameters[self.sigma_weight]
        assert parameter is not None
        left, right = top_vectors(self._matrices(parameter, len(self.sigma_gain)))
        self.sigma_left.copy_(left)
        self.sigma_right.copy_(right)
        self.sigma_gain.fill_(1)
        self._keep_start(parameter)

    @torch.no_grad()
    def _keep_start(self, parameter: Tensor) -> None:
        matrices = self._matrices(parameter, len(self.sigma_gain))
        self.sigma_start.copy_(top_value(matrices, self.sigma_left, self.sigma_right))

    @property
    def spectral_norms(self) -> Tensor:
        """The largest singular values that the weight has for its readers, ``[P]``."""
        return self.sigma_gain.to(self.sigma_start) * self.sigma_start

    def computed(self, name: str, parameter: Tensor) -> Tensor:
        """Return the weight with its singular values scaled; see the base class."""
        del name
        with torch.autocast(parameter.device.type, enabled=False):
            matrices = self._matrices(parameter, len(self.sigma_gain))
            if self.training and torch.is_grad_enabled():
                power_step_(matrices.detach(), self.sigma_left, self.sigma_right)
            # The next forward changes the vectors in place, which the backward of this one still needs.
            sigma = top_value(matrices, self.sigma_left.clone(), self.sigma_right.clone())
            scale = self.sigma_gain.to(sigma) * (self.sigma_start / sigma)
            scaled = (matrices * scale[:, None, None]).flatten(0, 1)
        shaped = scaled.mT if self.sigma_transposed else scaled.reshape(parameter.shape)
        return shaped.to(parameter.dtype)

    def _matrices(self, weight: Tensor, parts: int) -> Tensor:
        """Return the weight as ``[P, outputs / P, inputs]``, in float32 or better."""
        rows = weight.mT if self.sigma_transposed else weight.flatten(1)
        matrices: Tensor = rows.unflatten(0, (parts, -1))
        return matrices.to(torch.promote_types(weight.dtype, torch.float32))
