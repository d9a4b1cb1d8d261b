"""The place that knows Lightning: one callback per file, thin hooks over the plain functions of `stabnorm`."""

from stabnorm.callbacks.fold import FoldCallback
from stabnorm.callbacks.progressive import ProgressiveNormCallback
from stabnorm.callbacks.repair import repair_module
from stabnorm.callbacks.stability import StabilityCallback

__all__ = ["FoldCallback", "ProgressiveNormCallback", "StabilityCallback", "repair_module"]
