"""`ProjectWeightsCallback`: weights that a norm follows keep their length, with a Lightning Trainer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stabnorm._checks import check_count
from stabnorm._models.names import compiled
from stabnorm._states import check_state
from stabnorm.callbacks._lightning import Callback
from stabnorm.callbacks._trainer import described
from stabnorm.remedies.projection import WeightProjection

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class ProjectWeightsCallback(Callback):
    """Scales weights back to the length that they had at first, after the optimizer's step, see `WeightProjection`.

    Args:
        include: a regular expression, or several, searched for in the names of linear layers and convolutions. Default:
            all but the last one.
        exclude: the same, for layers to leave alone; it wins over `include`. Default: none.
        every: steps from one projection to the next. Default: 1.

    Attributes:
        projection: what scales the weights; None before the training.

    Raises:
        TypeError: an argument has another type.
        ValueError: a pattern is invalid, or `every` is below 1; at the start of `fit`: a pattern matches no layer.
        StabNormError: at the start of `fit`: there is no layer whose weight can be projected.

    Source: Normalize-and-Project, arXiv:2407.01800.

    >>> ProjectWeightsCallback(exclude="head", every=10)
    ProjectWeightsCallback(exclude='head', every=10)
    """

    def __init__(
        self,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__()
        check_count("every", every)
        for name, patterns in (("include", include), ("exclude", exclude)):
            if patterns is not None:
                compiled(name, patterns)
        self.include, self.exclude, self.every = include, exclude, every
        self.projection: WeightProjection | None = None
        self._saved: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return described(self)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Remember the lengths; those of a checkpoint replace them when the training starts."""
        self.projection = WeightProjection(pl_module, self.include, self.exclude)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Take the lengths of a run that goes on."""
        if self._saved is not None and self.projection is not None:
            self.projection.load_state_dict(self._saved)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Scale the weights back; within an accumulation they have not moved."""
        if self.projection is not None and trainer.global_step % self.every == 0:
            self.projection.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the lengths, as they were at first."""
        return {"projection": self._saved if self.projection is None else self.projection.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was saved until the training starts."""
        check_state(state_dict, "ProjectWeightsCallback", ["projection"], empty=True)
        self._saved = state_dict.get("projection")
