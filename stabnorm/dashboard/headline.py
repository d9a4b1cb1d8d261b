"""The dozen scalars of a flush that every logger can plot; they are the same ones whatever the depth of the model."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.definitions import definition
from stabnorm.monitor.record import Block

# The statistics that the scalars describe (the first three that are watched), and which numbers are given for each.
_PREFERRED = ("token_std_mean", "amax", "mean_discrepancy", "var_fluctuation", "absmax_fluctuation", "mean_fluctuation")
_SUMMARIES = (("p10", "p50", "p90", "worst"), ("p50", "worst"), ("p50", "worst"))


def _chosen(statistics: Sequence[str]) -> dict[str, tuple[str, ...]]:
    order = [name for name in _PREFERRED if name in statistics]
    order += [name for name in statistics if name not in order]
    return dict(zip(order, _SUMMARIES, strict=False))


def headline(
    block: Block, statistics: Sequence[str], *, alerts: int, overhead: float, separator: str = "/"
) -> dict[str, float]:
    """Sum a block up in at most 12 numbers, of always the same names.

    A logger that meets a new name late may rewrite its whole file (Lightning's CSV does).

    `p10`, `p50` and `p90` are over the layers' means of the block; `worst` is the largest value of any step and layer.
    Which layer that is stands in the picture and in the texts, because a number would not survive a chart's smoothing.
    What a block does not have is NaN. The cost has a group of its own, as it says nothing about the training's health.

    Args:
        block: the block that a flush added.
        statistics: names of the watched statistics; the scalars describe three of them.
        alerts: number of alerts so far.
        overhead: cost of the monitor so far, in percent of the step.
        separator: separator of group and name, as a Lightning logger's `group_separator`. Default: "/".

    Example:
        >>> block = Block(0, ("a", "b"), {"amax": np.array([[1, 2], [3, 8]])})
        >>> scalars = headline(block, ["amax"], alerts=0, overhead=0.4)
        >>> scalars["stability/amax_p50"], scalars["stability/amax_worst"], scalars["stability_cost/percent_of_step"]
        (3.5, 8.0, 0.4)
    """
    scalars = {
        f"{statistic}_{name}": value
        for statistic, names in _chosen(statistics).items()
        for name, value in zip(names, _summary(block.series.get(statistic), names), strict=True)
    }
    scalars["alerts"] = float(alerts)
    health = {f"stability{separator}{name}": value for name, value in scalars.items()}
    return {**health, f"stability_cost{separator}percent_of_step": float(overhead)}


def _summary(values: npt.NDArray[np.floating[Any]] | None, names: tuple[str, ...]) -> list[float]:
    """Return what `names` ask for."""
    ran = None if values is None else ~np.isnan(values)
    if values is None or ran is None or not ran.any():
        return [float("nan")] * len(names)
    worst = np.where(ran, values, -np.inf).max(axis=0)
    known = {"worst": float(worst.max())}
    finite = np.isfinite(values)  # one infinity would be the percentile of all
    counts = finite.sum(axis=0)
    means = np.where(finite, values, 0).sum(axis=0, dtype=np.float64)[counts > 0] / counts[counts > 0]
    return [
        known[name] if name in known else float(np.percentile(means, int(name[1:]))) if len(means) else float("nan")
        for name in names
    ]


def custom_scalars_layout(statistics: Sequence[str], separator: str = "/") -> dict[str, dict[str, list[Any]]]:
    """Return the layout of TensorBoard's custom scalars tab, for `SummaryWriter.add_custom_scalars`, once per run.

    Args:
        statistics: the ones given to `headline`.
        separator: the one given to `headline`. Default: "/".
    """

    def tag(name: str) -> str:
        return f"stability{separator}{name}"

    chosen = list(_chosen(statistics))
    plain = {statistic: definition(statistic).plain for statistic in chosen}
    band = [tag(f"{chosen[0]}_{name}") for name in ("p50", "p10", "p90")]  # value, lower, upper
    worst = {
        f"{plain[statistic]}, worst layer ({statistic})": ["Multiline", [f"^{re.escape(tag(f'{statistic}_worst'))}$"]]
        for statistic in chosen
    }
    return {
        "Stability": {
            f"{plain[chosen[0]]} over the layers: median, p10 to p90 ({chosen[0]})": ["Margin", band],
            **worst,
        }
    }
