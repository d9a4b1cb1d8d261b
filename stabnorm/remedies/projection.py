"""`WeightProjection`: weights that a norm follows keep their length, so that the learning rate means the same.

The other half of Normalize-and-Project, the norms before the nonlinearities, is the model's own.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.names import Patterns
from stabnorm._models.ranks import is_distributed
from stabnorm._states import check_state, load_whole
from stabnorm.errors import StabNormError
from stabnorm.remedies._weights import changeable, convolution_weights, linear_weights
from stabnorm.remedies.report import check_remedied, chosen


class WeightProjection:
    r"""Scales each weight back to the length that it had at first, after an optimizer's step.

    .. math:: W \leftarrow W\, \rho / \|W\|_F, \qquad \rho = \|W_0\|_F

    Where a norm follows, the output does not depend on the length of a weight, but the effective learning rate falls as
    the weights grow. With the projection it is what the schedule says. Use it for weights that a norm follows, as in a
    net with a norm before each nonlinearity, and take weight decay off them. Biases and gains are left alone.

    Call `step` after ``optimizer.step()``, or use `stabnorm.callbacks.ProjectWeightsCallback`.

    Args:
        model: any module.
        include: a regular expression, or several, searched for in the names of linear layers and convolutions. Default:
            all but the last one, the head, whose length the loss reads.
        exclude: the same, for layers to leave alone; it wins over `include`. Default: none.

    Raises:
        TypeError: an argument has another type.
        ValueError: a pattern is invalid or matches no layer.
        StabNormError: there is no layer whose weight can be projected.

    Source: arXiv:2407.01800, Normalization and effective learning rates in reinforcement learning.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    >>> projection = WeightProjection(model)
    >>> _ = nn.init.normal_(model[0].weight)
    >>> projection.step()
    >>> projection.names, torch.allclose(model[0].weight.norm(), projection.lengths[0])
    (('0',), True)
    """

    def __init__(self, model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> None:
        check_remedied(model)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        listed = sorted((*linear_weights(model), *convolution_weights(model)), key=lambda weight: order[weight.name])
        weights = {weight.name: weight for weight in (listed[:-1] if include is None else listed)}
        hint = "The last layer is left out unless include= names it"
        names = chosen("linear layers and convolutions", weights, include, exclude, hint=hint)
        projected, self.left = changeable(model, [weights[name] for name in names])
        if not projected:
            raise StabNormError(f"no weight can be projected: {self.left}")
        self.names = tuple(weight.name for weight in projected)
        self.weights: list[Any] = [weight.parameter for weight in projected]
        self.lengths = self._norms()

    @torch.no_grad()
    def _norms(self) -> Tensor:
        widest = functools.reduce(torch.promote_types, (weight.dtype for weight in self.weights), torch.float32)
        norms: list[Any] = [torch.linalg.vector_norm(weight.detach(), dtype=widest) for weight in self.weights]
        whole = [norm.full_tensor() if is_distributed(norm) else norm for norm in norms]
        return torch.stack([norm.to(self.weights[0].device) for norm in whole])

    @torch.no_grad()
    def step(self) -> None:
        """Scale all weights back to their lengths; nothing is read from the device. A weight of zeros stays."""
        norms = self._norms()
        factors = torch.where(norms > 0, self.lengths.to(norms.device) / norms, 1)
        for weight, factor in zip(self.weights, factors.unbind(), strict=True):
            own = weight.to_local() if is_distributed(weight) else weight
            own.mul_(factor.to(own.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the lengths, as they were at first."""
        return {"names": list(self.names), "lengths": self.lengths.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: the state is no mapping.
            ValueError: it is not that of a WeightProjection; nothing is loaded then.
            StabNormError: it is about other layers; nothing is loaded then.
        """
        check_state(state, "WeightProjection", ["names", "lengths"])
        load_whole(self, self._load, state)

    def _load(self, state: Mapping[str, Any]) -> None:
        if list(state["names"]) != list(self.names):
            raise StabNormError(
                f"the state keeps the lengths of {state['names']}, and this one those of {list(self.names)}. Choose "
                "the same layers as in that run"
            )
        self.lengths = state["lengths"].clone().reshape(len(self.names))
