"""Companions watch more than norms: attention, weights, embeddings, outputs, the loss's curvature, and the switch."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.companions.attention import AttentionCompanion as AttentionCompanion
    from stabnorm.companions.companion import Companion as Companion
    from stabnorm.companions.companion import StepLoss as StepLoss
    from stabnorm.companions.companion import Watch as Watch
    from stabnorm.companions.curvature import CurvatureCompanion as CurvatureCompanion
    from stabnorm.companions.embedding import EmbeddingCompanion as EmbeddingCompanion
    from stabnorm.companions.output import OutputCompanion as OutputCompanion
    from stabnorm.companions.switching import SwitchCompanion as SwitchCompanion
    from stabnorm.companions.weights import WeightCompanion as WeightCompanion

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.companions.attention": ["AttentionCompanion"],
        "stabnorm.companions.companion": ["Companion", "StepLoss", "Watch"],
        "stabnorm.companions.curvature": ["CurvatureCompanion"],
        "stabnorm.companions.embedding": ["EmbeddingCompanion"],
        "stabnorm.companions.output": ["OutputCompanion"],
        "stabnorm.companions.switching": ["SwitchCompanion"],
        "stabnorm.companions.weights": ["WeightCompanion"],
    },
)
