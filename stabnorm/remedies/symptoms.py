"""Which remedy answers which symptom: the one table behind the advice of the monitor, the command and the guide.

It needs no torch, because a dashboard reads it, too.
"""

from dataclasses import dataclass

from stabnorm._checks import nearest
from stabnorm.statistic import markdown_table


@dataclass(frozen=True)
class Remedy:
    """One answer to a symptom.

    Attributes:
        name: what is called or built, as in `stabnorm.remedies`, or with its place: ``callbacks.AdaptiveClipCallback``.
        symptom: what a user sees, in words; remedies with the same symptom stand together.
        statistics: the statistics that show the symptom, the surest first; none where no statistic does.
        action: what it does.
        source: where it was published.
        folds: what of it is left after `fold_norms`.
        experimental: whether its own sources disagree on its use, or our study found none.
    """

    name: str
    symptom: str
    statistics: tuple[str, ...]
    action: str
    source: str
    folds: str
    experimental: bool = False

    @property
    def path(self) -> str:
        """The full name under which Python finds it."""
        return f"stabnorm.{self.name}" if "." in self.name else f"stabnorm.remedies.{self.name}"


_ATTENTION = "the entropy of the attention collapses, and its logits grow"
_DEPTH = "the scale of the residual stream grows over depth"
_CHANNELS = "outlier channels"
_EMBEDDING = "the gradient of the embedding is too large"
_NOISY = "the statistics of a batch are too noisy, as in micro-batches"
_PATCHES = "the patch embedding of a vision transformer is unstable"
_SPIKES = "the gradients have spikes"
_START = "the training does not leave its start, because the weights begin at zero or far too small"
_LENGTH = "the weights grow, so that the effective learning rate falls"
_DISCREPANCY = "evaluation uses other statistics than training"
_BATCHLESS = "the norms have to go, and batches are too small or too uneven for batch statistics"
_STREAM = "test data is shifted, and the images of a batch resemble each other"
_PART = "only the norms are worth training"

REMEDIES: tuple[Remedy, ...] = (
    Remedy(
        "sigma_reparametrize", _ATTENTION, ("attention_logit_max", "attention_entropy_share"),
        "gives each weight a learnable largest singular value", "arXiv 2303.06296", "into the weights, exactly",
    ),
    Remedy(
        "qk_norm", _ATTENTION, ("attention_logit_max", "attention_entropy_share"),
        "normalises queries and keys head by head", "arXiv 2010.04245",
        "the norms, once convert_norms has switched them",
    ),
    Remedy(
        "qk_clip", _ATTENTION, ("attention_logit_max",), "shrinks the queries and keys of the heads above a threshold",
        "arXiv 2507.20534", "nothing is left",
    ),
    Remedy(
        "scale_by_depth", _DEPTH, ("depth_growth_rate",), "divides the output of each pre-norm by sqrt(depth)",
        "arXiv 2502.05795", "into gain and bias, exactly",
    ),
    Remedy(
        "scale_residuals", _DEPTH, ("depth_growth_rate",),
        "multiplies each residual branch by 1/n, 1/sqrt(n), a number, or a learnable scalar that begins with 0",
        "arXiv 2510.03470, 1602.07261, 2002.10444", "into the weights, exactly",
    ),
    Remedy(
        "peri_norm", _DEPTH, ("depth_growth_rate",), "normalises what each residual branch adds", "arXiv 2502.02732",
        "the norms, backward, once convert_norms has switched them",
    ),
    Remedy(
        "mix_norm", _DEPTH, ("depth_growth_rate",), "makes the first quarter of the blocks post-norm",
        "arXiv 2412.13795, 2502.05795", "the post-norms stay", experimental=True,
    ),
    Remedy(
        "equalize_channels", _CHANNELS, ("channel_spread", "massive_activation"),
        "divides the channels of a norm's output by their ranges, and multiplies what reads them",
        "arXiv 2212.08254", "nothing is left",
    ),
    Remedy(
        "freeze_embedding", _EMBEDDING, ("embedding_gradient_ratio",), "takes the embedding out of the training",
        "arXiv 2211.09359", "nothing is left",
    ),
    Remedy(
        "stable_embedding", _EMBEDDING, ("embedding_gradient_ratio",),
        "normalises the embedding and draws it by Xavier's rule", "arXiv 2110.02861",
        "the norm, once convert_norms has switched it",
    ),
    Remedy(
        "standardize_weights", _NOISY, ("var_fluctuation", "mean_fluctuation"),
        "gives convolutions weights of mean 0 and variance 1, for norms that do not read the batch",
        "arXiv 1903.10520", "into the weights, exactly",
    ),
    Remedy(
        "nn.BatchChannelNorm", _NOISY, ("var_fluctuation", "mean_fluctuation"),
        "normalises with estimated statistics, and then groups of channels of each sample", "arXiv 1903.10520",
        "its batch norm; the norm of each sample stays",
    ),
    Remedy(
        "nn.EvoNormS0", _NOISY, ("var_fluctuation", "mean_fluctuation"),
        "stands for a norm and its activation in a convolutional net, and does not read the batch", "arXiv 2004.02967",
        "nothing folds", experimental=True,
    ),
    Remedy(
        "dual_patch_norm", _PATCHES, (), "normalises patches before and after they are embedded", "arXiv 2302.01327",
        "both norms, once convert_norms has switched them",
    ),
    Remedy(
        "lape", "positions get the same normalisation as the tokens", (),
        "gives each block positions with a LayerNorm of their own", "arXiv 2212.05262", "the positions, as constants",
    ),
    Remedy(
        "recalibrate.recalibrate_norms", _DISCREPANCY, ("var_discrepancy", "mean_discrepancy"),
        "measures running statistics again: the median of batches, AdaB2N's average (kappa=), or a share of both "
        "(alpha=)", "AdaB2N; arXiv 2110.04065", "the norm, with the new statistics",
    ),
    Remedy(
        "unmix_norms", _STREAM, ("var_discrepancy", "mean_discrepancy"),
        "normalises each image with statistics that it is mixed into, and that follow the stream", "arXiv 2401.08328",
        "the norm stays: what it computes depends on the image",
    ),
    Remedy(
        "callbacks.AdaptiveClipCallback", _SPIKES, ("gradient_spike",),
        "clips each gradient tensor against its own past", "arXiv 2502.11034", "nothing is left",
    ),
    Remedy(
        "callbacks.GradientNoiseCallback", _START, (), "adds noise that fades away to the gradients",
        "arXiv 1511.06807", "nothing is left", experimental=True,
    ),
    Remedy(
        "callbacks.ProjectWeightsCallback", _LENGTH, ("effective_learning_rate", "radial_share"),
        "scales the weights that a norm follows back to their first length", "arXiv 2407.01800", "nothing is left",
    ),
    Remedy(
        "WeightProjection", _LENGTH, ("effective_learning_rate", "radial_share"),
        "does the same in a training loop of your own", "arXiv 2407.01800", "nothing is left",
    ),
    Remedy(
        "nn.TaperNorm", _BATCHLESS, (),
        'tapers each norm to one calibrated number times its gains: convert_norms(to="taper")', "arXiv 2602.10408",
        "the norm, exactly, at lam = 0",
    ),
    Remedy(
        "train_only_norms", _PART, (), "trains gains and biases of the norms only", "arXiv 2003.00152",
        "nothing is left", experimental=True,
    ),
)  # fmt: skip


def remedies_for(statistic: str) -> tuple[Remedy, ...]:
    """Return the remedies that answer a statistic, those first that it shows most surely.

    >>> [remedy.name for remedy in remedies_for("embedding_gradient_ratio")]
    ['freeze_embedding', 'stable_embedding']
    """
    answering = [remedy for remedy in REMEDIES if statistic in remedy.statistics]
    return tuple(sorted(answering, key=lambda remedy: (remedy.experimental, remedy.statistics.index(statistic))))


def remedies_table() -> str:
    """Return the table of symptoms, statistics and remedies, as Markdown for the guide."""
    rows = [
        (
            remedy.symptom,
            ", ".join(f"`{name}`" for name in remedy.statistics) or "-",
            f"`{remedy.name}`{_mark(remedy)}: {remedy.action}",
            remedy.source,
            remedy.folds,
        )
        for remedy in REMEDIES
    ]
    return markdown_table(["symptom", "statistics", "remedy", "source", "after the fold"], rows)


def remedies_list(statistic: str | None = None) -> str:
    """Return the same as text for a terminal, by symptom.

    Args:
        statistic: the name of a statistic; only what answers it is listed. Default: everything.

    Raises:
        ValueError: no remedy answers a statistic of this name.

    >>> print(remedies_list("embedding_gradient_ratio"))
    the gradient of the embedding is too large  (embedding_gradient_ratio)
      stabnorm.remedies.freeze_embedding
          takes the embedding out of the training
          source: arXiv 2211.09359; after the fold: nothing is left
      stabnorm.remedies.stable_embedding
          normalises the embedding and draws it by Xavier's rule
          source: arXiv 2110.02861; after the fold: the norm, once convert_norms has switched it
    """
    listed = REMEDIES if statistic is None else remedies_for(statistic)
    if statistic is not None and not listed:
        known = sorted({name for remedy in REMEDIES for name in remedy.statistics})
        raise ValueError(f"no remedy answers {statistic!r}{nearest(statistic, known)}; known: {', '.join(known)}")
    lines: list[str] = []
    for symptom in dict.fromkeys(remedy.symptom for remedy in listed):
        answers = [remedy for remedy in listed if remedy.symptom == symptom]
        shown = dict.fromkeys(name for remedy in answers for name in remedy.statistics)
        lines.append(symptom + (f"  ({', '.join(shown)})" if shown else ""))
        for remedy in answers:
            lines.append(f"  {remedy.path}{_mark(remedy)}")
            lines.append(f"      {remedy.action}")
            lines.append(f"      source: {remedy.source}; after the fold: {remedy.folds}")
    return "\n".join(lines)


def _mark(remedy: Remedy) -> str:
    return " (experimental)" if remedy.experimental else ""
