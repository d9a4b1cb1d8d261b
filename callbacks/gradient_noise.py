"""`GradientNoiseCallback`: noise that fades away is added to the gradients, with a Lightning Trainer."""

from typing import TYPE_CHECKING, Any

from stabnorm._states import check_state
from stabnorm.callbacks._lightning import Callback
from stabnorm.callbacks._trainer import described
from stabnorm.gradient_noise import GradientNoise, check_noise

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class GradientNoiseCallback(Callback):
    """Adds noise that fades away to the gradients, after they were clipped, see `GradientNoise`.

    Args:
        eta: the variance of the noise at the first step. Default: 0.01.
        gamma: how fast it fades. Default: 0.55.
        seed: of the noise, which is the same on all ranks. Default: 0.

    Raises:
        TypeError: an argument has another type.
        ValueError: a number is out of range.

    Source: arXiv:1511.06807.

    >>> GradientNoiseCallback(eta=0.3)
    GradientNoiseCallback(eta=0.3)
    """

    def __init__(self, eta: float = 0.01, gamma: float = 0.55, seed: int = 0) -> None:
        super().__init__()
        check_noise(eta, gamma, seed)
        self.eta, self.gamma, self.seed = eta, gamma, seed
        self._noises: list[GradientNoise] = []
        self._saved: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return described(self)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Hang the noise on the optimizers, which exist by now."""
        self.teardown(trainer, pl_module, "fit")
        plain = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
        self._noises = [
            GradientNoise(optimizer, eta=self.eta, gamma=self.gamma, seed=self.seed + number)
            for number, optimizer in enumerate(plain)
        ]
        for noise, state in zip(self._noises, self._saved, strict=False):
            noise.load_state_dict(state)

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Take the noise off the optimizers, also after an error."""
        for noise in self._noises:
            noise.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps of each optimizer."""
        return {"noises": [noise.state_dict() for noise in self._noises] or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was saved until the training starts."""
        check_state(state_dict, "GradientNoiseCallback", ["noises"], empty=True)
        self._saved = list(state_dict.get("noises", []))
