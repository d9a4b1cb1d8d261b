"""The words of alerts and onsets: what happened, how sure it is, what to look at, what to try, and on what it rests."""

import math
import re
from collections.abc import Mapping

from stabnorm.monitor.plain_names import PLAIN_NAMES

# What to try, by the statistic that left its usual range. Those of the attention and of the gradient come first.
_REMEDIES: Mapping[str, str] = {
    "attention_logit_max": "bound the attention logits: stabnorm.remedies.qk_norm, sigma_reparametrize or qk_clip",
    "attention_entropy": "bound the attention logits: stabnorm.remedies.qk_norm, sigma_reparametrize or qk_clip",
    "attention_entropy_share": "bound the attention logits: stabnorm.remedies.qk_norm, sigma_reparametrize or qk_clip",
    "new_outlier_share": "keep this channel out of low precision, or level it: stabnorm.remedies.equalize_channels",
    "grad_gain": "clip each tensor against its own past: stabnorm.callbacks.AdaptiveClipCallback",
    "gradient_norm": "clip the gradient: stabnorm.callbacks.AdaptiveClipCallback, or Trainer(gradient_clip_val=1.0)",
    "gradient_surprise": "lower Adam's beta2 (0.95), or clip each tensor: stabnorm.callbacks.AdaptiveClipCallback",
    "update_ratio": "lower the learning rate, or lengthen the warm-up",
    "update_excess": "lower the learning rate to what it was before, or restore the optimizer's state",
    "update_curvature": "lower the learning rate, or Adam's beta2",
    "lasting_curvature": "lower the learning rate, or Adam's beta2",
    "loss": "look at the batches of these steps, and clip the gradient (Trainer(gradient_clip_val=1.0))",
}
_BAD_WHEN_LOW = ("attention_entropy", "attention_entropy_share")  # all others in the table are bad when they grow
_FIRST_LAYER = "normalise what the embedding writes: stabnorm.remedies.stable_embedding"
_BRANCH = (
    "bound what the branch before it adds: stabnorm.remedies.peri_norm or scale_residuals; "
    'companions=["weights"] shows which matrix grows'
)
_SHRUNK = (
    "stop what shrinks here: the gain of the norm before, or a matrix, which weight decay without gradient does; "
    'companions=["weights"] shows which matrix'
)
_GLOBAL: Mapping[str, str] = {
    "learning rate": "with a lower learning rate, or a longer warm-up",
    "weight decay": "with the weight decay as it was before",
    "precision": "in bfloat16, or with the parts that overflow in float32",
    "data": "without the batches of these steps, and look at them",
    "": 'with half the learning rate or a longer warm-up; companions=["weights"] shows what grows',
}


def number(value: float) -> str:
    """Round to three digits.

    Example:
        >>> [number(x) for x in (0.25, 1234.5, 65504, 1e-5, 2.5e7, float("nan"))]
        ['0.25', '1,234', '65,504', '1e-5', '2.5e7', 'nan']
    """
    if 999.5 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), f"{value:.3g}")


def times(low: float, high: float) -> str:
    """Say a factor, or a range of factors.

    Example:
        >>> times(1.24, 1.4), times(209.1, 209.2)
        ('×1.24 to ×1.4', '×209')
    """
    low_text, high_text = number(low), number(high)
    return f"×{high_text}" if low_text == high_text else f"×{low_text} to ×{high_text}"


def plain_name(statistic: str) -> str:
    """Return the plain name of a statistic; one of your own keeps its name."""
    return PLAIN_NAMES.get(statistic, statistic)


def measured(layer: str, statistic: str, value: float, usual: float, score: float, bound: float) -> str:
    """Say what was measured, and how sure it is that this is no accident.

    >>> measured("norm", "token_std_mean", 3.0, 1.5, 13.8, 6.0)
    'The input scale of norm was 3, ×2 its usual 1.5; that is 14 robust standard deviations, and alerts begin at 6.'
    """
    what = f"The {plain_name(statistic)}" + (f" of {layer}" if layer else "")
    if not math.isfinite(usual):
        return f"{what} was {number(value)}."
    off = f"; that is {score:.2g} robust standard deviations, and alerts begin at {bound:.2g}"
    return f"{what} was {number(value)}, {times(value / usual, value / usual)} its usual {number(usual)}{off}."


def remedy_of(statistic: str, *, first: bool, back_to: int, fell: bool = False) -> str:
    """Return what to try where one layer, or the layers from one on, left their usual range.

    Args:
        statistic: the one that left it.
        first: whether it began at the first layer, which reads the embedding.
        back_to: the step before which the training was well.
        fell: whether it fell, so that a remedy against growth is none. Default: False.

    >>> remedy_of("attention_logit_max", first=False, back_to=90)
    'Go on from a checkpoint before step 90, and bound the attention logits: stabnorm.remedies.qk_norm, \
sigma_reparametrize or qk_clip.'
    """
    what = _FIRST_LAYER if first else _SHRUNK if fell else _BRANCH
    if not fell or statistic in _BAD_WHEN_LOW:
        what = _REMEDIES.get(statistic, what)
    return f"Go on from a checkpoint before step {back_to:,}, and {what}."


def global_remedy(cause: str, back_to: int) -> str:
    """Return what to try where all layers left their usual range at once, by what else had moved."""
    return f"Go on from a checkpoint before step {back_to:,} {_GLOBAL.get(cause, _GLOBAL[''])}."


def rests_on(watched: int, learns: int) -> str:
    """Say what a verdict rests on.

    Args:
        watched: the number of steps that were watched.
        learns: the number of steps after which values are compared with the past.

    >>> rests_on(240, 256)
    '240 steps watched; comparison with the past begins at 256: only fixed bounds were checked.'
    >>> rests_on(1000, 256)
    '1,000 steps watched, compared with the past from the 256th on.'
    """
    steps = f"{watched:,} step{'s'[: watched != 1]} watched"
    if watched < learns:
        return f"{steps}; comparison with the past begins at {learns}: only fixed bounds were checked."
    return f"{steps}, compared with the past from the {learns}th on."
