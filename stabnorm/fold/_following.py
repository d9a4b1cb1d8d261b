"""A dispatch mode that sees every operation of a forward, and knows which parameter a tensor is a part of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stabnorm._models.ambient import plain_context
from stabnorm.fold._readers import View

aten = torch.ops.aten
_OF_A_SHAPE = {
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided,
}  # fmt: skip
_HOLD_NOTHING = {type(None), bool, int, float, str, torch.dtype, torch.device}


class Following(TorchDispatchMode):
    """Base of the modes that follow channels through a model: `follow` is called after each operation.

    Args:
        model: whose parameters are known.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.pauses = 0  # above 0 inside a norm, whose operations are not followed
        self.owners: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in model.named_parameters():
            self.owners.setdefault(storage_of(parameter), []).append((name, parameter))

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Look at an operation that has just run."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(cls, "__tensor_flatten__") for cls in types):
            return NotImplemented  # a jagged tensor, say, takes its operations apart itself
        out: Any = NotImplemented
        if not any(t.is_nested for t in tensors_of((args, kwargs))):
            with self:  # an op made of ops arrives whole in inference mode: take it apart
                out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            moves_nothing = func.overloadpacket in _OF_A_SHAPE or _keeps_elements(func, args)
            out = func(*args, **kwargs)
            if not self.pauses and not moves_nothing:
                with plain_context():  # what the model sets, or its caller, is not for what we compute
                    self.follow(func, args, kwargs, out)
        return out

    def view_of(self, t: Any) -> View | None:
        """Give the part of a parameter that a tensor is; None if it is none."""
        if not isinstance(t, Tensor):
            return None
        for name, parameter in self.owners.get(storage_of(t), ()):
            offset = int(t.storage_offset() - parameter.storage_offset())
            view, whole = View.made(name, t, offset), View.made(name, parameter, 0)
            if offset >= 0 and view.reach[1] <= whole.reach[1] and t.dtype == parameter.dtype:
                return view
        return None


def _keeps_elements(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether strides are written of axes with one entry only, as pooling does in channels-last memory."""
    if func.overloadpacket is not aten.as_strided_:
        return False
    t, size, stride, *offset = args
    old, new = View.made("", t, t.storage_offset()), zip(size, stride, strict=True)
    return (tuple(size), tuple(step if n > 1 else 0 for n, step in new)) == (old.size, old.stride) and offset in (
        [],
        [None],
        [old.offset],
    )


def storage_of(t: Tensor) -> int:
    """Give the address of a tensor's storage; 0 where it has none that can be known."""
    try:
        return t.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one of a class that hides it
        return 0


def tensors_of(tree: Any) -> list[Tensor]:
    """List the tensors among an operation's arguments or results."""
    tensors: list[Tensor] = []
    _gather(tree, tensors)
    return tensors


def _gather(tree: Any, tensors: list[Tensor]) -> None:
    kind = type(tree)  # several times for every operation, and torch's own walk over a tree is ten times slower
    if isinstance(tree, Tensor):
        tensors.append(tree)
    elif kind is tuple or kind is list:
        for part in tree:
            _gather(part, tensors)
    elif kind is dict:
        for part in tree.values():
            _gather(part, tensors)
    elif kind not in _HOLD_NOTHING:
        tensors += [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
