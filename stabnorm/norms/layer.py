"""`NormLayer`: one normalization layer of a model, whatever its class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.calls import input_name, input_of
from stabnorm._models.masks import mask_for
from stabnorm.functional import Kind
from stabnorm.norms.rows import as_rows, from_rows, tokens_of

SIZE_NAMES = ("num_features", "num_channels", "normalized_shape", "hidden_size", "d_model", "dim")  # of an attribute


@dataclass(frozen=True, eq=False)
class NormLayer:
    """One normalization layer of a model, whatever its class.

    Tensors are read from the live module at each access, so they follow `load_state_dict`, `.to()` and replaced
    parameters.

    Args:
        name: Dotted name in the model, without what `torch.compile` and checkpoint wrappers add.
        module: The user's own module.
        kind: What it normalises over: "layer", "rms", "batch", "group" or "instance".
        channel_dim: Axis of the input that holds the channels: -1, 1, or counted from the end for InstanceNorm, which
            takes unbatched input, too.
        num_features: Number of channels; the product when several trailing dims hold them.
        eps: What is added to the variance.
        groups: GroupNorm's groups; `num_features` for InstanceNorm. Default: 1.
        feature_dims: How many trailing dims hold the channels: those that are normalised together, or those of a gain
            for each channel of each attention head. Default: 1.
        weight_name: Attribute that holds the weight; None when there is none. Default: "weight".
        bias_name: Attribute that holds the bias; None when there is none. Default: "bias".
        gain_offset: What is added to the weight before it multiplies; 1 for Gemma's `1 + weight`. Default: 0.
        goes_on: Whether the module does more behind the norm, as timm's ``BatchNormAct2d`` with its activation. What it
            returns is then not the norm's output. Default: False.
        any_width: Whether the module takes any number of channels. `num_features` is then what the model around it
            lets expect, 0 where that tells nothing, and the first call decides. Default: False.

    Example:
        >>> from stabnorm import find_norms
        >>> (layer,) = find_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
        >>> layer.name, layer.kind, layer.channel_dim, layer.num_features, layer.eps
        ('1', 'layer', -1, 8, 1e-05)
    """

    name: str
    module: nn.Module
    kind: Kind
    channel_dim: int
    num_features: int
    eps: float
    groups: int = 1
    feature_dims: int = 1
    weight_name: str | None = field(default="weight", repr=False)
    bias_name: str | None = field(default="bias", repr=False)
    gain_offset: float = field(default=0.0, repr=False)
    any_width: bool = field(default=False, repr=False)
    goes_on: bool = field(default=False, repr=False)
    _input_name: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        # Now, not at a call: a compiled graph cannot look at a signature.
        object.__setattr__(self, "_input_name", input_name(self.module))

    # --- its parameters and buffers ---

    @property
    def gain_parameter(self) -> nn.Parameter | None:
        """The parameter behind the gain, the one autograd gives gradients to."""
        return self._parameter(self.weight_name)

    @property
    def bias_parameter(self) -> nn.Parameter | None:
        """The parameter behind the bias."""
        return self._parameter(self.bias_name)

    @property
    def gain(self) -> Tensor | None:
        """The effective multiplier of each channel, shape (num_features,)."""
        weight = self._tensor(self.weight_name)
        if weight is None:
            return None
        return weight.flatten() + self.gain_offset if self.gain_offset else weight.flatten()

    @property
    def bias(self) -> Tensor | None:
        """What is added to each channel, shape (num_features,)."""
        bias = self._tensor(self.bias_name)
        return None if bias is None else bias.flatten()

    @property
    def running_mean(self) -> Tensor | None:
        """The running mean of each channel, where the module keeps one."""
        return self._tensor("running_mean")

    @property
    def running_var(self) -> Tensor | None:
        """The running variance of each channel, where the module keeps one."""
        return self._tensor("running_var")

    # --- its calls ---

    def input_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The norm's input among the arguments of a call, positional or by keyword; None where there is none.

        >>> norm = NormLayer("0", nn.LayerNorm(4), "layer", -1, 4, 1e-5)
        >>> norm.input_of((), {"input": "x"}), norm.input_of(("x",), {})
        ('x', 'x')
        """
        return input_of(args, kwargs, self._input_name)

    def rows(self, x: Tensor) -> Tensor:
        """An input of the norm as ``[rows, channels]``; a view where the layout allows."""
        return as_rows(x, self.channel_dim, self.feature_dims)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The input or output of this shape whose `rows` these are."""
        return from_rows(rows, shape, self.channel_dim, self.feature_dims)

    def valid(self, x: Tensor) -> Tensor | None:
        """Which tokens of an input are valid, by the active mask (`stabnorm.valid_tokens`) that fits; None: all are.

        Its shape is the input's without the channels. ``valid(x).reshape(-1)`` goes with ``rows(x)``.

        Raises:
            ValueError: a mask has the input's axes and batch, but not its length.
        """
        return mask_for(tokens_of(x.shape, self.channel_dim, self.feature_dims), self.name)

    def _parameter(self, attribute: str | None) -> nn.Parameter | None:
        if attribute is not None and self.module._parameters.get(attribute) is not None:
            return self.module._parameters[attribute]  # what the module reads may be computed from it
        value = self._tensor(attribute)
        return value if isinstance(value, nn.Parameter) else None

    def _tensor(self, attribute: str | None) -> Tensor | None:
        value = getattr(self.module, attribute, None) if attribute else None
        return value if isinstance(value, Tensor) else None


def eps_of(eps: float | None, weight: object) -> float:
    """Give eps as a number: None stands for the machine epsilon of the weight's dtype, as in torch's RMSNorm."""
    if eps is not None:
        return float(eps)
    return torch.finfo(weight.dtype if isinstance(weight, Tensor) else torch.float32).eps
