"""The place that knows Lightning: one callback per file, thin hooks over the plain functions of `stabnorm`."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.callbacks.adaptive_clip import AdaptiveClipCallback as AdaptiveClipCallback
    from stabnorm.callbacks.fold import FoldCallback as FoldCallback
    from stabnorm.callbacks.gradient_noise import GradientNoiseCallback as GradientNoiseCallback
    from stabnorm.callbacks.progressive import ProgressiveNormCallback as ProgressiveNormCallback
    from stabnorm.callbacks.project_weights import ProjectWeightsCallback as ProjectWeightsCallback
    from stabnorm.callbacks.repair import repair_module as repair_module
    from stabnorm.callbacks.stability import StabilityCallback as StabilityCallback

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.callbacks.adaptive_clip": ["AdaptiveClipCallback"],
        "stabnorm.callbacks.fold": ["FoldCallback"],
        "stabnorm.callbacks.gradient_noise": ["GradientNoiseCallback"],
        "stabnorm.callbacks.progressive": ["ProgressiveNormCallback"],
        "stabnorm.callbacks.project_weights": ["ProjectWeightsCallback"],
        "stabnorm.callbacks.repair": ["repair_module"],
        "stabnorm.callbacks.stability": ["StabilityCallback"],
    },
)
