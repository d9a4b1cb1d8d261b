"""Loss scales that differ from optimizer to optimizer: which layer's gradients were multiplied by which of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabnorm.monitor.bands import Band
from stabnorm.monitor.ranks import Gathered
from stabnorm.norms import NormLayer

Scale = Tensor | float


def layer_scales(norms: Sequence[NormLayer], model: nn.Module, scales: Mapping[Optimizer, Scale]) -> list[Scale]:
    """Return the loss scale of each layer: that of the optimizer which holds its parameters.

    A layer without parameters has the scale of the parameters next to it, in the smallest part of the model that has
    some. Where no optimizer holds any, the last scale counts.

    Args:
        norms: the layers.
        model: the model that has them.
        scales: the scale at the step of each optimizer.

    >>> net = nn.ModuleDict({"g": nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4)), "d": nn.LayerNorm(4)})
    >>> by_optimizer = {torch.optim.SGD(part.parameters()): scale for part, scale in zip(net.values(), (8.0, 2.0))}
    >>> from stabnorm import find_norms
    >>> layer_scales(find_norms(net), net, by_optimizer)
    [8.0, 2.0]
    """
    owner = {
        id(parameter): optimizer
        for optimizer in scales
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    *_, last = scales.values()
    parts = dict(model.named_modules())
    around = {id(module): name for name, module in parts.items()}
    result = []
    for norm in norms:
        path = around.get(id(norm.module), "").split(".")
        nearest = [parts[".".join(path[:end])] for end in range(len(path), -1, -1)]
        parameters = (parameter for part in nearest for parameter in part.parameters())
        held = next((owner[id(parameter)] for parameter in parameters if id(parameter) in owner), None)
        result.append(last if held is None else scales[held])
    return result


def unscaled(
    bands: Sequence[Gathered], layers: Sequence[Band], model: nn.Module, scale: Scale | Mapping[Optimizer, Scale]
) -> list[Gathered]:
    """Divide the gradients of each band by the loss scale, or each layer's by its own; no value is read.

    Args:
        bands: what each band has gathered.
        layers: the bands.
        model: the model that has the layers.
        scale: one for all, or the scale at the step of each optimizer.
    """
    if not isinstance(scale, Mapping):
        return [of._replace(gradient=of.gradient / scale) for of in bands]
    scales = [
        _stacked(layer_scales(band.layers, model, scale), of.gradient) for band, of in zip(layers, bands, strict=True)
    ]
    return [of._replace(gradient=of.gradient / by) for of, by in zip(bands, scales, strict=True)]


def _stacked(scales: Sequence[Scale], like: Tensor) -> Tensor:
    """Return the scales as a tensor that divides ``like``, whose first axis is that of the layers."""
    numbers = [s.to(like).reshape(()) if isinstance(s, Tensor) else like.new_full((), s) for s in scales]
    return torch.stack(numbers).reshape(-1, *[1] * (like.ndim - 1))
