"""The norms of a model as the fold sees them: affine in eval, or to stay, and why."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm.errors import StabNormError
from stabnorm.norms import find_norms

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TYPE_NAMES = {
    "layer": "normalises every token by itself: switch it first (convert_norms), or leave it",
    "rms": "divides every token by its own rms: switch it first (convert_norms), or leave it",
    "group": "normalises every sample by itself, so no weight can do it",
    "instance": "normalises every sample by itself, so no weight can do it",
    "batch": "is not known to be affine in eval",
}


HOOKED = "it has forward hooks, which would be lost with it: remove them first"


@dataclass(frozen=True)
class Gain:
    """Where a norm that stays keeps its gain and bias: attribute names, and what is added to the weight."""

    weight: str | None
    bias: str | None
    offset: float


@dataclass(frozen=True, eq=False)
class Site:
    """What is y = scale x + shift per channel in eval; float64, on the CPU.

    That is a norm of which nothing is left, or, with `gain`, the gain and bias of one that stays: x is then what it
    normalised.
    """

    name: str
    scale: Tensor
    shift: Tensor
    channel_dim: int
    gain: Gain | None = None

    @property
    def num_features(self) -> int:
        """Channels."""
        return self.scale.numel()


def find_sites(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """The norms that are affine in eval, and those that stay, by name, with the reason; each in module order."""
    sites: list[Site] = []
    staying: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{site.name}.") for site in sites) or any(name.startswith(f"{n}.") for n in staying):
            continue
        try:
            affine = affine_in_eval(module)
        except StabNormError as error:
            staying[name] = str(error)
            continue
        if affine is None:
            continue
        scale, shift, channel_dim = affine
        hooks = module._forward_hooks or module._forward_pre_hooks
        if hooks:
            staying[name] = HOOKED
        else:
            scale, shift = (t.detach().to("cpu", torch.float64).flatten() for t in (scale, shift))
            sites.append(Site(name, scale, shift, channel_dim))
    known = {site.name for site in sites} | set(staying)
    for norm in find_norms(model):
        if not any(norm.name == name or norm.name.startswith(f"{name}.") for name in known):
            staying[norm.name] = f"{type(norm.module).__name__} {_TYPE_NAMES[norm.kind]}"
    return sites, staying


def find_gains(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Gains and biases of the LayerNorms and RMSNorms, and by name why the other norms have none to fold."""
    sites: list[Site] = []
    staying: dict[str, str] = {}
    for norm in find_norms(model):
        gain, bias = norm.gain, norm.bias
        if norm.kind not in ("layer", "rms") or norm.feature_dims > 1:
            staying[norm.name] = "only a LayerNorm's or RMSNorm's gain over one axis is folded"
        elif gain is None and bias is None:
            staying[norm.name] = "it has neither gain nor bias"
        else:
            like = next(t for t in (gain, bias) if t is not None).detach().to("cpu", torch.float64)
            scale = torch.ones_like(like) if gain is None else gain.detach().to("cpu", torch.float64)
            shift = torch.zeros_like(like) if bias is None else bias.detach().to("cpu", torch.float64)
            place = Gain(norm.weight_name if gain is not None else None, norm.bias_name, norm.gain_offset)
            sites.append(Site(norm.name, scale, shift, norm.channel_dim, place))
    return sites, staying


def affine_in_eval(module: nn.Module) -> tuple[Tensor, Tensor, int] | None:
    """``(scale, shift, channel_dim)`` of a norm that is one affine map per channel in eval; None for any other module.

    Torch's BatchNorms count by exact type: a subclass may end in an activation.

    Raises:
        StabNormError: it is such a norm, but not in this state.
        TypeError: its `fold_affine` returns anything else.
    """
    if callable(getattr(module, "fold_affine", None)):
        return _stated(module)
    if type(module) not in _BATCH_NORMS:
        return None
    mean, var, weight, bias = module.running_mean, module.running_var, module.weight, module.bias
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise StabNormError(f"{type(module).__name__} keeps no running statistics, so in eval it uses the batch's own")
    scale = torch.rsqrt(var.double() + float(module.eps))  # type: ignore[arg-type]
    if isinstance(weight, Tensor):
        scale = weight.detach().double() * scale
    shift = -scale * mean.double()
    return scale, bias.detach().double() + shift if isinstance(bias, Tensor) else shift, 1


def _stated(module: nn.Module) -> tuple[Tensor, Tensor, int]:
    try:
        affine: Any = module.fold_affine()  # type: ignore[operator]
    except NotImplementedError as error:
        raise StabNormError(f"the fold_affine() of {type(module).__name__} is not implemented") from error
    if not (isinstance(affine, tuple) and [type(part) for part in affine[2:]] == [int]):
        affine = (None, None, None)
    scale, shift, channel_dim = affine
    if not (isinstance(scale, Tensor) and isinstance(shift, Tensor) and scale.numel() == shift.numel()):
        raise TypeError(
            f"the fold_affine() of {type(module).__name__} does not return (scale, shift, channel_dim): two tensors of "
            "one number for each channel, and the axis of the channels"
        )
    return scale, shift, channel_dim
