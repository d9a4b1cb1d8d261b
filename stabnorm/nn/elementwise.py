"""What others put in a norm's place: DyT and Derf, which squash each number, and SRMSNorm, which has no weights.

They are baselines. They compute no running statistics, and none of them is affine in eval, so they do not fold.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from stabnorm._checks import check_axis, check_count, check_number
from stabnorm.errors import StabNormError
from stabnorm.nn._base import TARGETS, Conversion, EvalAffineNorm, one_node
from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.norms import NormLayer, register_norm


class SquashingNorm(ChannelNorm):
    """Base of DyT and Derf: y = weight squash(x) + bias, for each number by itself.

    Args:
        num_features: number of channels, C.
        alpha: first value of the learnt scalar that multiplies x.
        channel_dim: axis of the input that holds the channels.
    """

    normalises: ClassVar[bool] = False  # `find_norms` leaves it out
    alpha: nn.Parameter

    def __init__(self, num_features: int, alpha: float, channel_dim: int) -> None:
        super().__init__(num_features, 0.0, channel_dim, sync=False)
        check_number("alpha", alpha, above=0)
        self.first_alpha = float(alpha)
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(num_features))
        self.alpha = nn.Parameter(torch.empty(1))  # one axis, so that it counts as a vector and gets no weight decay

    def reset_parameters(self) -> None:
        """Reset the parameters."""
        nn.init.constant_(self.alpha, self.first_alpha)
        super().reset_parameters()

    def reset_running_stats(self) -> None:
        """Do nothing, because there are none."""

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Squash each number; padding, too, because no number depends on another."""
        self.checked_mask(x, mask)
        return self.frozen(x)

    def squashed(self, x: Tensor) -> Tensor:
        """Return each number of x squashed."""
        raise NotImplementedError

    def frozen(self, x: Tensor) -> Tensor:
        """Run `forward`, in operations that TorchScript compiles."""
        wide = x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x
        y = torch.addcmul(self.bias, self.squashed(wide).transpose(self.channel_dim, -1), self.weight)
        return y.transpose(self.channel_dim, -1).to(x.dtype)

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Raise StabNormError, because there are none."""
        raise StabNormError(f"{type(self).__name__} has no running statistics")

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Raise StabNormError, because the norm is curved in each channel."""
        raise StabNormError(
            f"{type(self).__name__} bends each number, so it is no affine map in eval and no weight can do it. "
            "fold_gains folds its gain and bias; a norm that folds whole is convert_norms(to='prepbn')"
        )

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_features}, alpha={self.first_alpha:g}{self._common_repr()}"


class DyT(SquashingNorm):
    r"""Dynamic Tanh (arXiv:2503.10622): each number is squashed, and nothing is normalised.

    .. math:: y = \gamma \tanh(\alpha x) + \beta

    A baseline. It needs no statistics, and it does not fold. Reports on it differ: equal to LayerNorm in the paper's
    vision models; others found it unstable in language models, and unfit for post-norm blocks.

    Args:
        num_features: number of channels, C.
        alpha: first value of the learnt scalar. Default: 0.5, as in the paper.
        channel_dim: axis of the input that holds the channels. Default: -1.

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range.

    >>> norm = DyT(4)
    >>> x = torch.randn(2, 3, 4)
    >>> torch.equal(norm(x), torch.tanh(0.5 * x))
    True
    """

    def __init__(self, num_features: int, alpha: float = 0.5, *, channel_dim: int = -1) -> None:
        super().__init__(num_features, alpha, channel_dim)
        self.reset_parameters()

    def squashed(self, x: Tensor) -> Tensor:
        """Return tanh(alpha x)."""
        return torch.tanh(self.alpha * x)


class Derf(SquashingNorm):
    r"""Dynamic erf (arXiv:2512.10938): like DyT with the error function, and with a learnt shift.

    .. math:: y = \gamma\, \mathrm{erf}(\alpha x + s) + \beta

    A baseline, as `DyT`.

    Args:
        num_features: number of channels, C.
        alpha: first value of the learnt scalar. Default: 0.5.
        channel_dim: axis of the input that holds the channels. Default: -1.

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range.

    >>> norm = Derf(4)
    >>> x = torch.randn(2, 3, 4)
    >>> torch.equal(norm(x), torch.erf(0.5 * x))
    True
    """

    shift: nn.Parameter

    def __init__(self, num_features: int, alpha: float = 0.5, *, channel_dim: int = -1) -> None:
        super().__init__(num_features, alpha, channel_dim)
        self.shift = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the parameters."""
        nn.init.zeros_(self.shift)
        super().reset_parameters()

    def squashed(self, x: Tensor) -> Tensor:
        """Return erf(alpha x + s)."""
        return torch.erf(torch.addcmul(self.shift, x, self.alpha))


class SRMSNorm(EvalAffineNorm):
    r"""Simple rms norm (arXiv:2307.14995, TransNormerLLM): every token is divided by its rms; there are no weights.

    .. math:: y = x / \sqrt{\overline{x^2} + \epsilon}

    A baseline. It computes its statistic at inference, too, so it does not fold.

    Args:
        num_features: number of channels, C.
        eps: added to the mean square. Default: 1e-6.
        channel_dim: axis of the input that holds the channels. Default: -1.

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range.

    >>> y = SRMSNorm(8)(100 * torch.randn(5, 8))
    >>> torch.allclose(y.square().mean(-1), torch.ones(5))
    True
    """

    def __init__(self, num_features: int, eps: float = 1e-6, *, channel_dim: int = -1) -> None:
        super().__init__()
        check_count("num_features", num_features, hint=", the size of the channel axis")
        check_number("eps", eps, least=0)
        check_axis("channel_dim", channel_dim)
        self.num_features, self.eps, self.channel_dim = num_features, eps, channel_dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Divide each token by its rms."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.frozen(x)
        else:  # noqa: RET505  # TorchScript compiles no other branch
            return one_node(self, x, mask) if isinstance(x, Proxy) else self.frozen(x)

    def frozen(self, x: Tensor) -> Tensor:
        """Run `forward`, in operations that TorchScript compiles."""
        wide = x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x
        return (wide * torch.rsqrt(wide.square().mean(self.channel_dim, keepdim=True) + self.eps)).to(x.dtype)

    @classmethod
    def plan_from_norm(cls, layer: NormLayer, like: Tensor | None = None, **options: Any) -> Conversion:
        """Build the new module; the norm must have no gain and no bias that would be lost."""
        del like
        if layer.feature_dims > 1:
            raise StabNormError(f"it normalises {layer.feature_dims} axes together, and SRMSNorm one")
        if not layer.num_features:
            raise StabNormError("it does not know its number of channels")
        for name, value, neutral in (("gain", layer.gain, 1.0), ("bias", layer.bias, 0.0)):
            if value is not None and not bool((value == neutral).all()):
                raise StabNormError(
                    f"its {name} would be lost, because SRMSNorm has none. Convert before the training, or fold the "
                    "gains first (stabnorm.fold.fold_gains)"
                )
        new = cls(layer.num_features, channel_dim=layer.channel_dim, **options).train(layer.module.training)
        return Conversion("its weights are gone", lambda: new)

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Raise StabNormError, because there are none."""
        raise StabNormError("SRMSNorm has no running statistics")

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Raise StabNormError, because each token is divided by its own rms."""
        raise StabNormError("SRMSNorm divides every token by its own rms, so no weight can do it")

    def extra_repr(self) -> str:
        """Return the arguments."""
        channels = "" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}"
        return f"{self.num_features}, eps={self.eps}{channels}"


register_norm(SRMSNorm, "rms", channel_dim="channel_dim", weight=None, bias=None)
TARGETS["dyt"], TARGETS["derf"], TARGETS["srms"] = DyT, Derf, SRMSNorm
