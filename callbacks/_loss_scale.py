"""The factor by which a gradient scaler multiplies the loss."""

from typing import Any

from torch import Tensor


def scale_of(scaler: Any) -> Tensor | float | None:
    """Return a scaler's factor; None without a scaler.

    It is the scaler's own tensor if it has one, because `get_scale()` would wait for the device.
    """
    if scaler is None:
        return None
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else float(scaler.get_scale())
