"""`StandardizedWeights`: each output channel's weight has mean 0 and variance 1 (arXiv 1903.10520)."""

from typing import ClassVar

import torch
from torch import Tensor

from stabnorm.nn.mixed_in import ComputedWeights


class StandardizedWeights(ComputedWeights):
    r"""A mixin over a layer with a weight, see `stabnorm.remedies.standardize_weights`.

    .. math:: \hat W_o = \frac{W_o - \mathrm{mean}(W_o)}{\sqrt{\mathrm{var}(W_o) + \epsilon}}

    The mean and the unbiased variance are over all inputs of an output channel o.

    Attributes:
        standardized_eps: :math:`\epsilon`.
        standardized_transposed: whether the weight is ``[inputs, outputs]``, as in Hugging Face's Conv1D.
    """

    adds: ClassVar[tuple[str, ...]] = ("standardized_eps", "standardized_transposed")
    standardized_eps: float
    standardized_transposed: bool

    def computed(self, name: str, parameter: Tensor) -> Tensor:
        """Return the standardized weight; see the base class."""
        del name
        with torch.autocast(parameter.device.type, enabled=False):
            wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
            rows = wide.mT if self.standardized_transposed else wide.flatten(1)
            var, mean = torch.var_mean(rows, dim=1, keepdim=True)
            rows = (rows - mean) * torch.rsqrt(var + self.standardized_eps)
        shaped = rows.mT if self.standardized_transposed else rows.reshape(parameter.shape)
        return shaped.to(parameter.dtype)
