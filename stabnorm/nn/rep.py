"""RepBN: batch norm with a skip path, which is one affine map in eval."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stabnorm.functional import BatchMoments, channel_affine
from stabnorm.nn._base import TARGETS
from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.nn._normalize import normalize
from stabnorm.norms import NormLayer, register_norm
from stabnorm.ops.rows import affine_of_rows
from stabnorm.ops.running import track_batch_

Init = Literal["vision", "language", "norm"]
WINDOW = 4  # of the outlier filter; Unified Normalization's


class RepBN(ChannelNorm):
    r"""BN(x) + eta x over the last dimension (arXiv:2405.11582, SLAB, eq. 4).

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \eta x

    In training mu and sigma are the batch's, over all valid tokens; in eval the running ones, and the whole is
    y = a x + b with a = gamma / sqrt(running_var + eps) + eta. A batch with anything non-finite, or with no valid
    token, leaves the running statistics as they are; so does a single token, which has no variance.

    Args:
        num_features: C.
        eps: added to the variance. Default: 1e-5.
        momentum: weight of the new value in the running statistics; None: a plain average. Default: 0.1.
        center: False leaves the mean out: scale only, no bias. The right choice for RMSNorm models, and it folds nearly
            everywhere. `running_var` then is the mean square. Default: True.
        filtration: "calibrated": an outlying batch does not enter the running statistics (Unified Normalization's
            filter); None: every finite batch does. Default: None.
        init: "vision": gamma = eta = 1, best from the first step on; "language": both 0, so that beside another norm
            it starts silent; "norm": gamma = 1 and eta = 0, plain batch norm, and in a `PRepBN` what its norm is.
            Default: "vision".
        channel_dim: axis of the input that holds the channels. Default: -1.
        sync: merge statistics over ranks. Default: False.

    Shape:
        ``[..., C]`` to the same, the axis `channel_dim` holding C; `mask` as the input without that axis.

    Raises:
        ValueError: an argument is out of range.

    >>> norm = RepBN(8)
    >>> x = torch.randn(4, 6, 8)
    >>> bool((norm(x) - x).var((0, 1), correction=0).sub(1).abs().max() < 1e-3)
    True
    >>> scale, shift, channel_dim = norm.eval().fold_affine()
    >>> torch.allclose(norm(x).double(), x * scale + shift, atol=1e-6)
    True
    """

    running_mean: Tensor | None
    running_var: Tensor
    window: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        center: bool = True,
        filtration: str | None = None,
        init: Init = "vision",
        channel_dim: int = -1,
        sync: bool = False,
    ) -> None:
        super().__init__(num_features, eps, channel_dim, sync)
        if init not in get_args(Init):
            raise ValueError(f"init={init!r} is unknown. Choose one of {', '.join(map(repr, get_args(Init)))}")
        check_filtration(filtration)
        self.momentum, self.center, self.filtration, self.init = momentum, center, filtration, init
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features)) if center else None
        self.eta = nn.Parameter(torch.empty(1))  # one axis, so that "no decay for vectors" covers it
        self.register_buffer("running_mean", torch.empty(num_features) if center else None)
        self.register_buffer("running_var", torch.empty(num_features))
        self.register_buffer("window", torch.empty(WINDOW, num_features) if filtration else None)
        self._add_counters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: parameters, statistics and counters."""
        nn.init.constant_(self.weight, 0.0 if self.init == "language" else 1.0)
        nn.init.constant_(self.eta, 1.0 if self.init == "vision" else 0.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forget the statistics."""
        if self.running_mean is not None:
            self.running_mean.zero_()
        self.running_var.fill_(1)
        if self.window is not None:
            self.window.fill_(1)
        self._reset_counters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training mode also gather statistics."""
        return self.apply_with(x, mask, self.weight, self.bias, self.eta)

    def apply_with(self, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, eta: Tensor) -> Tensor:
        """`forward` with these in the parameters' place; how PRepBN holds their gradients back."""
        rows, valid = self.rows_of(x, mask)
        if not self.training:
            y = self.eval_affine(rows, self.running_mean, self.running_var, weight, bias, eta)
            return self.like_input(y, x)
        moments, rstd = self.gather(rows, valid)
        y = normalize(rows, valid, weight, bias, eta, moments, rstd, self.sync)
        return self.like_input(y, x)

    @torch.no_grad()
    def gather(self, rows: Tensor, valid: Tensor | None) -> tuple[BatchMoments, Tensor]:
        """The batch's moments and 1 / sigma ``[C]``; the running statistics take the batch in."""
        moments = self.moments(rows, valid, center=self.center)
        track_batch_(
            moments.mean, moments.square, moments.rows, self.running_mean, self.running_var, self.window,
            self.step, self.skips, self.progress, 2 * WINDOW, -1.0 if self.momentum is None else self.momentum,
            self.eps, self.counts_steps,
        )  # fmt: skip
        return moments, torch.rsqrt(moments.square + self.eps)

    @torch.no_grad()
    def of_batch(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What training makes of x, as rows ``[R, C]``, and which rows count; the statistics stay as they are."""
        rows, valid = self.rows_of(x, mask)
        moments = self.moments(rows, valid, center=self.center)
        rstd = torch.rsqrt(moments.square + self.eps)
        scale, shift = channel_affine(self.weight, self.bias, self.eta, moments.mean, rstd)
        return affine_of_rows(rows, scale, shift), valid

    def input_branch(self) -> tuple[float, Tensor, Tensor, bool]:
        """Share of this norm in the output, all of it; its gain, its eta, and whether it takes the mean out."""
        return 1.0, self.weight, self.eta, self.center

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Mean and variance, or the mean square where the mean is not taken out."""
        return (self.running_var,) if self.running_mean is None else (self.running_mean, self.running_var)

    @classmethod
    def defaults_after(cls, layer: NormLayer) -> dict[str, Any]:
        """A burst stays out of the running statistics, and what follows an rms norm only scales."""
        return {"filtration": "calibrated", "center": layer.kind == "layer" or layer.bias is not None}

    def extra_repr(self) -> str:
        """Arguments that differ from the usual, too."""
        options = "" if self.center else ", center=False"
        options += f", filtration={self.filtration!r}" if self.filtration else ""
        options += f", init={self.init!r}" if self.init != "vision" else ""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}{options}{self._common_repr()}"


def check_filtration(filtration: str | None, known: tuple[str, ...] = ("calibrated",)) -> None:
    """Raise ValueError unless `filtration` is one there is."""
    if filtration == "official" and filtration not in known:
        raise ValueError(
            "filtration='official' belongs to UnifiedNorm(variant='official'); by itself it skips nearly every batch "
            "or none. Use filtration='calibrated', or that variant"
        )
    if filtration is not None and filtration not in known:
        raise ValueError(f"filtration={filtration!r} is unknown. Choose 'calibrated', or None for no filter")


register_norm(RepBN, "batch", channel_dim="channel_dim")
TARGETS["repbn"] = RepBN
