"""What a module computes, found out by running a copy of it: layer norm, rms norm, or something else.

`find_norms` asks this of classes that it knows neither by registration nor by type. The user's module is only read.
"""

import contextlib
import copy
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 16 tokens whose rms runs from 1e-6 to 10: any eps of 1e-12 or more changes the outcome for some of them.
_TOKEN_RMS = torch.logspace(-6, 1, 8, dtype=torch.float64).repeat(2)
_LAYOUTS = ((-1, (2, 8)), (1, (2, 2, 4)), (1, (2, 8)), (1, (2, 2, 2, 2)))  # channel_dim, and the axes of the 16 tokens
_CUSTOMARY_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-7, 1e-3, torch.finfo(torch.float32).eps)
_SIZE_NAMES = ("normalized_shape", "num_features", "num_channels", "hidden_size", "d_model", "dim")
_NORMALIZE: dict[Literal["layer", "rms"], Callable[..., Tensor]] = {"layer": F.layer_norm, "rms": F.rms_norm}


class Formula(NamedTuple):
    """The norm that a module computes, and which of its tensors play which role in it."""

    kind: Literal["layer", "rms"]
    channel_dim: int
    num_features: int
    eps: float
    weight_name: str | None
    bias_name: str | None
    gain_offset: float


def probe(module: nn.Module) -> Formula | None:
    """Run a copy of a module on random input, and find the norm that explains its output.

    Args:
        module: Any module; neither it nor the random state changes.

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
    try:
        if not _may_run(module):
            return None
        stand_ins = _stand_ins(module, generator)
        num_features = _num_features(module, stand_ins)
        tokens = torch.randn(len(_TOKEN_RMS), num_features, generator=generator, dtype=torch.float64, device="cpu")
        tokens = (tokens + 0.5) * _TOKEN_RMS[:, None]  # + 0.5: a mean, which tells layer norm from rms norm
        twin = _copy(module, stand_ins)
    except Exception:  # among it the module's own code, which may raise anything
        return None
    values = {name: tensor.flatten().double().cpu() for name, tensor in stand_ins.items()}
    own_eps = [value for name, value in vars(module).items() if "eps" in name.lower() and isinstance(value, float)]
    for channel_dim, output in _outputs(twin, tokens, stand_ins):
        for eps, kind in itertools.product((*own_eps, *_CUSTOMARY_EPS), _NORMALIZE):
            normalized = _NORMALIZE[kind](tokens, (num_features,), eps=eps)
            for weight, bias, gain_offset in _roles(list(values)):
                expected = normalized * (values[weight] + gain_offset) if weight else normalized
                expected = expected + values[bias] if bias else expected
                if torch.allclose(output, expected, rtol=1e-4, atol=1e-4):  # room for fp32; a wrong formula is far off
                    return Formula(kind, channel_dim, num_features, eps, weight, bias, gain_offset)
    return None


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
        name: (torch.rand(tensor.shape, generator=generator, device="cpu") + 0.5).to(
            "cpu" if tensor.is_meta else tensor.device  # on meta nothing can be computed
        )
        for name, tensor in _own_tensors(module)
        if tensor.is_floating_point()
    }


def _num_features(module: nn.Module, stand_ins: dict[str, Tensor]) -> int:
    """Give the size that all its tensors share, or else what an attribute says; raise where neither tells."""
    if stand_ins:
        (num_features,) = {tensor.numel() for tensor in stand_ins.values()}
    else:
        sizes = (getattr(module, name, None) for name in _SIZE_NAMES)
        shapes = ((size,) if isinstance(size, int) and size > 4 else size for size in sizes)  # up to 4 may be an axis
        num_features = math.prod(next(shape for shape in shapes if isinstance(shape, tuple)))
    if num_features < 2:
        raise ValueError("one number for all channels, as in ScaleNorm: the width is not known")
    return num_features


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


def _outputs(twin: nn.Module, tokens: Tensor, stand_ins: dict[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Run the copy on the tokens, in each layout that it takes."""
    device = next((tensor.device for tensor in stand_ins.values()), torch.device("cpu"))
    for channel_dim, axes in _LAYOUTS:
        x = tokens.float().reshape(*axes, -1).movedim(-1, channel_dim).contiguous().to(device)
        y: object = None
        with (
            contextlib.suppress(Exception),  # it does not take this layout
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            y = twin(x)
        if isinstance(y, Tensor) and y.shape == x.shape:
            yield channel_dim, y.movedim(channel_dim, -1).reshape(tokens.shape).double().cpu()


def _roles(names: Sequence[str]) -> Iterator[tuple[str | None, str | None, float]]:
    """List every (weight, bias, gain_offset): a tensor's role is what it does, whatever its name."""
    for weight, bias in itertools.product((*names, None), repeat=2):
        if weight is None or weight != bias:
            yield from ((weight, bias, gain_offset) for gain_offset in ((0.0, 1.0) if weight else (0.0,)))
