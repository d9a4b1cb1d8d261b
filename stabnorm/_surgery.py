"""What becomes of one norm: another class for the object, another module in its place, or nothing and the reason."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stabnorm._models.tree import Tree
from stabnorm._models.watched import own_class
from stabnorm.nn import _fused_path
from stabnorm.nn._channel_norm import ChannelNorm, Float32Buffers
from stabnorm.nn.power import PowerNorm
from stabnorm.nn.prep import PRepBN, prep_class
from stabnorm.nn.rep import RepBN
from stabnorm.nn.unified import UnifiedNorm
from stabnorm.norms import NormLayer, is_registered

Target = Literal["prepbn", "repbn", "unified", "power"]


class Plan(NamedTuple):
    """What will be done with a norm, or why nothing."""

    reason: str
    carry_out: Callable[[], None] | None = None
    done_before: bool = False


def plan_conversion(layer: NormLayer, to: Target, options: dict[str, Any], tree: Tree) -> Plan:
    """Find out whether a norm can be converted and build what it takes; the model is only read.

    Raises:
        ValueError: an option is out of range.
    """
    module = layer.module
    if isinstance(module, PRepBN | ChannelNorm):
        made = PRepBN if isinstance(module, PRepBN) else type(module)
        return Plan(f"already converted to {made.__name__}", done_before=True)
    obstacle = _obstacle(layer, tree)
    if obstacle:
        return Plan(obstacle)
    like = tree.nearest_tensor(module)
    try:
        with _defaults_of(like):
            return _swap(layer, like, options) if to == "prepbn" else _replacement(layer, like, to, options, tree)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error


def _obstacle(layer: NormLayer, tree: Tree) -> str | None:
    """What keeps this norm from any conversion."""
    module = layer.module
    if layer.kind == "batch":
        return "it is batch norm, affine in eval already"
    if layer.kind not in ("layer", "rms"):
        return f"it is {layer.kind} norm: only layer and rms norms are converted"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized (torch.nn.utils.parametrize): convert first, then parametrize"
    if "forward" in vars(module):
        return "its forward was replaced on the object, which nothing here can see through"
    for name in (layer.weight_name, layer.bias_name):
        if name and isinstance(vars(module).get(name), Tensor):
            return f"its {name} is computed from other tensors (weight_norm, pruning): convert first"
    shared = tree.shared(module)
    return f"{shared}: give it parameters of its own, or leave it" if shared else None


@contextmanager
def _defaults_of(like: Tensor) -> Iterator[None]:
    """New tensors on the device of `like`, in float32: Lightning builds models of bf16-true under that default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with like.device:
            yield
    finally:
        torch.set_default_dtype(before)


# --- prepbn: another class for the same object ---

# What PRepBN puts before a class's own, apart from what hands on to it.
_RESERVED = {
    name for mixin in (PRepBN, Float32Buffers) for name in (*vars(mixin), *mixin.__annotations__)
} - {*dir(nn.Module), "reset_parameters"}  # fmt: skip


def _swap(layer: NormLayer, like: Tensor, options: dict[str, Any]) -> Plan:
    module = layer.module
    for name in sorted(_RESERVED):
        if hasattr(module, name) and not (name == "channel_dim" and module.channel_dim == layer.channel_dim):
            return Plan(f"its class has an attribute {name!r} of its own, which PRepBN needs")
    if layer.feature_dims > 1 and layer.channel_dim != -1:
        return Plan(f"it normalises {layer.feature_dims} axes together that are not the last ones")
    # An instance of the mixin over torch's norm: it checks the options, and builds `rep`.
    scratch = PRepBN(layer.num_features, channel_dim=layer.channel_dim, **_rep_options(layer, options)).to(like.dtype)
    base = type(module)
    try:
        made = _prep_class(layer)
        base.__new__(base).__class__ = made
    except TypeError as error:
        return Plan(f"no class can be made of {base.__name__} and PRepBN: {error}")

    def carry_out() -> None:
        module.__class__ = made
        assert isinstance(module, PRepBN)
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            scratch.rep.requires_grad_(False)  # frozen before, frozen after
        module.adopt(scratch.rep, scratch.eval_mode, layer.feature_dims)

    return Plan(f"class {made.__name__}", carry_out)


def _rep_options(layer: NormLayer, options: dict[str, Any]) -> dict[str, Any]:
    """With the defaults that differ: bursts stay out of running statistics, and an rms norm's successor only scales."""
    center = layer.kind == "layer" or layer.bias is not None
    return {"filtration": "calibrated", "center": center} | options


def _prep_class(layer: NormLayer) -> type[PRepBN]:
    base = own_class(layer.module)
    torch_own = base.forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    if torch_own or is_registered(base):
        return prep_class(base)
    return prep_class(
        base,
        layer.kind,
        channel_dim=layer.channel_dim,
        num_features=layer.num_features,
        eps=layer.eps,
        weight=layer.weight_name,
        bias=layer.bias_name,
        gain_offset=layer.gain_offset,
    )


# --- the others: another module in the same place ---

_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
)  # fmt: skip


def _replacement(layer: NormLayer, like: Tensor, to: Target, options: dict[str, Any], tree: Tree) -> Plan:
    old = layer.module
    if id(old) not in tree.parents:
        return Plan("it is the model itself: only to='prepbn' can convert it in place")
    if layer.feature_dims > 1:
        return Plan(f"it normalises {layer.feature_dims} axes together: only to='prepbn' can convert it")
    if any(getattr(old, hooks) for hooks in _STATE_HOOKS):
        return Plan("it has state_dict hooks, which are about its own tensors: remove them first")
    new = _built(layer, to, options).to(like.dtype).train(old.training)
    if layer.bias is not None and new.bias is None:
        return Plan(f"its bias would be lost: {'bias' if to == 'unified' else 'center'}=False has no place for one")
    kept = [_hand_over(new, "weight", layer.gain_parameter, layer.gain, exactly=not layer.gain_offset)]
    kept += [_hand_over(new, "bias", layer.bias_parameter, layer.bias)] if new.bias is not None else []

    def carry_out() -> None:
        # The dictionaries themselves: the handles that remove a hook refer to them.
        vars(new).update(
            (name, value) for name, value in vars(old).items() if "_hooks" in name or "full_backward" in name
        )
        for parent, name in tree.parents[id(old)]:
            setattr(parent, name, new)

    return Plan(", ".join(kept), carry_out)


def _built(layer: NormLayer, to: Target, options: dict[str, Any]) -> ChannelNorm:
    if to == "repbn":
        return RepBN(layer.num_features, channel_dim=layer.channel_dim, **_rep_options(layer, options))
    if to == "unified":
        options = {"bias": layer.bias is not None} | options
        return UnifiedNorm(layer.num_features, channel_dim=layer.channel_dim, **options)
    return PowerNorm(layer.num_features, channel_dim=layer.channel_dim, **options)


def _hand_over(
    new: ChannelNorm, name: str, parameter: nn.Parameter | None, value: Tensor | None, exactly: bool = True
) -> str:
    """Make the old norm's parameter, or else its value, the new one's, and say so."""
    own = getattr(new, name)
    if value is None:
        return f"{name} new"
    if parameter is None or not exactly or parameter.shape != own.shape:
        own.data.copy_(value.detach())
        return f"{name} new, of the same value"
    for part in new.modules():  # the official variants hold it, too
        if getattr(part, name, None) is own:
            setattr(part, name, parameter)
    return f"{name} kept"


# --- torch's own encoder ---


def leave_fused_path(model: nn.Module) -> None:
    """Keep torch's encoder layers from their fused path, which would run a layer norm with our norms' weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_ours(module):
            _fused_path.leave_fused_path(module)
        if isinstance(module, nn.TransformerEncoder) and _holds_ours(module.layers):
            module.enable_nested_tensor = module.use_nested_tensor = False


def _holds_ours(module: nn.Module) -> bool:
    return any(isinstance(part, PRepBN | ChannelNorm) for part in module.modules())
