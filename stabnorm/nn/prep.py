"""PRepBN: a blend that moves from LayerNorm to RepBN while the model trains; a mixin over the norm's own class."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stabnorm._checks import check_names, check_number
from stabnorm.nn._base import TARGETS
from stabnorm.nn._blended import blended
from stabnorm.nn._channel_norm import check_variant
from stabnorm.nn._over_norm import norm_class
from stabnorm.nn._progressive import EvalMode, ProgressiveNorm, checked_shape
from stabnorm.nn.rep import RepBN
from stabnorm.ops.blended import blended_norm
from stabnorm.ops.dispatch import REFERENCE


class PRepBN(ProgressiveNorm):
    r"""Progressive re-parameterised batch norm (arXiv:2405.11582, SLAB, eq. 3): lam norm(x) + (1 - lam) RepBN(x).

    `lam` is a 0-dim buffer that starts at 1; write it in place during the training. At lam = 1 outputs and gradients
    are the same bits as those of the norm, and `rep` already updates its statistics. At lam = 0 the norm is a RepBN and
    can be folded. A checkpoint of the norm itself loads with ``strict=True``, too; it changes neither lam nor a `rep`
    that has seen a batch.

    `rep` starts with the gain and bias of the norm and with eta = 0. It takes the norm's values once more when lam
    leaves 1 (`start_from_norm`). The published start, eta = 1, adds the input itself to the output. Because a norm
    divides by the scale of its input, this scale may have grown by then, and eta x may be the larger part
    (`benchmarks.switch_study`, "wide digits").

    The class is a mixin over a norm class: ``PRepBN(d)`` is an instance of `PRepBN` and of `nn.LayerNorm`. It has the
    parameters of the norm under their own names, and the child `rep`, a `RepBN`.

    Args:
        normalized_shape: C, or the shape of the last axes if they are normalised together.
        eps: eps of both norms. Default: 1e-5.
        kind: "layer" for `nn.LayerNorm`, "rms" for `nn.RMSNorm`. Default: "layer".
        eval_mode: what eval mode computes while lam > 0: "blend", as in training, or "rep", RepBN alone, as published.
            Default: "blend".
        channel_dim: axis of the input that holds the channels. Default: -1.
        sync: merge RepBN's statistics over ranks. Default: False.
        variant: "official" sets `eval_mode="rep"` and `init="vision"`, as published. The published module also counts
            its own steps, see `stabnorm.nn.official.OfficialPRepBN`; here you set lam. Default: "corrected".
        **rep_options: further arguments of `RepBN`. The default of `init` is "norm"; with kind "rms" that of `center`
            is False.

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        TypeError: an argument has another type, or there is no such option.
        ValueError: an argument is out of range.

    >>> norm, x = PRepBN(8), torch.randn(4, 6, 8)
    >>> torch.equal(norm(x), torch.nn.functional.layer_norm(x, (8,)))
    True
    >>> norm.lam.zero_()
    tensor(0.)
    >>> torch.equal(norm(x), norm.rep(x)), isinstance(norm, nn.LayerNorm)
    (True, True)
    """

    _rep_class: ClassVar[type[RepBN]] = RepBN
    rep: RepBN

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size | tuple[int, ...],
        eps: float = 1e-5,
        *,
        kind: Literal["layer", "rms"] = "layer",
        eval_mode: EvalMode = "blend",
        channel_dim: int = -1,
        sync: bool = False,
        variant: str = "corrected",
        **rep_options: Any,
    ) -> None:
        check_variant(variant)
        shape = checked_shape(normalized_shape)
        check_number("eps", eps, least=0)
        check_names("PRepBN", rep_options, RepBN.conversion_options())
        super().__init__(normalized_shape, eps)  # by the MRO this is the norm's constructor
        if kind == "rms":
            rep_options.setdefault("center", False)
        if variant == "official":
            eval_mode = "rep"
            rep_options.setdefault("init", "vision")
        rep_options.setdefault("init", "norm")
        features = torch.Size(shape).numel()
        self.adopt(RepBN(features, eps, channel_dim=channel_dim, sync=sync, **rep_options), eval_mode, len(shape))
        self.norm_channel_dim = -1  # torch's norms take channels last

    @torch.no_grad()
    def start_from_norm(self) -> None:
        """Give `rep` the current gain and bias of the norm, and eta = 0.

        Nothing happens if `init` is not "norm", or if `rep` was fitted (``convert_norms(init="fit")``). Call it when
        lam leaves 1 after a training at lam = 1, as `stabnorm.ProgressiveSwitch` does.

        >>> norm = PRepBN(2)
        >>> _ = nn.init.constant_(norm.weight, 3.0)
        >>> norm.start_from_norm()
        >>> norm.rep.weight.tolist(), norm.rep.eta.item()
        ([3.0, 3.0], 0.0)
        """
        if self.rep.init != "norm" or self.fitted:
            return
        super().start_from_norm()
        self.rep.eta.zero_()

    def _at_once(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Compute both norms together: only in training, with torch's own LayerNorm over one axis."""
        own_forward = norm_class(self).forward is nn.LayerNorm.forward
        if not (own_forward and self.feature_dims == 1 and self.training and self.rep.fits_blended_kernels):
            return None
        rows, valid = self.rep.rows_of(x, mask)
        backend = blended_norm.chosen(rows, valid)
        if backend == REFERENCE:
            return None
        norm: Any = self  # an nn.LayerNorm
        y = blended(backend, self.lam, rows, valid, norm.weight, norm.bias, norm.eps, self.rep)
        return self.rep.like_input(y, x)


TARGETS["prepbn"] = PRepBN
