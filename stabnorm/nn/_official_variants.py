"""``variant="official"`` of our constructors: the published modules of `stabnorm.nn.official`, with our arguments."""

from typing import NoReturn

from torch import Tensor, nn

from stabnorm.errors import StabNormError
from stabnorm.nn._base import target_name
from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.nn.official import OfficialPowerNorm, OfficialUnifiedNorm
from stabnorm.nn.power import PowerNorm, not_affine
from stabnorm.nn.unified import UnifiedNorm


class _Published(ChannelNorm):
    """Holds the published module as the child `official`, which has the same parameters and its own statistics."""

    official: nn.Module

    def _published(self) -> nn.Module:
        raise NotImplementedError

    def _add_state(self) -> None:
        if self.bias is None or self.channel_dim != -1 or self.sync:
            raise ValueError(
                "the official variant has a bias, channels last and no sync. Leave bias, channel_dim, sync"
            )

    def reset_running_stats(self) -> None:
        """Reset the running statistics."""
        self.official = self._published()
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            self.official.register_parameter(name, parameter)

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Call the published module on ``[B, N, C]``."""
        _, valid = self.rows_of(x, mask)
        y: Tensor = self.official(x, None if valid is None else valid.reshape(x.shape[:-1]))
        return y

    def running_statistics(self) -> NoReturn:
        """Raise StabNormError: the statistics of the published module cannot be measured again."""
        raise StabNormError("the published variant keeps statistics of its own")

    def _get_name(self) -> str:
        return target_name(self)


class OfficialVariantOfUnifiedNorm(_Published, UnifiedNorm, variant="official"):
    """The class of ``UnifiedNorm(variant="official")``."""

    filtrations = ("calibrated", "official")
    official: OfficialUnifiedNorm

    def _published(self) -> OfficialUnifiedNorm:
        filtered = self.filtration is not None
        return OfficialUnifiedNorm(
            self.num_features, self.windows, self.warmup_steps, filtered, self.momentum, self.eps
        )

    def reset_warmup(self) -> None:
        """Count steps from 0; the published module has no other state of the warm-up."""
        self.official.iters.zero_()

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Return the affine map in eval mode, as the corrected variant does."""
        return self._folded(self.official.running_var)


class OfficialVariantOfPowerNorm(_Published, PowerNorm, variant="official"):
    """The class of ``PowerNorm(variant="official")``."""

    official: OfficialPowerNorm

    def _published(self) -> OfficialPowerNorm:
        return OfficialPowerNorm(
            self.num_features, self._groups, self.warmup_steps, self.alpha_fwd, self.alpha_bkw, self.eps
        )

    @property
    def _groups(self) -> int:
        return 1 if self.groups is None else self.groups

    def fold_affine(self) -> NoReturn:
        """Raise StabNormError: the published module has at least one group, so it is not affine."""
        raise not_affine(self._groups)
