"""`ScaleAnchor`: a loss that holds the scale of the hidden states while the last norm is taken out."""

import torch
from torch import Tensor

from stabnorm._checks import check_flag, check_instance, check_number
from stabnorm._models.masks import mask_for
from stabnorm._models.ranks import gather_over_ranks
from stabnorm.nn._base import Float32Buffers
from stabnorm.nn._progressive import ProgressiveNorm
from stabnorm.norms import find_norms
from stabnorm.norms.rows import as_rows, tokens_of
from stabnorm.ops.rows import widened
from stabnorm.ops.running import track_batch_


class ScaleAnchor(Float32Buffers):
    r"""A loss for the training in which the last norm of a model goes (arXiv:2602.10408): the scale stays what it was.

    A norm before the output makes the logits independent of the size of the hidden state. Without it the cross-entropy
    falls as the hidden states grow, so they grow without bound. The loss

    .. math:: L = w\; \mathrm{E}\,(s(h) - s_0)^2

    holds the scale s of each token at the mean that it had with the norm. s is the rms of a token before an rms norm,
    and its standard deviation before a layer norm. The target s_0 is a moving average, corrected for its beginning,
    which is gathered while lam of the norm is 1; so long the loss is 0. `remove_norms` needs no anchor, because its
    repair compares every hidden state with that of the original.

    Args:
        norm: the last norm of a converted model. The anchor reads its lam and does not change it.
        weight: w. Default: 0.1.
        momentum: weight of a batch in the target. Default: 0.01.
        sync: gather the target over ranks. Default: False.

    Raises:
        TypeError: `norm` has no lam, or an argument has another type.
        ValueError: an argument is out of range.

    >>> from stabnorm.nn import TaperNorm
    >>> norm = TaperNorm(8, kind="rms")
    >>> anchor, hidden = ScaleAnchor(norm), torch.randn(4, 6, 8)
    >>> anchor(hidden).item()
    0.0
    >>> norm.lam.fill_(0.5)
    tensor(0.5000)
    >>> anchor(3 * hidden) > anchor(hidden)
    tensor(True)
    """

    averages: Tensor
    step: Tensor
    skips: Tensor
    progress: Tensor

    def __init__(
        self, norm: ProgressiveNorm, weight: float = 0.1, *, momentum: float = 0.01, sync: bool = False
    ) -> None:
        super().__init__()
        check_instance("norm", norm, ProgressiveNorm, "a norm that convert_norms has converted, to 'taper' or 'prepbn'")
        check_number("weight", weight, least=0)
        check_number("momentum", momentum, above=0, most=1)
        check_flag("sync", sync)
        (layer,) = find_norms(norm)
        self._norm = (norm,)  # in a tuple, because it is part of the model and not of the anchor
        self.center, self.eps, self.weight = layer.kind == "layer", layer.eps, weight
        self.momentum, self.sync = momentum, sync
        device = norm.lam.device
        self.register_buffer("averages", torch.zeros(2, device=device))  # of s, and of 1: the part that is filled
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("skips", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64, device=device))  # see ops/running.py

    @property
    def target(self) -> Tensor:
        """s_0; NaN as long as nothing was seen."""
        return self.averages[0] / self.averages[1]

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of what the norm reads, and gather the target in training mode, while lam is 1.

        Args:
            hidden: the input of the norm.
            mask: which tokens are valid, bool. Default: those that `stabnorm.valid_tokens` says, or all.
        """
        (norm,) = self._norm
        if mask is None:
            tokens = tokens_of(hidden.shape, norm.channel_dim, norm.feature_dims)
            mask = mask_for(tokens, type(self).__name__)
        rows = widened(as_rows(hidden, norm.channel_dim, norm.feature_dims))
        valid = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if mask is None else mask.reshape(-1)
        rows = torch.where(valid[:, None], rows, 0)  # first, so that no gradient of padding is NaN
        square = rows.var(1, correction=0) if self.center else rows.square().mean(1)
        scale, count = torch.sqrt(square + self.eps), valid.sum().to(rows.dtype)
        if self.training:
            self._gather(torch.where(valid, scale.detach(), 0).sum(), count, norm.lam)
        apart = torch.where(valid, scale - torch.nan_to_num(self.target), 0)
        loss = self.weight * apart.square().sum() / count.clamp(min=1)
        return torch.where(norm.lam == 1, 0, loss)

    @torch.no_grad()
    def _gather(self, total: Tensor, count: Tensor, lam: Tensor) -> None:
        if self.sync:
            total, count = gather_over_ranks(torch.stack([total, count])).sum(0)
        mean = total / count.clamp(min=1)
        learning = (lam == 1) | (self.averages[1] == 0) | ~torch.isfinite(mean)
        now = torch.where(learning, torch.stack([mean, torch.ones_like(mean)]), self.averages.to(mean.dtype))
        track_batch_(
            None, now, count, None, self.averages, None, self.step, self.skips, self.progress, 0, self.momentum, 0.0,
            True,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"weight={self.weight}, momentum={self.momentum}" + ", sync=True" * self.sync
