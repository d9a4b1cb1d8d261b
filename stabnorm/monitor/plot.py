"""`StabilityMonitor.plot`: the history as a figure of matplotlib, which is an extra."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stabnorm.monitor.baseline import Baseline
from stabnorm.statistic import by_name

if TYPE_CHECKING:
    from stabnorm.monitor.alerts import Alert
    from stabnorm.statistic import Statistic

COLOURS = ("times", "value", "sigmas")


def plot_track(
    track: Any,
    rows: Sequence[str],
    statistics: "Sequence[Statistic]",
    alerts: "Sequence[Alert]",
    name: str = "",
    colour: str = "times",
    ax: Any = None,
) -> Any:
    """Draw one statistic of a track over its steps; `StabilityMonitor.plot` says more.

    Args:
        track: has the history, ``[steps, rows]`` for each statistic.
        rows: their names.
        statistics: what was watched.
        alerts: each one is framed.
        name: of the statistic. Default: ``token_std_mean``, or the first one.
        colour: "times", "value" or "sigmas". Default: "times".
        ax: matplotlib axes to draw on. Default: a new figure.
    """
    known = {statistic.name: statistic for statistic in statistics}
    usual = "token_std_mean" if "token_std_mean" in known else next(iter(known))
    statistic: Statistic = by_name(name or usual, known, type(known[usual]), "statistic")
    values, steps = track.history()[statistic.name].numpy(), track.history_steps().numpy()
    if colour not in COLOURS:
        raise ValueError(f"colour says what is drawn, {', '.join(COLOURS)}; got {colour!r}")
    if not len(steps):
        raise ValueError("there is nothing to plot yet: no step was recorded")
    try:
        from matplotlib import pyplot
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'stabnorm[plot]'") from error
    if ax is None:
        height = min(12.0, max(2.5, 0.28 * len(rows) + 1.2))
        _, ax = pyplot.subplots(figsize=(10, height), layout="constrained")
    shown, limits, colours, label = _shown(values, statistic, colour)
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    mesh = ax.pcolormesh(edges, np.arange(len(rows) + 1) - 0.5, shown.T, cmap=colours, **limits)
    ax.set_facecolor("0.8")  # where there is no value
    lost = np.argwhere(np.isinf(values) | (np.isnan(values) & np.maximum.accumulate(~np.isnan(values), axis=0)))
    if len(lost):
        ax.scatter(steps[lost[:, 0]], lost[:, 1], s=4, c="magenta", marker="s", label="NaN or infinite")
        ax.legend(loc="upper left", fontsize="small")
    width = max(1.0, (steps[-1] - steps[0]) / 100)
    places = {layer: place for place, layer in enumerate(rows)}
    for alert in alerts:
        if alert.layer in places and steps[0] <= alert.step <= steps[-1]:
            corner = alert.step - width / 2, places[alert.layer] - 0.5
            ax.add_patch(Rectangle(corner, width, 1, fill=False, edgecolor="crimson", linewidth=1.5))
    every = max(1, len(rows) // 40)
    ax.set_yticks(range(0, len(rows), every), [name.replace("$", r"\$") for name in rows[::every]], fontsize="small")
    ax.invert_yaxis()
    ax.set_xlabel("step")
    ax.set_title(f"{statistic.name}, {label}", fontsize="medium")
    ax.figure.colorbar(mesh, ax=ax, label=label, extend="both")
    return ax.figure


def _shown(
    values: npt.NDArray[np.floating[Any]], statistic: "Statistic", colour: str
) -> tuple[npt.NDArray[Any], dict[str, Any], str, str]:
    """Return what is drawn, the limits of its colours, their name and a label."""
    finite = np.where(np.isfinite(values), values, np.nan)
    if colour == "value":
        return finite, {}, "viridis", "value" if statistic.unit == "1" else f"value, in {statistic.unit}"
    baseline = Baseline(values.shape[1], statistic.floor, statistic.negligible)
    baseline.extend(values)
    at = np.arange(len(values))
    if colour == "sigmas":
        return baseline.scores(finite, at), {"vmin": -8, "vmax": 8}, "RdBu_r", "robust sigmas off its usual value"
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.log2(finite / baseline.usual(at))
    return times, {"vmin": -1, "vmax": 1}, "RdBu_r", "log2 of value / usual value"
