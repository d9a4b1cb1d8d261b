"""What a module computes, found out by running a copy of it: layer, rms, group, instance or batch norm, or no norm.

`find_norms` asks this of classes that it knows neither by registration nor by type. The user's module is only read.
"""

import contextlib
import copy
import inspect
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabnorm._models.ambient import plain_context
from stabnorm.functional import Kind
from stabnorm.norms.layer import SIZE_NAMES, NormLayer
from stabnorm.norms.torch_own import of_torch_class

# The axes of the input, None for the channels. Sizes are drawn so that no two axes agree: a norm over another axis than
# the channels computes something else then.
_LAYOUTS: tuple[tuple[int | None, ...], ...] = (
    (0, 1, None), (0, None, 1, 2), (0, None, 1), (0, None, 1, 2, 3), (0, None)
)  # fmt: skip
_IMAGE = (0, 1, 2, None)
_SIZES = (3, 5, 2, 7, 11, 13)
_ANY_WIDTH = 17  # no customary width, and none of the sizes
_CUSTOMARY_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-7, 1e-3, torch.finfo(torch.float32).eps)
_RUNNING = ("running_mean", "running_var")


class Formula(NamedTuple):
    """The norm that a module computes, and which of its tensors play which role in it."""

    kind: Kind
    channel_dim: int
    num_features: int
    eps: float
    weight_name: str | None
    bias_name: str | None
    gain_offset: float
    groups: int = 1
    feature_dims: int = 1
    any_width: bool = False
    goes_on: bool = False


def probe(module: nn.Module) -> Formula | None:
    """Run a copy of a module on random input, and find the norm that explains its output.

    A module without a tensor that has the channels' size may take any width. Then `any_width` is True, and
    `num_features` is what an attribute says, or 0.

    Args:
        module: Any module; neither it nor the random state changes. Default dtype and device, autocast, gradient,
            inference and deterministic mode do not change the answer.

    Returns:
        The formula; None if the module computes anything else, cannot be copied, or raises.

    Example:
        >>> class PlusOneNorm(nn.LayerNorm):
        ...     def forward(self, x):
        ...         return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)
        >>> formula = probe(PlusOneNorm(8))
        >>> formula.kind, formula.eps, formula.gain_offset
        ('layer', 1e-05, 1.0)
        >>> probe(nn.Tanh()) is None
        True
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with plain_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin, stand_ins = _twin(module, generator)
        if twin is None:
            return None
        sizes = {tensor.numel() for tensor in stand_ins.values()}
        told = _told(module)
        if sizes:
            told = sizes.pop()
            formula = None if sizes or told < 2 else _explain(twin, told, stand_ins, generator)  # 1: as in ScaleNorm
            formula = formula or _explain_heads(twin, stand_ins, generator)
            if formula is None or formula.weight_name or formula.bias_name or formula.kind == "batch":
                return formula  # else it does not use what it holds
        free = [_explain(twin, _ANY_WIDTH, stand_ins, generator, layouts) for layouts in (_LAYOUTS, [_IMAGE])]
        if free[0] is None:
            return _explain(twin, told, stand_ins, generator) if told else None
        # Over an axis that is not always the last one: channels, or time? Nothing here can tell.
        return None if free[0] != free[1] else free[0]._replace(num_features=told, any_width=True)


def probe_applied(module: nn.Module) -> Formula | None:
    """Find the batch, group or instance norm that a class derived from torch's applies to its input.

    What the class does behind it may be anything: timm's ``BatchNormAct2d`` ends in an activation. A layer norm is not
    looked for, because whoever takes such a module for a layer norm may convert it, and lose what comes behind.

    Args:
        module: Any module; neither it nor the random state changes.

    Returns:
        The formula, with `goes_on` if the output is not the norm's; None for any other class, for one that prepares its
        input, and for one that cannot be run.

    Example:
        >>> class ActivatedNorm(nn.BatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> formula = probe_applied(ActivatedNorm(8))
        >>> formula.kind, formula.num_features, formula.goes_on
        ('batch', 8, True)
    """
    norm = of_torch_class("", module)
    if norm is None or norm.kind in ("layer", "rms"):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    with plain_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin, stand_ins = _twin(module, generator)
        if twin is None:
            return None
        device = next((tensor.device for tensor in stand_ins.values()), torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []
        for layout in _LAYOUTS[1:-1]:  # of two axes, the last is the second, too
            sizes = [norm.num_features if size is None else _SIZES[size] for size in layout]
            x = _input(sizes, layout.index(None), generator).to(device, torch.float32)
            calls, y = _NormCalls(), None
            with contextlib.suppress(Exception), torch.random.fork_rng(devices), calls:
                y = twin(x.clone())  # an exception: it does not take this layout
            if isinstance(y, Tensor):
                break
    if not isinstance(y, Tensor) or len(calls.seen) != 1 or not _applies(calls.seen[0], twin, norm, x):
        return None
    goes_on = y.shape != x.shape or not torch.equal(y.float(), calls.outputs[0].float())
    weight, bias = (name if getattr(module, name, None) is not None else None for name in ("weight", "bias"))
    return Formula(
        norm.kind, norm.channel_dim, norm.num_features, norm.eps, weight, bias, 0.0, norm.groups, goes_on=goes_on
    )


class _NormCalls(TorchFunctionMode):
    """Notes the arguments and the output of each call of one of torch's norms."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Mapping[str, Any]] = []
        self.outputs: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function in (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm):
            bound = inspect.signature(function).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.seen.append(bound.arguments)
            self.outputs.append(output.clone())  # an activation may write into it
        return output


def _applies(call: Mapping[str, Any], twin: nn.Module, norm: NormLayer, x: Tensor) -> bool:
    """Whether a call normalises a module's own input with its own parameters."""
    parts = {"weight": twin.weight, "bias": twin.bias}
    if norm.kind == "batch":
        parts |= {"running_mean": twin.running_mean, "running_var": twin.running_var}
    own = all(call.get(name) is part for name, part in parts.items())
    groups = call.get("num_groups", norm.groups) == norm.groups
    return own and groups and call["eps"] == norm.eps and torch.equal(call["input"], x)


def _twin(module: nn.Module, generator: torch.Generator) -> tuple[nn.Module | None, dict[str, Tensor]]:
    """Give a copy that may be run, and the stand-ins for its tensors; no copy where that cannot be."""
    try:
        if _may_run(module):
            stand_ins = _stand_ins(module, generator)
            return _copy(module, stand_ins), stand_ins
    except Exception:  # among it the module's own code, which may raise anything
        pass
    return None, {}


def _may_run(module: nn.Module) -> bool:
    if "forward" in vars(module):  # it was set on the object: a copy's might still run the user's own module
        return False
    if any("." in name for name, _ in module.named_parameters()):  # a child has weights: this is more than a norm
        return False
    inputs = inspect.signature(module.forward).parameters.values()
    # A second input, even an optional one, is a gate, a residual or a condition, on which the output depends.
    return sum(each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in inputs) == 1


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))


def _stand_ins(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a random float32 tensor for each floating one of the module: with ones, weight and 1 + weight look alike."""
    return {
        name: (torch.rand(tensor.shape, generator=generator) + 0.5).to(
            "cpu" if tensor.is_meta else tensor.device  # on meta nothing can be computed
        )
        for name, tensor in _own_tensors(module)
        if tensor.is_floating_point()
    }


def _told(module: nn.Module) -> int:
    """Give the width that an attribute tells; 0 where none does."""
    sizes = (getattr(module, name, None) for name in SIZE_NAMES)
    shapes = ((size,) if isinstance(size, int) and size > 4 else size for size in sizes)  # up to 4 may be an axis
    return math.prod(next((shape for shape in shapes if isinstance(shape, tuple) and shape), (0,)))


def _copy(module: nn.Module, stand_ins: dict[str, Tensor]) -> nn.Module:
    """Copy the module with the stand-ins for its tensors, and without its hooks."""
    memo: dict[int, Any] = {
        id(value): type(value)()
        for part in module.modules()
        for name, value in vars(part).items()
        if "_hooks" in name and isinstance(value, dict)  # a hook may refer to something large
    }
    for name, tensor in _own_tensors(module):
        if name in stand_ins:
            memo[id(tensor)] = nn.Parameter(stand_ins[name]) if isinstance(tensor, nn.Parameter) else stand_ins[name]
    return copy.deepcopy(module, memo).eval()


def _explain(
    twin: nn.Module,
    width: int,
    stand_ins: Mapping[str, Tensor],
    generator: torch.Generator,
    layouts: Sequence[tuple[int | None, ...]] = _LAYOUTS,
) -> Formula | None:
    """Run the copy in each layout that it takes, and compare its output with every norm."""
    values = {name: tensor.flatten().double().cpu() for name, tensor in stand_ins.items() if tensor.numel() == width}
    device = next((tensor.device for tensor in stand_ins.values()), torch.device("cpu"))
    sizes, accepted = [size for size in _SIZES if size != width], False
    for layout in layouts:
        axis = layout.index(None)
        x = _input([width if size is None else sizes[size] for size in layout], axis, generator)
        channel_dim = -1 if layout[-1] is None and len(layout) > 2 else 1
        y: object = None
        with contextlib.suppress(Exception), torch.random.fork_rng([device] if device.type == "cuda" else []):
            y = twin(x.to(device, torch.float32, copy=True))  # an exception: it does not take this layout
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
            continue
        if len(layout) == 2 and accepted:
            break  # two axes are too few to tell a norm over the last one from a norm over the second
        accepted = True
        output = y.double().cpu().movedim(axis, -1)
        for eps, (kind, groups) in itertools.product(_eps_of(twin), _kinds(twin, width)):
            normalized = _normalized(kind, groups, x, axis, eps, values)
            if normalized is None:
                continue
            role = _role(output, normalized, values)
            if role is not None:
                dim = channel_dim if kind != "instance" else axis - len(layout)
                return Formula(kind, dim, width, eps, *role, groups)
    return None


def _explain_heads(twin: nn.Module, stand_ins: Mapping[str, Tensor], generator: torch.Generator) -> Formula | None:
    """Find a norm over the last axis whose gain has an axis more, such as one gain for each attention head."""
    shapes = {tensor.shape for tensor in stand_ins.values()}
    shape = shapes.pop()
    if shapes or len(shape) < 2 or 1 in shape:  # an axis of 1 stands for any size
        return None
    values = {name: tensor.double().cpu() for name, tensor in stand_ins.items()}
    device = next(iter(stand_ins.values())).device
    x = _input([*_SIZES[:2], *shape], len(shape) + 1, generator)
    y: object = None
    with contextlib.suppress(Exception):  # it takes no such input
        y = twin(x.to(device, torch.float32, copy=True))
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for eps, (kind, _) in itertools.product(_eps_of(twin), _kinds(twin, shape[-1])[:2]):
        normalized = _normalized(kind, 1, x, x.ndim - 1, eps, {})
        role = None if normalized is None else _role(y.double().cpu(), normalized, values)
        if role is not None:
            return Formula(kind, -1, math.prod(shape), eps, *role, feature_dims=len(shape))
    return None


def _role(
    output: Tensor, normalized: Tensor, values: Mapping[str, Tensor]
) -> tuple[str | None, str | None, float] | None:
    """Say which tensors are weight and bias, and what is added to the weight; None if nothing explains the output."""
    for weight, bias, gain_offset in _roles([name for name in values if name not in _RUNNING]):
        expected = normalized * (values[weight] + gain_offset) if weight else normalized
        expected = expected + values[bias] if bias else expected
        if torch.allclose(output, expected, rtol=1e-4, atol=1e-4):  # room for fp32; a wrong formula is far off
            return weight, bias, gain_offset
    return None


def _eps_of(twin: nn.Module) -> list[float]:
    """List the values that eps may have, those that the module holds first."""
    own = [value for name, value in vars(twin).items() if "eps" in name.lower() and isinstance(value, float)]
    return list(dict.fromkeys((*own, *_CUSTOMARY_EPS)))


def _input(shape: Sequence[int], channel_dim: int, generator: torch.Generator) -> Tensor:
    """Draw an input whose samples and tokens have very different scales, so that any eps of 1e-12 or more shows.

    Its mean is not 0: a mean tells layer norm from rms norm.
    """
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5
    tokens = [1 if axis in (0, channel_dim) else size for axis, size in enumerate(shape)]
    scales = torch.logspace(-6, 1, math.prod(tokens), dtype=torch.float64).reshape(tokens)
    samples = torch.logspace(0, -5, shape[0], dtype=torch.float64)
    if math.prod(tokens) == 1:  # no tokens but the samples
        scales, samples = torch.ones(tokens, dtype=torch.float64), torch.logspace(1, -6, shape[0], dtype=torch.float64)
    return x * scales * samples.reshape(-1, *[1] * (len(shape) - 1))


def _kinds(twin: nn.Module, width: int) -> list[tuple[Kind, int]]:
    told = (getattr(twin, name, None) for name in ("num_groups", "groups", "group"))
    groups = {1, *(count for count in told if isinstance(count, int) and count > 0 and width % count == 0)}
    return [
        ("layer", 1),
        ("rms", 1),
        ("batch", 1),
        *(("group", count) for count in sorted(groups)),
        ("instance", width),
    ]


def _normalized(
    kind: Kind, groups: int, x: Tensor, channel_dim: int, eps: float, values: Mapping[str, Tensor]
) -> Tensor | None:
    """Normalise with channels last; None where the kind does not take this layout."""
    last = x.movedim(channel_dim, -1)
    width = (last.shape[-1],)
    if kind in ("layer", "rms"):
        return F.layer_norm(last, width, eps=eps) if kind == "layer" else F.rms_norm(last, width, eps=eps)
    if kind == "batch":
        if all(name in values for name in _RUNNING):
            return (last - values["running_mean"]) * torch.rsqrt(values["running_var"] + eps)
        return F.batch_norm(last.reshape(-1, *width), None, None, training=True, eps=eps).reshape(last.shape)
    if channel_dim != 1 or x.ndim < 3:
        return None
    return F.group_norm(x, groups, eps=eps).movedim(1, -1)


def _roles(names: Sequence[str]) -> Iterator[tuple[str | None, str | None, float]]:
    """List every (weight, bias, gain_offset): a tensor's role is what it does, whatever its name."""
    for weight, bias in itertools.product((*names, None), repeat=2):
        if weight is None or weight != bias:
            yield from ((weight, bias, gain_offset) for gain_offset in ((0.0, 1.0) if weight else (0.0,)))
