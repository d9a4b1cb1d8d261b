"""Linear operations on activations, whatever module they run in, and the part of a parameter each one uses."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from stabnorm.fold._shadow import Columns

aten = torch.ops.aten


@dataclass(frozen=True)
class View:
    """A strided part of a named parameter; `offset` counts from where the parameter starts in its storage."""

    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def made(cls, name: str, t: Tensor, offset: int) -> "View":
        """Give the view that a tensor is. The stride of an axis with one entry says nothing, and is written as 0."""
        strides = (stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))
        return cls(name, tuple(t.shape), tuple(strides), offset)

    @property
    def reach(self) -> tuple[int, int]:
        """First and last element."""
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return self.offset, self.offset + last

    @property
    def is_expanded(self) -> bool:
        """Whether one number of the parameter stands in several places."""
        return any(size > 1 and stride == 0 for size, stride in zip(self.size, self.stride, strict=True))

    def overlaps(self, other: "View") -> bool:
        """Whether the two may share an element."""
        (low, high), (other_low, other_high) = self.reach, other.reach
        return self.name == other.name and low <= other_high and other_low <= high

    def of(self, parameter: Tensor) -> Tensor:
        """This part of `parameter`, sharing its memory."""
        return torch.as_strided(parameter, self.size, self.stride, parameter.storage_offset() + self.offset)


@dataclass(frozen=True)
class NewBias:
    """A bias that can be registered where there is none: `size` long, these outputs from `start` on."""

    owner: str
    attribute: str
    size: int
    start: int

    @property
    def name(self) -> str:
        """The parameter's name."""
        return f"{self.owner}.{self.attribute}".lstrip(".")

    def of(self, model: nn.Module) -> Tensor:
        """The parameter, once it is registered."""
        return model.get_parameter(self.name)


@dataclass(frozen=True)
class Joined:
    """A bias that a forward joins from parameters and buffers; a buffer becomes a parameter when it changes."""

    parts: tuple[View | NewBias, ...]

    def named(self, rename: Callable[[str], str]) -> "Joined":
        """Give the same bias of another module."""
        return Joined(tuple(_named(part, rename) for part in self.parts))


Slot = View | NewBias | Joined | str  # the last: why there is none


def renamed(slot: Slot, rename: Callable[[str], str]) -> Slot:
    """Give a bias's place in another module."""
    if isinstance(slot, Joined):
        return slot.named(rename)
    return slot if isinstance(slot, str) else _named(slot, rename)


def _named(slot: View | NewBias, rename: Callable[[str], str]) -> View | NewBias:
    if isinstance(slot, View):
        return replace(slot, name=rename(slot.name))
    return replace(slot, owner=rename(slot.owner))


def views_in(slot: Slot) -> tuple[View, ...]:
    """List the parts of existing parameters that a bias consists of."""
    parts = slot.parts if isinstance(slot, Joined) else (slot,)
    return tuple(part for part in parts if isinstance(part, View))


@dataclass(eq=False)
class Linear:
    """One weight as a linear operation uses it, over all its executions.

    Args:
        op: What ran.
        path: The module it ran in.
        weight: View of ``[groups, inputs, outputs, *kernel]``.
        outputs: First tag of its outputs.
        bias: Where a shift of the outputs can go.
        has_bias: Whether outputs have a bias that must be scaled with the weight.
        pads: Why a shift of the inputs would not reach all outputs alike; empty if it would.
        biased: First tag of its outputs once a parameter was added right after, as its bias; 0 when none was.
        bare_slot: What `bias` was before that.
        reads: What its inputs were, each different case once.
        problem: Why the weight cannot be changed; empty if it can.
    """

    op: str
    path: str
    weight: View
    outputs: int
    bias: Slot
    has_bias: bool
    pads: str = ""
    biased: int = 0
    bare_slot: Slot = ""
    reads: list[Columns] = field(default_factory=list)
    problem: str = ""

    @property
    def size(self) -> tuple[int, int, int]:
        """Groups, inputs and outputs of each."""
        groups, inputs, outputs = self.weight.size[:3]
        return groups, inputs, outputs

    @property
    def name(self) -> str:
        """The module that owns the weight, or the parameter where it is no module's `weight`."""
        owner, _, attribute = self.weight.name.rpartition(".")
        return owner if attribute == "weight" and owner else self.weight.name

    def note(self, read: Columns) -> None:
        """Add what its inputs were in one execution; the same with a padding's zeros beside it stands for both."""
        for index, earlier in enumerate(self.reads):
            if read.same(earlier):
                self.reads[index] = read if read.padded else earlier
                return
        self.reads.append(read)

    def __str__(self) -> str:
        return f"'{self.name}'" if self.path == self.name else f"'{self.name}' ({self.op} in '{self.path}')"


@dataclass(frozen=True, eq=False)
class Operands:
    """One execution of a linear operation, brought into one form.

    Args:
        x: What it reads.
        weight: The weight, as the op got it.
        bias: The bias operand, None without.
        form: `weight` as ``[groups, inputs, outputs, *kernel]``.
        gather: A plane like x as ``[groups, inputs, positions]``.
        spread: A plane ``[groups, outputs]`` in a form that expands to the output.
        pick: The other way: ``[groups, outputs]`` out of a plane like the output.
        align: The bias in a form that expands to the output.
        pads: See `Linear`.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    form: Tensor
    gather: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    pick: Callable[[Tensor], Tensor]
    align: Callable[[Tensor], Tensor] = lambda bias: bias
    pads: str = ""


def operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_weight: Callable[[Any], bool]) -> Any:
    """The `Operands` of a linear operation with a parameter; None for other ops, a str where it cannot be changed."""
    packet = func.overloadpacket
    if packet in (aten.addmm, aten.baddbmm, aten.addmv):
        bias, a, b = args[:3]
        if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
            return "it scales its operands"
    elif packet in (aten.mm, aten.bmm, aten.mv):
        bias, (a, b) = None, args[:2]
    elif packet is getattr(aten, "_grouped_mm", None) and is_weight(args[1]) and args[1].ndim == 3:
        return _grouped_product(args[0], args[1], kwargs["offs"] if "offs" in kwargs else args[2])
    elif packet is aten.convolution:
        return _convolution(args) if is_weight(args[1]) else _COMPUTED
    else:
        return None
    if is_weight(b) and packet not in (aten.mv, aten.addmv):
        return _product(a, b, bias)
    if is_weight(a):
        return _product_from_left(a, b, bias)
    return _COMPUTED


_COMPUTED = (
    "its weight is no Parameter. If it is computed from one (a parametrization such as weight_norm, pruning, a cast, a "
    "LoRA product), make it one: torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove, the "
    "adapter's merge"
)


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Operands:
    """``x @ w``, with or without a batch axis."""
    if x.ndim == 2:
        return Operands(x, w, bias, w[None], lambda p: p.t()[None], lambda f: f[0], lambda p: p[0][None])
    if w.stride(0) == 0 or w.shape[0] == 1:  # one weight for the whole batch
        return Operands(
            x, w, bias, w[:1], lambda p: p.permute(2, 0, 1).flatten(1)[None], lambda f: f[0], lambda p: p[0, 0][None]
        )
    return Operands(x, w, bias, w, lambda p: p.transpose(1, 2), lambda f: f[:, None], lambda p: p[:, 0])


def _grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Operands:
    """``x[ends[e - 1]:ends[e]] @ w[e]``: experts, each with rows of its own. Any row may reach any expert."""
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True).clamp(max=len(w) - 1)
    return Operands(
        x, w, None, w,
        lambda p: p.t()[None].expand(len(w), -1, -1),
        lambda f: f[expert],
        lambda p: p[(ends - 1).clamp(min=0)],
    )  # fmt: skip


def _product_from_left(w: Tensor, x: Tensor, bias: Tensor | None) -> Operands:
    """``w @ x``: the inputs are the rows of x."""
    if x.ndim == 1:
        return Operands(x, w, bias, w.t()[None], lambda p: p[None, :, None], lambda f: f[0], lambda p: p[None])
    if x.ndim == 2:
        return Operands(x, w, bias, w.t()[None], lambda p: p[None], lambda f: f[0][:, None], lambda p: p[:, 0][None])
    form = w.transpose(1, 2)
    if w.stride(0) == 0 or w.shape[0] == 1:
        return Operands(
            x, w, bias, form[:1],
            lambda p: p.permute(1, 0, 2).flatten(1)[None],
            lambda f: f[0][:, None],
            lambda p: p[0, :, 0][None],
        )  # fmt: skip
    return Operands(x, w, bias, form, lambda p: p, lambda f: f[..., None], lambda p: p[..., 0])


def _convolution(args: tuple[Any, ...]) -> Operands:
    x, w, bias, _, padding, _, transposed, _, groups = args
    kernel = [1] * (w.ndim - 2)
    form = w.reshape(groups, -1, *w.shape[1:])
    pads = ""
    if transposed:
        pads = "it is transposed, so its borders get less of a shift"
    else:
        form = form.transpose(1, 2)
        if any(padding):
            pads = "it pads with zeros, which get no shift"
    return Operands(
        x, w, bias, form,
        lambda p: p.movedim(1, 0).reshape(groups, x.shape[1] // groups, -1),
        lambda f: f.reshape(1, -1, *kernel),
        lambda p: p.flatten(2)[0, :, 0].reshape(groups, -1),
        lambda b: b.reshape(-1, *kernel),
        pads,
    )  # fmt: skip


_MAY_ADD_A_BIAS = (nn.Linear, _ConvNd)  # a subclass's own forward may leave it out: then the check takes it back
_PROJECTIONS = {"in_proj_weight": 0, "q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}


def new_bias(model: nn.Module, weight: View, path: str) -> NewBias | str:
    """Where a bias can be registered for a weight that ran in module `path` without one."""
    owner_name, _, attribute = weight.name.rpartition(".")
    owner = model.get_submodule(owner_name)
    outputs = weight.size[0] * weight.size[2]
    if isinstance(owner, nn.MultiheadAttention) and attribute in _PROJECTIONS and owner.in_proj_bias is None:
        start = _PROJECTIONS[attribute] * owner.embed_dim
        if attribute == "in_proj_weight":
            start = weight.offset // owner.embed_dim
        return NewBias(owner_name, "in_proj_bias", 3 * owner.embed_dim, start)
    parent_name, _, child = owner_name.rpartition(".")
    is_projection = (
        child == "out_proj"
        and path == parent_name
        and isinstance(model.get_submodule(parent_name), nn.MultiheadAttention)
    )
    if attribute == "weight" and owner._parameters.get("bias", owner) is None and isinstance(owner, _MAY_ADD_A_BIAS):
        if path == owner_name or is_projection:
            return NewBias(owner_name, "bias", outputs, 0)
        return f"its weight is used by '{path}' itself, which would leave an added bias out"
    return "it has no bias to put the shift in"
