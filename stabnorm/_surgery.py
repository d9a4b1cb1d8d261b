"""Plan the conversion of one norm: another class for the object, another module in its place, or the reason why not."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from stabnorm._log import printable
from stabnorm._models.tree import PLAIN, Tree
from stabnorm.errors import StabNormError
from stabnorm.nn._base import TARGETS, EvalAffineNorm, target_name
from stabnorm.nn.mixed_in import MixedIn
from stabnorm.norms import NormLayer

Target = str  # a key of TARGETS: "prepbn", "taper", "repbn", "unified", "power"; or a baseline: "dyt", "derf", "srms"


class Plan(NamedTuple):
    """What will be done with a norm, or why nothing will be done."""

    reason: str
    carry_out: Callable[[], None] | None = None
    done_before: bool = False


def plan_conversion(layer: NormLayer, to: Target, options: dict[str, Any], tree: Tree) -> Plan:
    """Plan the conversion of a norm, and build what it needs; the model does not change.

    Raises:
        ValueError: an option is out of range.
    """
    module = layer.module
    if isinstance(module, EvalAffineNorm):
        return done_before(module)
    successor = TARGETS[to]
    obstacle = _obstacle(layer, tree) or (None if successor._in_place else _obstacle_to_replacing(module, tree))
    if obstacle:
        return Plan(obstacle)
    try:
        conversion = successor.plan_from_norm(layer, tree.nearest_tensor(module), **options)
    except StabNormError as error:
        return Plan(str(error))
    except ValueError as error:
        raise ValueError(f"{printable(layer.name)}: {error}") from error

    def carry_out() -> None:
        frozen = not any(True for _ in module.parameters()) and tree.frozen_around(module)
        new = conversion.carry_out()
        if frozen:
            new.requires_grad_(False)
        if new is not module:
            _replace(module, new, tree)

    return Plan(conversion.note, carry_out)


def done_before(module: EvalAffineNorm) -> Plan:
    """Return the plan for a module of this package, which stays as it is."""
    return Plan(f"already converted to {target_name(module)}", done_before=True)


def _obstacle(layer: NormLayer, tree: Tree) -> str | None:
    """Return the reason why this norm cannot be converted to anything; None if there is none."""
    module = layer.module
    if layer.kind == "batch":
        return "it is batch norm, affine in eval already"
    if layer.kind not in ("layer", "rms"):
        return f"it is {layer.kind} norm: only layer and rms norms are converted"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized (torch.nn.utils.parametrize): convert first, then parametrize"
    if isinstance(module, MixedIn):
        return "a remedy computes its weight or adds a norm to it: convert first, then apply the remedy"
    if "forward" in vars(module):
        return "its forward was replaced on the object, which nothing here can see through"
    for name in (layer.weight_name, layer.bias_name):
        tensor = getattr(module, name, None) if name else None
        if name and isinstance(vars(module).get(name), Tensor):
            return f"its {name} is computed from other tensors (weight_norm, pruning): convert first"
        if isinstance(tensor, Tensor) and tensor.numel() != layer.num_features:
            return f"its {name} has {tensor.numel()} numbers, not one for each of its {layer.num_features} channels"
    shared = tree.shared(module)
    return f"{shared}: give it parameters of its own, or leave it" if shared else None


# --- another module in the same place ---

_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
)  # fmt: skip


def _obstacle_to_replacing(old: nn.Module, tree: Tree) -> str | None:
    if id(old) not in tree.parents:
        return "it is the model itself: only to='prepbn' or 'taper' can convert it in place"
    if any(getattr(old, hooks) for hooks in _STATE_HOOKS):
        return "it has state_dict hooks, which are about its own tensors: remove them first"
    return None


def _replace(old: nn.Module, new: nn.Module, tree: Tree) -> None:
    """Put the new module under every name of the old one, move the hooks, and keep what other code may read."""
    # The new module gets the same dictionaries, because the handles that remove a hook refer to them.
    vars(new).update((name, value) for name, value in vars(old).items() if "_hooks" in name or "full_backward" in name)
    for name, value in vars(old).items():
        if isinstance(value, PLAIN) and not hasattr(new, name):
            setattr(new, name, value)
    for parent, name in tree.parents[id(old)]:
        setattr(parent, name, new)
