"""``variant="official"`` of our constructors: the published modules of `stabnorm.nn.official` behind our arguments."""

from typing import NoReturn

from torch import Tensor, nn

from stabnorm.errors import StabNormError
from stabnorm.nn._base import target_name
from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.nn.official import OfficialPowerNorm, OfficialUnifiedNorm
from stabnorm.nn.power import PowerNorm, not_affine
from stabnorm.nn.unified import UnifiedNorm


class _Published(ChannelNorm):
    """Has the published module as the child `official`, which shares its parameters and keeps statistics of its own."""

    official: nn.Module

    def _published(self) -> nn.Module:
        raise NotImplementedError

    def _add_state(self) -> None:
        if self.bias is None or self.channel_dim != -1 or self.sync:
            raise ValueError(
                "the official variant has a bias, channels last and no sync. Leave bias, channel_dim, sync"
            )

    def reset_running_stats(self) -> None:
        """Forget the statistics."""
        self.official = self._published()
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            self.official.register_parameter(name, parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the published module makes of ``[B, N, C]``."""
        _, valid = self.rows_of(x, mask)
        y: Tensor = self.official(x, None if valid is None else valid.reshape(x.shape[:-1]))
        return y

    def running_statistics(self) -> NoReturn:
        """There are none that could be measured anew."""
        raise StabNormError("the published variant keeps statistics of its own")

    def _get_name(self) -> str:
        return target_name(self)


class OfficialVariantOfUnifiedNorm(_Published, UnifiedNorm, variant="official"):
    """What ``UnifiedNorm(variant="official")`` is."""

    filtrations = ("calibrated", "official")
    official: OfficialUnifiedNorm

    def _published(self) -> OfficialUnifiedNorm:
        filtered = self.filtration is not None
        return OfficialUnifiedNorm(
            self.num_features, self.windows, self.warmup_steps, filtered, self.momentum, self.eps
        )

    def reset_warmup(self) -> None:
        """Count from 0; the published module has no more of a warm-up."""
        self.official.iters.zero_()

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """As of the corrected one."""
        return self._folded(self.official.running_var)


class OfficialVariantOfPowerNorm(_Published, PowerNorm, variant="official"):
    """What ``PowerNorm(variant="official")`` is."""

    official: OfficialPowerNorm

    def _published(self) -> OfficialPowerNorm:
        return OfficialPowerNorm(
            self.num_features, self._groups, self.warmup_steps, self.alpha_fwd, self.alpha_bkw, self.eps
        )

    @property
    def _groups(self) -> int:
        return 1 if self.groups is None else self.groups

    def fold_affine(self) -> NoReturn:
        """Raise StabNormError: the published module has one group at least."""
        raise not_affine(self._groups)
