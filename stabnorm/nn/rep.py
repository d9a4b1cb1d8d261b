"""RepBN: batch norm with a skip path, which is one affine map in eval."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stabnorm._checks import check_choice, check_flag, check_number
from stabnorm._models.ranks import gather_over_ranks
from stabnorm.functional import BatchMoments, channel_affine
from stabnorm.functional.norms import absolute_moments
from stabnorm.nn._base import TARGETS
from stabnorm.nn._branch import Branch
from stabnorm.nn._normalize import normalize
from stabnorm.norms import NormLayer, register_norm
from stabnorm.ops.rows import absolute_of_rows, affine_of_rows
from stabnorm.ops.running import track_batch_

Init = Literal["vision", "language", "norm"]
Deviation = Literal["l2", "l1"]
WINDOW = 4  # batches in the window of the outlier filter, as in Unified Normalization


class RepBN(Branch):
    r"""BN(x) + eta x over the last dimension (arXiv:2405.11582, SLAB, eq. 4).

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \eta x

    In training mu and sigma are those of the batch, over all valid tokens. In eval they are the running ones, and the
    norm is y = a x + b with a = gamma / sqrt(running_var + eps) + eta. A batch with a value that is not finite, without
    a valid token, or with only one token, which has no variance, does not change the running statistics.

    With ``statistic="l1"`` sigma comes from the mean absolute deviation (arXiv:2411.10948, arXiv:1802.09769), in
    which an outlier weighs less:

    .. math:: \sigma = \sqrt{\pi / 2}\; \overline{|x - \mu|}

    which is the standard deviation where x is Gaussian. eps enters as above, and `running_var` is this sigma squared.

    Args:
        num_features: number of channels, C.
        eps: added to the variance. Default: 1e-5.
        momentum: weight of the new value in the running statistics; None takes a plain average. Default: 0.1.
        center: False subtracts no mean and has no bias, so the norm only scales. This is the right choice for models
            with RMSNorm, and it folds almost everywhere. `running_var` is then the mean square. Default: True.
        filtration: "calibrated" keeps outlier batches out of the running statistics (the filter of Unified
            Normalization); with None every finite batch enters them. Default: None.
        init: "vision" starts with gamma = eta = 1, which is best for a training from the first step. "language" starts
            with both 0, so that RepBN adds nothing beside another norm at first. "norm" starts with gamma = 1 and eta =
            0, a plain batch norm, and in a `PRepBN` with the gain and bias of its norm. Default: "vision".
        statistic: "l2" takes the standard deviation for sigma, "l1" the mean absolute deviation. Default: "l2".
        channel_dim: axis of the input that holds the channels. Default: -1.
        sync: merge statistics over ranks. Default: False.

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        TypeError: an argument has another type.
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
        statistic: Deviation = "l2",
        channel_dim: int = -1,
        sync: bool = False,
    ) -> None:
        super().__init__(num_features, eps, channel_dim, sync)
        if momentum is not None:
            check_number("momentum", momentum, least=0, most=1, hint=", or None for a plain average")
        check_flag("center", center)
        check_choice("init", init, get_args(Init))
        check_choice("statistic", statistic, get_args(Deviation))
        check_filtration(filtration)
        self.momentum, self.center, self.filtration, self.init = momentum, center, filtration, init
        self.statistic = statistic
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features)) if center else None
        self.eta = nn.Parameter(torch.empty(1))  # one axis, so that it counts as a vector and gets no weight decay
        self.register_buffer("running_mean", torch.empty(num_features) if center else None)
        self.register_buffer("running_var", torch.empty(num_features))
        self.register_buffer("window", torch.empty(WINDOW, num_features) if filtration else None)
        self._add_counters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset parameters, statistics and counters."""
        self.without_numbers = self.weight.is_meta
        nn.init.constant_(self.weight, 0.0 if self.init == "language" else 1.0)
        nn.init.constant_(self.eta, 1.0 if self.init == "vision" else 0.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Reset the running statistics."""
        if self.running_mean is not None:
            self.running_mean.zero_()
        self.running_var.fill_(1)
        if self.window is not None:
            self.window.fill_(1)
        self._reset_counters()

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise; in training mode also update the statistics."""
        return self.apply_with(x, mask, *self.blended_parameters())

    def blended_parameters(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weight, eta and bias."""
        return self.weight, self.eta, self.bias

    def frozen_affine(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and shift of eval mode, in the buffers' precision."""
        rstd = torch.rsqrt(self.running_var + self.eps)
        return channel_affine(self.weight, self.bias, self.eta, self.running_mean, rstd)

    def apply_with(self, x: Tensor, mask: Tensor | None, weight: Tensor, eta: Tensor, bias: Tensor | None) -> Tensor:
        """Run `forward` with other tensors for the parameters; PRepBN controls their gradients in this way."""
        rows, valid = self.rows_of(x, mask)
        if not self.training:
            y = self.eval_affine(rows, self.running_mean, self.running_var, weight, bias, eta)
            return self.like_input(y, x)
        moments, rstd = self.gather(rows, valid)
        y = normalize(rows, valid, weight, bias, eta, moments, rstd, self.sync)
        return self.like_input(y, x)

    @property
    def fits_blended_kernels(self) -> bool:
        """Whether `stabnorm.ops.blended` computes what this module does, so that a `PRepBN` may call it."""
        return self.training and self.statistic == "l2" and type(self).apply_with is RepBN.apply_with

    @torch.no_grad()
    def moments(self, rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
        """The batch's moments; with `statistic` "l1" those of `absolute_moments`, around the mean of all ranks."""
        moments = super().moments(rows, valid, center=center)
        if self.statistic == "l2":
            return moments
        sums = torch.stack(absolute_of_rows(rows, moments.mean, valid))
        return absolute_moments(moments, *(gather_over_ranks(sums).sum(0) if self.sync else sums))

    @torch.no_grad()
    def gather(self, rows: Tensor, valid: Tensor | None) -> tuple[BatchMoments, Tensor]:
        """Return the batch's moments and 1 / sigma ``[C]``, and update the running statistics."""
        moments = self.moments(rows, valid, center=self.center)
        track_batch_(
            moments.mean, moments.square, moments.rows, self.running_mean, self.running_var, self.window,
            self.step, self.skips, self.progress, 2 * WINDOW, -1.0 if self.momentum is None else self.momentum,
            self.eps, self.counts_steps,
        )  # fmt: skip
        return moments, torch.rsqrt(moments.square + self.eps)

    @torch.no_grad()
    def of_batch(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the training output as rows ``[R, C]``, and which rows are valid, without updating statistics."""
        rows, valid = self.rows_of(x, mask)
        moments = self.moments(rows, valid, center=self.center)
        rstd = torch.rsqrt(moments.square + self.eps)
        scale, shift = channel_affine(self.weight, self.bias, self.eta, moments.mean, rstd)
        return affine_of_rows(rows, scale, shift), valid

    def input_branch(self) -> tuple[float, Tensor, Tensor, bool]:
        """Share of this norm in the output, all of it; its gain, its eta, and whether it takes the mean out."""
        return 1.0, self.weight, self.eta, self.center

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Return mean and variance, or only the mean square if the norm is not centred."""
        return (self.running_var,) if self.running_mean is None else (self.running_mean, self.running_var)

    @classmethod
    def defaults_after(cls, layer: NormLayer) -> dict[str, Any]:
        """Filter outliers, so that a burst does not enter the running statistics; only scale after an rms norm."""
        return {"filtration": "calibrated", "center": layer.kind == "layer" or layer.bias is not None}

    def extra_repr(self) -> str:
        """Return the arguments; some only if they differ from their default."""
        options = "" if self.center else ", center=False"
        options += f", filtration={self.filtration!r}" if self.filtration else ""
        options += f", init={self.init!r}" if self.init != "vision" else ""
        options += f", statistic={self.statistic!r}" if self.statistic != "l2" else ""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}{options}{self._common_repr()}"


def check_filtration(filtration: Any, known: tuple[str, ...] = ("calibrated",)) -> None:
    """Raise ValueError for an unknown `filtration`."""
    if isinstance(filtration, str) and filtration == "official" and filtration not in known:
        raise ValueError(
            "filtration='official' belongs to UnifiedNorm(variant='official'); by itself it skips nearly every batch "
            "or none. Use filtration='calibrated', or that variant"
        )
    if filtration is not None:
        check_choice("filtration", filtration, known, ", or None for no filter")


register_norm(RepBN, "batch", channel_dim="channel_dim")
TARGETS["repbn"] = RepBN
