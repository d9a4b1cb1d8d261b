"""Gains, biases and what the optimizer keeps of them, of all layers at once: tensors of `[L, C]`, padded with NaN."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabnorm.norms import NormLayer


@runtime_checkable
class AddsInput(Protocol):
    """A norm that adds its input, times eta, to what it normalises: RepBN, and a norm that blends into one."""

    def input_branch(self) -> tuple[Tensor | float, Tensor, Tensor, bool]:
        """Share of that branch in the output; its gain, eta ``[1]`` or ``[C]``, and whether it takes the mean out."""


class Parameters(NamedTuple):
    """What the layers multiply by and add.

    Attributes:
        gain, bias: ``[L, C]``; NaN where a layer has none, and beyond its channels.
        blended: ``[L, C]``, the gain on the normalised input: (1 - share) gain + share * the branch's in a norm that
            `AddsInput`, else gain.
        eta: ``[L, C]``, what the input itself counts beside it, share * eta; 0 elsewhere.
        centred: ``[L]`` bool, whether that branch takes the mean out.
    """

    gain: Tensor
    bias: Tensor
    blended: Tensor
    eta: Tensor
    centred: Tensor

    @staticmethod
    def unknown(layers: int, width: int, device: torch.device, dtype: torch.dtype) -> "Parameters":
        """NaN everywhere, for where no statistic asks for parameters."""
        nothing = torch.full((layers, width), torch.nan, device=device, dtype=dtype)
        return Parameters(nothing, nothing, nothing, nothing, nothing[:, 0].isnan())

    @staticmethod
    def of(norms: Sequence[NormLayer], width: int, device: torch.device, dtype: torch.dtype) -> "Parameters":
        """Read the current values."""
        gains = [layer.gain for layer in norms]
        gain, bias = (
            _padded(values, norms, width, device, dtype) for values in (gains, [layer.bias for layer in norms])
        )
        eta = torch.zeros(len(norms), width, device=device, dtype=dtype)
        centred = torch.ones(len(norms), device=device, dtype=torch.bool)
        blended = gain
        for index, layer in enumerate(norms):
            if isinstance(layer.module, AddsInput):
                share, weight, input_gain, takes_mean = layer.module.input_branch()
                blended = gain.clone() if blended is gain else blended
                row = blended[index, : layer.num_features]
                own = torch.ones_like(row) if gains[index] is None else row
                row.copy_(own + share * (weight.detach().to(row) - own))
                eta[index, : layer.num_features] = share * input_gain.detach()
                centred[index] = takes_mean
        return Parameters(gain, bias, blended, eta, centred)


def _padded(
    values: Sequence[Tensor | None], norms: Sequence[NormLayer], width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Stack the values as ``[L, C]``, with NaN where a layer has none."""
    nothing = torch.full((width,), torch.nan, device=device, dtype=dtype)  # first: it sets the dtype
    rows = [
        nothing
        if value is None or (whole := _whole(value)).numel() not in (1, norm.num_features)  # of FSDP1, a part of it
        else whole.to(device, non_blocking=True).expand(norm.num_features)
        for value, norm in zip(values, norms, strict=True)
    ]
    return nn.utils.rnn.pad_sequence([nothing, *rows], batch_first=True, padding_value=torch.nan)[1:]


def _whole(value: Tensor) -> Tensor:
    """A parameter without its gradient, and without its shards."""
    value = value.detach()
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def adam_figures(norms: Sequence[NormLayer], optimizers: Sequence[Optimizer], device: torch.device) -> Tensor:
    r"""How Adam sees each layer's gain and bias: ``[L, 2]``, NaN where no Adam has them or their gradients are gone.

    .. math:: \sqrt{\mathrm{mean}\, g^2 / \max(\hat v, \epsilon^2)},\qquad \sqrt{\mathrm{mean}\, (g / \epsilon)^2}

    over the elements of both, with g the gradient the optimizer was given and v its second moment after the step, free
    of its start at 0: :math:`\hat v = v / (1 - \beta_2^t)`.
    """
    wanted = {
        parameter: index
        for index, layer in enumerate(norms)
        for parameter in (layer.gain_parameter, layer.bias_parameter)
        if parameter is not None
    }
    held = [
        (wanted[parameter], parameter.grad, optimizer.state[parameter], group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in wanted
        and parameter.grad is not None
        and _is_of_adam(optimizer.state.get(parameter, {}), group, parameter.grad)
    ]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if not held:
        return torch.full((len(norms), 2), torch.nan, device=device, dtype=dtype)

    def rows(values: Sequence[Tensor]) -> Tensor:
        nothing = torch.empty(0, device=device, dtype=dtype)  # first: it sets the dtype
        flat = [_whole(value).flatten().to(device, non_blocking=True) for value in values]
        return nn.utils.rnn.pad_sequence([nothing, *flat], batch_first=True)[1:]  # with 0, which adds nothing

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)[:, None]

    gradient, second = rows([grad for _, grad, _, _ in held]), rows([state["exp_avg_sq"] for _, _, state, _ in held])
    counts = [state["step"] for _, _, state, _ in held]
    steps = [
        (n if isinstance(n, Tensor) else torch.tensor(float(n), dtype=dtype, device="cpu")).reshape(1) for n in counts
    ]
    # Adam keeps them on the host, one by one, unless it is fused or capturable: one copy for all.
    step = (
        torch.stack(steps).to(device, dtype, non_blocking=True)
        if all(s.device.type == "cpu" for s in steps)
        else rows(steps)
    )
    beta = column([float(group["betas"][1]) for _, _, _, group in held])
    eps = column([float(group["eps"]) for _, _, _, group in held])
    unbiased = second / (1 - beta**step)
    squares = torch.stack([gradient.square() / torch.maximum(unbiased, eps.square()), (gradient / eps).square()], -1)
    layer = torch.tensor([index for index, _, _, _ in held], device="cpu").to(device, non_blocking=True)
    sums = torch.zeros(len(norms), 2, device=device, dtype=dtype).index_add_(0, layer, squares.sum(1))
    sizes = column([float(grad.numel()) for _, grad, _, _ in held])
    count = torch.zeros(len(norms), 1, device=device, dtype=dtype).index_add_(0, layer, sizes)
    return torch.where(count > 0, sums / count, torch.nan).sqrt()


def _is_of_adam(state: Mapping[str, Any], group: Mapping[str, Any], gradient: Tensor) -> bool:
    """Whether an optimizer keeps what Adam keeps; some keep one second moment for several elements, or another eps."""
    if not {"exp_avg_sq", "step"} <= state.keys() or not {"betas", "eps"} <= group.keys():
        return False
    whole = getattr(state["exp_avg_sq"], "shape", None) == gradient.shape
    return whole and isinstance(group["eps"], int | float | Tensor)
