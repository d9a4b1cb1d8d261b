"""Remedies: small changes of a model, each of which answers a symptom that the monitor sees, and `undo`.

``stabnorm remedies`` lists them by symptom; so does docs/remedies.md.
"""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.remedies.depth_scaling import scale_by_depth as scale_by_depth
    from stabnorm.remedies.embeddings import stable_embedding as stable_embedding
    from stabnorm.remedies.equalize import equalize_channels as equalize_channels
    from stabnorm.remedies.mixed_norms import mix_norm as mix_norm
    from stabnorm.remedies.output_norms import peri_norm as peri_norm
    from stabnorm.remedies.patches import dual_patch_norm as dual_patch_norm
    from stabnorm.remedies.positions import lape as lape
    from stabnorm.remedies.projection import WeightProjection as WeightProjection
    from stabnorm.remedies.qk import qk_clip as qk_clip
    from stabnorm.remedies.qk import qk_norm as qk_norm
    from stabnorm.remedies.report import Change as Change
    from stabnorm.remedies.report import RemedyReport as RemedyReport
    from stabnorm.remedies.report import undo as undo
    from stabnorm.remedies.residual_scaling import scale_residuals as scale_residuals
    from stabnorm.remedies.sigma_reparam import sigma_reparametrize as sigma_reparametrize
    from stabnorm.remedies.standardized import standardize_weights as standardize_weights
    from stabnorm.remedies.symptoms import REMEDIES as REMEDIES
    from stabnorm.remedies.symptoms import Remedy as Remedy
    from stabnorm.remedies.symptoms import remedies_for as remedies_for
    from stabnorm.remedies.trained_part import freeze_embedding as freeze_embedding
    from stabnorm.remedies.trained_part import train_only_norms as train_only_norms
    from stabnorm.remedies.unmixing import unmix_norms as unmix_norms

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.remedies.depth_scaling": ["scale_by_depth"],
        "stabnorm.remedies.embeddings": ["stable_embedding"],
        "stabnorm.remedies.equalize": ["equalize_channels"],
        "stabnorm.remedies.mixed_norms": ["mix_norm"],
        "stabnorm.remedies.output_norms": ["peri_norm"],
        "stabnorm.remedies.patches": ["dual_patch_norm"],
        "stabnorm.remedies.positions": ["lape"],
        "stabnorm.remedies.projection": ["WeightProjection"],
        "stabnorm.remedies.qk": ["qk_clip", "qk_norm"],
        "stabnorm.remedies.report": ["Change", "RemedyReport", "undo"],
        "stabnorm.remedies.residual_scaling": ["scale_residuals"],
        "stabnorm.remedies.sigma_reparam": ["sigma_reparametrize"],
        "stabnorm.remedies.standardized": ["standardize_weights"],
        "stabnorm.remedies.symptoms": ["REMEDIES", "Remedy", "remedies_for"],
        "stabnorm.remedies.trained_part": ["freeze_embedding", "train_only_norms"],
        "stabnorm.remedies.unmixing": ["unmix_norms"],
    },
)
