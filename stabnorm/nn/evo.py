"""EvoNorm-B0 and EvoNorm-S0: a norm and an activation in one, for convolutional nets (arXiv 2004.02967)."""

from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn

from stabnorm._checks import check_count, check_number
from stabnorm.errors import StabNormError
from stabnorm.nn._base import Float32Buffers
from stabnorm.ops.running import track_batch_

_AXES = (2, 3)


class _EvoNorm(Float32Buffers):
    """What both have: gain, bias, the learnt vector v, and the refusal to fold."""

    normalises: ClassVar[bool] = False  # its numerator is bent, so `find_norms` leaves it out

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__()
        check_count("num_features", num_features, hint=", the size of the channel axis")
        check_number("eps", eps, above=0)
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.v = nn.Parameter(torch.empty(num_features))

    def reset_parameters(self) -> None:
        """Reset the parameters."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.v)

    def fold_affine(self) -> NoReturn:
        """Raise StabNormError, because what x is divided by depends on x at inference, too."""
        raise StabNormError(
            f"{type(self).__name__} divides each image by what it computes from it, so no weight can do it"
        )

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} has num_features={self.num_features} and reads [N, C, H, W], but its input has "
                f"the shape {tuple(x.shape)}"
            )
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

    @staticmethod
    def _wide(parameter: Tensor) -> Tensor:
        return parameter[:, None, None]

    def _affine(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(self._wide(self.bias), y, self._wide(self.weight)).to(x.dtype)


class EvoNormB0(_EvoNorm):
    r"""EvoNorm-B0 (arXiv:2004.02967): the batch's variance, or a function of the image where that is larger.

    .. math:: y = \gamma\, \frac{x}{\max(\sqrt{\sigma^2_{n,h,w} + \epsilon},\;
              v x + \sqrt{\sigma^2_{h,w} + \epsilon})} + \beta

    It stands in the place of a batch norm and of the activation behind it. In eval the variance of the batch is the
    running one. It does not fold, because the variance of the image is computed at inference. Both variances are
    biased, so an image of one pixel has the variance 0 and not NaN.

    Args:
        num_features: number of channels, C.
        eps: added to the variances. Default: 1e-5.
        momentum: weight of a batch in the running variance. Default: 0.1.

    Shape:
        ``[N, C, H, W]`` to the same shape.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range.

    >>> EvoNormB0(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    running_var: Tensor
    step: Tensor
    skips: Tensor
    progress: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps)
        check_number("momentum", momentum, least=0, most=1)
        self.momentum = momentum
        self.register_buffer("running_var", torch.empty(num_features))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skips", torch.zeros((), dtype=torch.int64))
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64))  # see ops/running.py
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset parameters and the running variance."""
        super().reset_parameters()
        self.running_var.fill_(1)
        for counter in (self.step, self.skips, self.progress):
            counter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in training mode also update the running variance."""
        wide = self._checked(x)
        var = self.running_var
        if self.training:
            var = wide.var((0, *_AXES), correction=0)
            with torch.no_grad():
                count = var.new_full((), x.numel() // max(self.num_features, 1))
                track_batch_(
                    None, var, count, None, self.running_var, None, self.step, self.skips, self.progress, 0,
                    float(self.momentum), self.eps, True,
                )  # fmt: skip
        batch = self._wide(torch.sqrt(var + self.eps))
        image = torch.sqrt(wide.var(_AXES, correction=0, keepdim=True) + self.eps)
        return self._affine(wide / torch.maximum(batch, torch.addcmul(image, wide, self._wide(self.v))), x)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class EvoNormS0(_EvoNorm):
    r"""EvoNorm-S0 (arXiv:2004.02967): a group norm whose numerator is the Swish of x; it does not read the batch.

    .. math:: y = \gamma\, \frac{x\, \mathrm{sigmoid}(v x)}{\sqrt{\sigma^2_{h,w,c/g} + \epsilon}} + \beta

    It stands in the place of a norm and of the activation behind it. It does not fold, because the variance of the
    image is computed at inference. In our study with two images in a batch (docs/remedies.md) it ended with a higher
    loss than a batch norm; weight standardization with `nn.GroupNorm` or `BatchChannelNorm` ended with a lower one.

    Args:
        num_features: number of channels, C.
        groups: number of groups of channels. Default: 32, or all channels in one group each where there are fewer.
        eps: added to the variance. Default: 1e-5.

    Shape:
        ``[N, C, H, W]`` to the same shape.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range, or `groups` does not divide `num_features`.

    >>> norm, x = EvoNormS0(8, groups=2), torch.randn(4, 8, 5, 5)
    >>> torch.allclose(norm(x)[:1], norm(x[:1]), atol=1e-6)
    True
    """

    def __init__(self, num_features: int, groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        groups = min(32, num_features) if groups is None else groups
        check_count("groups", groups)
        if num_features % groups:
            raise ValueError(f"groups={groups} does not divide num_features={num_features}. Give a divisor")
        self.groups = groups
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        wide = self._checked(x)
        grouped = wide.unflatten(1, (self.groups, -1))
        std = torch.sqrt(grouped.var((2, 3, 4), correction=0, keepdim=True) + self.eps)
        swish = wide * torch.sigmoid(self._wide(self.v) * wide)
        return self._affine((swish.unflatten(1, (self.groups, -1)) / std).flatten(1, 2), x)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_features}, groups={self.groups}, eps={self.eps}"
