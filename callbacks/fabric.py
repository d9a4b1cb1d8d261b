"""`FabricMonitor`: a `StabilityMonitor` in a loop of Lightning Fabric."""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from stabnorm._checks import check_model, wrong_type
from stabnorm.callbacks._loss_scale import scale_of
from stabnorm.monitor._folders import FOLDER
from stabnorm.monitor.loss_scales import Scale
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.monitor.record import FileRecord


class FabricMonitor(StabilityMonitor):
    """Watches the norms of a model in a loop of Fabric; the first process writes the record.

    Build it on every process, after ``fabric.launch()``, with the model before or after ``fabric.setup``. Call `step`
    after each optimizer step. Gradients are free of the loss scale of Fabric's mixed precision.

    Args:
        fabric: the `Fabric`.
        model: the model, or what ``fabric.setup`` returned.
        directory: a folder for the record. Default: `stabnorm_logs` in the first logger's folder; no record without a
            logger.
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
        self, fabric: Any, model: nn.Module, *, directory: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        if not hasattr(fabric, "is_global_zero"):
            raise wrong_type("fabric", fabric, "a lightning.fabric.Fabric")
        check_model("model", model)
        wrapped = type(model).__name__ == "_FabricModule"
        super().__init__(model.module if wrapped else model, **options)  # type: ignore[arg-type]
        self._fabric = fabric
        folder = _folder_of(fabric) if directory is None else directory
        if folder is not None and fabric.is_global_zero:
            self.records.append(FileRecord(folder))

    def step(
        self,
        *,
        grad_scale: Scale | Mapping[Optimizer, Scale] | None = None,
        **arguments: Any,
    ) -> None:
        """End an optimizer step, see `StabilityMonitor.step`; the loss scale is that of Fabric's precision."""
        if grad_scale is None:
            grad_scale = scale_of(getattr(getattr(self._fabric, "_precision", None), "scaler", None))
        super().step(grad_scale=grad_scale, **arguments)

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
