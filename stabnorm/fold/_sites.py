"""The norms of a model as the fold sees them: affine in eval, or to stay, and why."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabnorm._models.hooks import has_forward_hooks
from stabnorm.errors import StabNormError
from stabnorm.fold._activated import affine_map_of, norm_inside
from stabnorm.nn.elementwise import SquashingNorm
from stabnorm.norms import find_norms
from stabnorm.norms.affine import affine_in_eval
from stabnorm.norms.search import NormSearch

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
    normalised, or what the gain and bias in `stays` make of it. With `goes_on` the module's forward goes on with its
    children, and y is what they read. Where several trailing axes hold the channels, `shape` has their sizes.
    """

    name: str
    scale: Tensor
    shift: Tensor
    channel_dim: int
    gain: Gain | None = None
    stays: tuple[Tensor, Tensor] | None = None
    goes_on: bool = False
    shape: tuple[int, ...] = ()

    @property
    def num_features(self) -> int:
        """Channels."""
        return self.scale.numel()

    @property
    def channels(self) -> str:
        """How many, and where, in words."""
        if self.shape:
            return f"{' x '.join(map(str, self.shape))} channels on the last axes"
        return f"{self.num_features} channels on axis {self.channel_dim}"

    def fits(self, shape: torch.Size) -> bool:
        """Whether a tensor of this shape has the norm's channels where the norm says."""
        if self.shape:
            return tuple(shape[-len(self.shape) :]) == self.shape
        return -len(shape) <= self.channel_dim < len(shape) and shape[self.channel_dim] == self.num_features

    def flat(self, t: Tensor) -> Tensor:
        """Give a tensor of the norm's shape with its channels first, and all else behind them."""
        return t.flatten(t.ndim - len(self.shape) if self.shape else -1).movedim(self.channel_dim, 0).flatten(1)

    def frozen(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, int]:
        """Give what `FrozenAffine` takes."""
        sizes = self.shape or (self.num_features,)
        return scale.view(sizes), shift.view(sizes), self.channel_dim


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
        measured = affine_map_of(module) if affine is None else None
        inside = norm_inside(module) if affine is None and measured is None else None
        scale_and_shift = affine[:2] if affine else measured or inside
        if scale_and_shift is None:
            continue
        scale, shift = scale_and_shift
        channel_dim, goes_on = affine[2] if affine else 1, inside is not None
        if has_forward_hooks(module):
            staying[name] = HOOKED
        else:
            axes = tuple(size for size in scale.shape if size > 1)
            scale, shift = (t.detach().to("cpu", torch.float64).flatten() for t in (scale, shift))
            shape = axes if len(axes) > 1 and channel_dim == -1 else ()
            sites.append(Site(name, scale, shift, channel_dim, goes_on=goes_on, shape=shape))
    known = {site.name for site in sites} | set(staying)
    search = NormSearch(model)
    for norm in search.found:
        if not is_under(norm.name, known):
            staying[norm.name] = f"{type(norm.module).__name__} {_TYPE_NAMES[norm.kind]}"
    search.unknown = [(name, module) for name, module in search.unknown if not is_under(name, known)]
    search.warn(stacklevel=5)
    for name, module in search.unknown:
        staying[name] = (
            f"{type(module).__name__} looks like a norm, and what it computes was not understood: tell it with "
            "stabnorm.register_norm"
        )
    return sites, staying


def is_under(name: str, parents: Iterable[str]) -> bool:
    """Whether this is one of these modules, or a part of one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def find_gains(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Gains and biases of LayerNorm, RMSNorm, DyT and Derf, and by name why the other norms have none to fold."""
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
    for name, module in model.named_modules():
        if isinstance(module, SquashingNorm):
            scale, shift = (t.detach().to("cpu", torch.float64) for t in (module.weight, module.bias))
            sites.append(Site(name, scale, shift, module.channel_dim, Gain("weight", "bias", 0.0)))
    return sites, staying
