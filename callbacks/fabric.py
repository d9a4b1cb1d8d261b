"""`FabricMonitor`: a `StabilityMonitor` in a loop of Lightning Fabric."""

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stabnorm._checks import check_model, wrong_type
from stabnorm.actions.action import Training
from stabnorm.actions.actions import Actions
from stabnorm.callbacks._clipped_norm import ClippedNorm
from stabnorm.callbacks._optimizers import innermost, scale_of
from stabnorm.callbacks._optimizers import learning_rate as rate_of
from stabnorm.monitor._folders import FOLDER
from stabnorm.monitor.details import optimizers_of
from stabnorm.monitor.loss_scales import Scale
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.monitor.record import MOST_BYTES, FileRecord, check_most_bytes


class FabricMonitor(StabilityMonitor):
    """Watches the norms of a model in a loop of Fabric; the first process writes the record.

    Build it on every process, after ``fabric.launch()``, with the model before or after ``fabric.setup``. Call `step`
    after each optimizer step. Gradients are free of the loss scale of Fabric's mixed precision. The norm of the
    gradient is the one before ``fabric.clip_gradients(max_norm=...)``, or, if you clip nothing, that of the optimizers
    that `step` is given. `actions` makes what acts at an alarm.

    Args:
        fabric: the `Fabric`.
        model: the model, or what ``fabric.setup`` returned.
        directory: a folder for the record. Default: `stabnorm_logs` in the first logger's folder; no record without a
            logger.
        record_bytes: what the record may take on the disk, as for `StabilityCallback`. Default: 256 MiB.
        **options: of `StabilityMonitor`.

    Raises:
        TypeError: `fabric` is no Fabric, or another argument has another type.
        ValueError: as for `StabilityMonitor`.

    >>> import torch
    >>> from lightning.fabric import Fabric
    >>> from stabnorm.callbacks.fabric import FabricMonitor
    >>> fabric = Fabric(accelerator="cpu", devices=1)
    >>> model = fabric.setup(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
    >>> with FabricMonitor(fabric, model) as monitor:
    ...     fabric.backward(model(torch.randn(5, 4)).square().mean())
    ...     monitor.step()
    >>> monitor.layers
    ('1',)
    """

    def __init__(
        self,
        fabric: Any,
        model: nn.Module,
        *,
        directory: str | os.PathLike[str] | None = None,
        record_bytes: int | None = MOST_BYTES,
        **options: Any,
    ) -> None:
        if not hasattr(fabric, "is_global_zero"):
            raise wrong_type("fabric", fabric, "a lightning.fabric.Fabric")
        check_model("model", model)
        check_most_bytes("record_bytes", record_bytes)
        wrapped = type(model).__name__ == "_FabricModule"
        super().__init__(model.module if wrapped else model, **options)  # type: ignore[arg-type]
        self._fabric = fabric
        self._clipped = ClippedNorm(self.model)
        folder = _folder_of(fabric) if directory is None else directory
        if folder is not None and fabric.is_global_zero:
            self.records.append(FileRecord(folder, record_bytes))

    def attach(self) -> None:
        """Register the hooks."""
        super().attach()
        self._clipped.attach()

    def detach(self) -> None:
        """Remove all hooks."""
        self._clipped.detach()
        super().detach()

    def step(
        self,
        *,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        learning_rate: Tensor | float | None = None,
        gradient_norm: Tensor | float | None = None,
        grad_scale: Scale | Mapping[Optimizer, Scale] | None = None,
        **arguments: Any,
    ) -> None:
        """End an optimizer step, see `StabilityMonitor.step`, before ``zero_grad()``.

        The loss scale is that of Fabric's precision, and the learning rate that of the first optimizer.
        """
        optimizers = optimizers_of(optimizer)
        if gradient_norm is None:
            gradient_norm = self.outputs.attempt("the gradient's norm is not watched", self._clipped.take, *optimizers)
        if learning_rate is None and optimizers:
            learning_rate = rate_of(optimizers[0])
        if grad_scale is None:
            grad_scale = scale_of(self._scaler)
        super().step(
            optimizer=optimizer,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            grad_scale=grad_scale,
            **arguments,
        )

    def actions(self, optimizers: Optimizer | Sequence[Optimizer], actions: Mapping[str, Any], **known: Any) -> Actions:
        """Return what acts at an alarm, see `stabnorm.actions.Actions`.

        Args:
            optimizers: those that step on the model, or what ``fabric.setup`` made of them.
            actions: kind of alarm -> an action, or a list of them.
            **known: more of `stabnorm.actions.Training`, such as schedulers, directory, save and stop.

        Raises:
            ValueError: an unknown kind or action, or one that needs more of `Training`.
        """
        inside = [innermost(optimizer) for optimizer in optimizers_of(optimizers)]
        return Actions(Training(self.model, self, inside, **{"scaler": self._scaler, **known}), actions)

    @property
    def _scaler(self) -> Any:
        return getattr(getattr(self._fabric, "_precision", None), "scaler", None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.outputs.close(self.records)


def _folder_of(fabric: Any) -> str | None:
    for logger in fabric.loggers:
        folder = getattr(logger, "log_dir", None) or getattr(logger, "root_dir", None)
        if folder:
            return os.path.join(folder, FOLDER)
    return None
