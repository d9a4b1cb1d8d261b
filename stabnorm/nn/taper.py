"""TaperNorm: a norm that tapers to one number times its input and gains; a mixin over the norm's own class."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stabnorm._checks import check_flag, check_number
from stabnorm._models.ranks import gather_over_ranks
from stabnorm.errors import StabNormError
from stabnorm.nn._base import TARGETS
from stabnorm.nn._branch import Branch
from stabnorm.nn._progressive import EvalMode, ProgressiveNorm, checked_shape
from stabnorm.norms import NormLayer, find_norms
from stabnorm.norms.rows import as_rows
from stabnorm.ops.rows import affine_of_rows, widened
from stabnorm.ops.running import track_batch_


class CalibratedScale(Branch):
    r"""y = c gamma x + beta, with a number c that comes from a norm: the branch `rep` of a `TaperNorm`.

    Args:
        num_features: number of channels, C.
        momentum: weight of a batch in the averages behind c; None takes a plain average. Default: 0.01.
        bias: whether there is a beta. Default: True.
        channel_dim: axis of the input that holds the channels. Default: -1.
        sync: merge the averages over ranks. Default: False.

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range.

    >>> branch, x = CalibratedScale(4), torch.randn(5, 4)
    >>> branch.calibrate(x, 3 * x, None, torch.ones(()))
    >>> torch.allclose(branch(x), 3 * x)
    True
    """

    normalises: ClassVar[bool] = False  # `find_norms` leaves it out
    averages: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.01,
        *,
        bias: bool = True,
        channel_dim: int = -1,
        sync: bool = False,
    ) -> None:
        super().__init__(num_features, 0.0, channel_dim, sync)
        if momentum is not None:
            check_number("momentum", momentum, above=0, most=1, hint=", or None for a plain average")
        check_flag("bias", bias)
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features)) if bias else None
        # The averages of <gamma x, norm> and |gamma x|^2 over tokens. No axis is as long as that of the channels may
        # be, so that a norm that learns its width from its first input does not resize it.
        self.register_buffer("averages", torch.empty(2, 1))
        self._add_counters()
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget what c was calibrated with; c is then 1."""
        self.averages.zero_()
        self._reset_counters()

    @property
    def scale(self) -> Tensor:
        """The number c, ``[1]``; 1 as long as nothing was seen."""
        product, square = self.averages.unbind()
        return torch.where(square > 0, product / square, 1)

    @torch.no_grad()
    def calibrate(self, scaled: Tensor, target: Tensor, valid: Tensor | None, lam: Tensor) -> None:
        """Add a batch to the averages behind c, unless lam has left 1.

        Args:
            scaled: gamma x, ``[R, C]``.
            target: what the norm made of x, without its bias, ``[R, C]``.
            valid: which rows are valid, ``[R]`` bool or None for all.
            lam: the share of the norm, ``[]``.
        """
        products = torch.stack([(scaled * target).sum(1), scaled.square().sum(1)])
        if valid is None:
            count = products.new_full((), products.shape[1])
        else:
            products, count = torch.where(valid, products, 0), valid.sum().to(products.dtype)
        sums = torch.cat([products.sum(1), count[None]])
        if self.sync:
            sums = gather_over_ranks(sums).sum(0)
        count = sums[2]
        mean = (sums[:2] / count.clamp(min=1))[:, None]
        # A schedule that begins below 1 calibrates with its first batch. A batch that is not finite is always skipped.
        learning = (lam == 1) | (self.averages[1] == 0) | ~torch.isfinite(mean).all()
        now = torch.where(learning, mean, self.averages.to(mean.dtype))
        track_batch_(
            None, now, count, None, self.averages, None, self.step, self.skips, self.progress, 0,
            -1.0 if self.momentum is None else self.momentum, 0.0, self.counts_steps,
        )  # fmt: skip

    def blended_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias."""
        return self.weight, self.bias

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Scale each channel."""
        return self.apply_with(x, mask, *self.blended_parameters())

    def apply_with(self, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run `forward` with other tensors for the parameters."""
        rows, valid = self.rows_of(x, mask)
        wide = widened(rows)
        if valid is not None:  # padding of any value, times an upstream gradient of 0, adds nothing to the gain's
            wide = torch.where(valid[:, None] | torch.isfinite(wide), wide, 0)
        scale = (weight * self.scale).to(wide.dtype)
        y = wide * scale if bias is None else torch.addcmul(bias.to(wide.dtype), wide, scale)
        return self.like_input(y.to(rows.dtype), x)

    def frozen_affine(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and shift, in the buffers' precision."""
        return self.weight * self.scale, self.bias

    def of_batch(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the output as rows ``[R, C]``, and which rows are valid."""
        rows, valid = self.rows_of(x, mask)
        return affine_of_rows(rows, *self.frozen_affine()), valid

    def input_branch(self) -> tuple[float, Tensor, Tensor, bool]:
        """Share of this map in the output, all of it; no gain on a normalised input; c gamma on the input itself."""
        return 1.0, torch.zeros_like(self.weight), self.weight * self.scale, False

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Raise StabNormError: what c stands for is the norm, which runs no more."""
        raise StabNormError("its scale is calibrated with the norm, at lam = 1; there is nothing to recalibrate")

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Return ``(scale, shift, channel_dim)``, in float64.

        Raises:
            StabNormError: a value is not finite, or the width is not known yet.
        """
        self.check_width()
        product, square = self.averages.detach().double().unbind()
        scale = self.weight.detach().double() * torch.where(square > 0, product / square, 1)
        shift = torch.zeros_like(scale) if self.bias is None else self.bias.detach().double()
        if not (torch.isfinite(scale).all() and torch.isfinite(shift).all()):
            raise StabNormError(f"{type(self).__name__} holds a gain, a bias or a scale that is not finite")
        return scale, shift, self.channel_dim

    @classmethod
    def defaults_after(cls, layer: NormLayer) -> dict[str, Any]:
        """Have a bias if the norm has one."""
        return {"bias": layer.bias is not None}

    def extra_repr(self) -> str:
        """Return the arguments; some only if they differ from their default."""
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.num_features}, momentum={self.momentum}{bias}{self._common_repr()}"


class TaperNorm(ProgressiveNorm):
    r"""TaperNorm (arXiv:2602.10408): lam norm(x) + (1 - lam) (c gamma' x + beta'), which folds at lam = 0.

    c is one number for the whole layer. While lam is 1 it is calibrated: of all numbers it brings gamma c x closest to
    what the norm makes of x, with averages over the tokens of the batches,

    .. math:: c = \frac{\mathrm{E}\,\langle \gamma x,\; \mathrm{norm}(x) - \beta \rangle}
              {\mathrm{E}\,\lVert \gamma x \rVert^2}

    For an rms norm this is the rule of the paper. When lam leaves 1, c stays as it is; gamma' and beta' begin as the
    gain and bias of the norm (`start_from_norm`) and are trained. The branch has no statistics of batches, so training
    and eval compute the same and there is nothing to recalibrate. It fits a norm worse than `PRepBN` does, whose branch
    has a scale for each channel.

    `lam` is a 0-dim buffer that starts at 1; write it in place during the training, or let `ProgressiveNormCallback` or
    `stabnorm.switch.ProgressiveSwitch` do it: ``schedule="cosine"`` for all layers together is the published gate. At
    lam = 1 outputs and gradients are the same bits as those of the norm. A checkpoint of the norm itself loads with
    ``strict=True``, too.

    The published branch of a LayerNorm takes the mean out of each token, which is no map of each channel by itself.
    This one does not. The two are the same where the tokens have no mean, as after `stabnorm.fold.to_pre_rms`. The
    paper keeps the last norm of the model (``exclude=``), which fixes the scale of the logits; where it goes, too, add
    the loss of `stabnorm.switch.ScaleAnchor`.

    Args:
        normalized_shape: C, or the shape of the last axes if they are normalised together.
        eps: eps of the norm. Default: 1e-5.
        kind: "layer" for `nn.LayerNorm`, "rms" for `nn.RMSNorm`. Default: "layer".
        momentum: weight of a batch in the averages behind c; None takes a plain average. Default: 0.01.
        bias: whether the branch has a beta'. Default: True for kind "layer", False for "rms".
        channel_dim: axis of the input that holds the channels. Default: -1.
        sync: merge the averages over ranks. Default: False.

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range.

    >>> norm, x = TaperNorm(8, kind="rms"), 5 * torch.randn(4, 6, 8)
    >>> torch.equal(norm(x), torch.nn.functional.rms_norm(x, (8,), torch.ones(8), 1e-5))
    True
    >>> norm.lam.zero_()
    tensor(0.)
    >>> torch.allclose(norm(x), norm.rep.scale * x)
    True
    >>> 0.1 < norm.rep.scale.item() < 0.3
    True
    """

    _rep_class: ClassVar[type[CalibratedScale]] = CalibratedScale
    rep: CalibratedScale
    norm_tensors: tuple[str | None, str | None, float]  # the norm's gain and bias by name, and what is added to it

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size | tuple[int, ...],
        eps: float = 1e-5,
        *,
        kind: Literal["layer", "rms"] = "layer",
        momentum: float | None = 0.01,
        bias: bool | None = None,
        channel_dim: int = -1,
        sync: bool = False,
    ) -> None:
        shape = checked_shape(normalized_shape)
        check_number("eps", eps, least=0)
        super().__init__(normalized_shape, eps)  # by the MRO this is the norm's constructor
        bias = kind == "layer" if bias is None else bias
        features = torch.Size(shape).numel()
        self.adopt(
            CalibratedScale(features, momentum, bias=bias, channel_dim=channel_dim, sync=sync), feature_dims=len(shape)
        )
        self.norm_channel_dim = -1  # torch's norms take channels last

    @classmethod
    def conversion_options(cls) -> set[str]:
        """Return the arguments that do not follow from the norm."""
        return super().conversion_options() - {"eps", "bias"}

    def adopt(self, rep: Branch, eval_mode: EvalMode = "blend", feature_dims: int = 1) -> None:
        """Add `rep`, `lam` and all options to a norm; see the base class."""
        super().adopt(rep, eval_mode, feature_dims)
        (layer,) = find_norms(self)
        self.norm_tensors = (layer.weight_name, layer.bias_name, layer.gain_offset)

    def _see_norm(self, x: Tensor, mask: Tensor | None, norm: Tensor) -> None:
        with torch.no_grad():
            rows, valid = self.rep.rows_of(self._flat_channels(x), mask)
            target = widened(as_rows(norm, self.channel_dim, self.feature_dims))
            weight, bias, offset = self.norm_tensors
            scaled = widened(rows)
            gain = None if weight is None else getattr(self, weight)
            shift = None if bias is None else getattr(self, bias)
            scaled = scaled if gain is None else scaled * (gain.flatten() + offset)
            target = target if shift is None else target - shift.flatten()
            self.rep.calibrate(scaled, target, valid, self.lam)


TARGETS["taper"] = TaperNorm
