"""`AdaptiveClipCallback`: clip each gradient tensor against its own past, with a Lightning Trainer."""

from typing import TYPE_CHECKING, Any

from stabnorm._states import check_state
from stabnorm.callbacks._lightning import Callback
from stabnorm.callbacks._trainer import described
from stabnorm.clipping import AdaptiveClip

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch.optim import Optimizer


class AdaptiveClipCallback(Callback):
    """Clips each gradient tensor to a multiple of its usual norm before every step of an optimizer, see `AdaptiveClip`.

    Gradients are unscaled and reduced by then. A ``gradient_clip_val`` of the Trainer comes afterwards. Each optimizer
    clips its own parameters.

    Args:
        bound: by how much a norm may exceed its past. Default: 1.05.
        momentum: the weight of a new norm in the past. Default: 0.02.
        warmup: steps until a tensor is compared with its past. Default: 100.
        warmup_norm: the largest norm of all gradients together until then; None clips nothing. Default: 1.0.

    Raises:
        TypeError: an argument has another type.
        ValueError: a number is out of range.

    Source: AdaGC, arXiv 2502.11034.

    >>> AdaptiveClipCallback(bound=1.2)
    AdaptiveClipCallback(bound=1.2)
    """

    def __init__(
        self, bound: float = 1.05, momentum: float = 0.02, warmup: int = 100, warmup_norm: float | None = 1.0
    ) -> None:
        super().__init__()
        AdaptiveClip.check(bound, momentum, warmup, warmup_norm)
        self.bound, self.momentum, self.warmup, self.warmup_norm = bound, momentum, warmup, warmup_norm
        self._clips: dict[int, AdaptiveClip] = {}  # by the optimizer's place in the Trainer's list
        self._saved: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return described(self)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin without a past, or with that of the checkpoint."""
        self._clips = {}

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        """Clip the gradients of this optimizer."""
        plain = [getattr(one, "optimizer", one) for one in trainer.optimizers]
        number = next((i for i, one in enumerate(plain) if one is getattr(optimizer, "optimizer", optimizer)), 0)
        if number not in self._clips:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._clips[number] = AdaptiveClip(
                parameters, bound=self.bound, momentum=self.momentum, warmup=self.warmup, warmup_norm=self.warmup_norm
            )
            if number < len(self._saved):
                self._clips[number].load_state_dict(self._saved[number])
        self._clips[number].step()

    def state_dict(self) -> dict[str, Any]:
        """Return the past of each optimizer's parameters."""
        clips = [self._clips[number].state_dict() for number in sorted(self._clips)]
        return {"clips": clips or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was saved until the optimizers exist."""
        check_state(state_dict, "AdaptiveClipCallback", ["clips"], empty=True)
        self._saved = list(state_dict.get("clips", []))
