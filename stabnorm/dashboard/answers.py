"""What the page asks, answered in plain containers for JSON: the server and the report give the same answers.

Arrays travel as base64 of little-endian float32, which keeps NaN and infinity.
"""

import base64
import csv
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.definitions import definition
from stabnorm.dashboard.runs import Run, open_run, run_folders
from stabnorm.dashboard.tiles import Columns, columns_of, extremes, tile_of
from stabnorm.dashboard.verdict import lost_from, verdict
from stabnorm.monitor.baseline import ARMED, BOUND, LEARNT

MOST_COLUMNS = 2000
_PAUSE = 20  # between two walks through the folders, as a multiple of what one takes
_GRADIENTS = "gradient"  # the axis of statistics that fade with a layer's own norm

Answer = dict[str, Any]


class Unknown(KeyError):
    """A run, a layer or a statistic that the record does not have."""


class Answers:
    """Answers the page's questions about all runs below some folders.

    Args:
        roots: folders, each with a name that is put before its runs, or "".

    Example:
        >>> Answers({"": Path("no_such_folder")}).overview()["runs"]
        []
    """

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self._roots = dict(roots)
        self._runs: dict[str, Run] = {}
        self._folders: dict[str, Path] = {}
        self._look_again = 0.0
        self._verdicts: dict[str, tuple[int, Answer]] = {}

    def refresh(self) -> None:
        """Look for new runs, and read what the known ones have written since."""
        begin = time.monotonic()
        if begin >= self._look_again:
            for prefix, root in self._roots.items():
                for name, folder in run_folders(root).items():
                    full = f"{prefix}/{name}" if prefix else name
                    if self._folders.get(full) != folder:
                        self._folders[full], self._runs[full] = folder, open_run(full, folder)
            # A page asks every few seconds, and a large tree of folders is walked through less often.
            self._look_again = begin + _PAUSE * (time.monotonic() - begin)
        for run in self._runs.values():
            run.refresh()

    def runs(self) -> list[Run]:
        """Return the runs that have a record."""
        return [run for run in self._runs.values() if run]

    def _run(self, name: str) -> Run:
        if name not in self._runs:
            raise Unknown(f"there is no run {name!r}; known: {', '.join(sorted(self._runs)) or 'none'}")
        return self._runs[name]

    def _values(self, run: Run, statistic: str, companion: str) -> npt.NDArray[np.float32]:
        values = run.series(statistic, companion)
        if values is None or values.ndim != 2:
            raise Unknown(f"run {run.name!r} has no statistic {statistic!r}")
        return values

    # -- the questions -------------------------------------------------------------------------------------------------

    def overview(self) -> Answer:
        """Return all runs with their verdicts, worst first, and the definitions of their statistics."""
        runs = sorted(map(self._card, self.runs()), key=lambda card: (-card["severity"], card["name"]))
        names = {name for card in runs for part in card["parts"] for name in part["statistics"]}
        names |= {str(alert["statistic"]) for card in runs for onset in card["onsets"] for alert in onset["alerts"]}
        known = {name: definition(name)._asdict() for name in sorted(names)}
        return {"runs": runs, "definitions": known, "learnt": LEARNT, "armed": ARMED, "bound": BOUND}

    def _card(self, run: Run) -> Answer:
        version, card = self._verdicts.get(run.name, (-1, {}))
        if version == run.version:
            return card
        judged = verdict(run)
        steps = run.rows().steps
        card = {
            "name": run.name,
            "version": run.version,
            "state": judged.state,
            "severity": judged.severity,
            "title": judged.title,
            "lines": list(judged.lines),
            "onsets": [onset._asdict() for onset in judged.onsets],
            "notes": run.notes,
            "steps": [int(steps[0]), int(steps[-1])] if len(steps) else [0, 0],
            "parts": [
                {
                    "companion": companion,
                    "layers": list(run.rows(companion).layers),
                    "statistics": run.statistics(companion),
                }
                for companion in run.companions()
            ],
        }
        self._verdicts[run.name] = run.version, card
        return card

    def map(self, run: str, statistic: str, companion: str = "", **window: int) -> Answer:
        """Return one statistic of all layers in columns, see `stabnorm.dashboard.tiles.Tile`."""
        of = self._run(run)
        values = self._values(of, statistic, companion)
        rows, baseline = of.rows(companion), of.baseline(statistic, companion)
        columns = _columns(rows.steps, **window)
        tile = tile_of(values, rows.steps, baseline, columns)
        armed = baseline.armed_at()
        ran = of.series("tokens", companion)
        return {
            "layers": list(rows.layers),
            "edges": columns.edges.tolist(),
            "low": packed(tile.low),
            "high": packed(tile.high),
            "step": packed(tile.step),
            "value": packed(tile.value),
            "usual": packed(tile.usual),
            "scale": packed(tile.scale),
            "lost": packed(_lost(values, ran, columns)),
            "armed": [int(rows.steps[at]) if at < len(rows.steps) else None for at in armed.tolist()],
            "faded": self._faded(of, statistic, companion),
            "every": of.measured_every(statistic, companion),
        }

    def _faded(self, run: Run, statistic: str, companion: str) -> list[int | None]:
        """Return for each row the step from which on its own norm is gone, for statistics of the gradient."""
        lam = None if companion or definition(statistic).axis != _GRADIENTS else run.series("lam")
        rows = run.rows(companion)
        if lam is None:
            return [None] * len(rows.layers)
        gone = lam == 0
        return [int(rows.steps[column.argmax()]) if column.any() else None for column in gone.T]

    def range(self, statistic: str, companion: str = "") -> Answer:
        """Return smallest and largest finite value over all runs, and the smallest positive one, for one scale."""
        low, least, high = np.inf, np.inf, -np.inf
        for run in self.runs():
            values = run.series(statistic, companion)
            finite = values[np.isfinite(values)] if values is not None else np.empty(0)
            if finite.size:
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
                least = min(least, float(np.min(finite, where=finite > 0, initial=np.inf)))
        return {"low": _number(low), "least": _number(least), "high": _number(high)}

    def lines(self, run: str, **window: int) -> Answer:
        """Return loss and learning rate in columns, where the loss is lost, and the scalars of validation."""
        of = self._run(run)
        steps = of.rows().steps
        columns = _columns(steps, **window)
        answer: Answer = {"edges": columns.edges.tolist()}
        for name in ("loss", "learning_rate"):
            values = of.series(name)
            if values is not None and values.ndim == 1:
                low, high = extremes(values, columns)
                answer[name] = {"low": packed(low), "high": packed(high), "mean": packed(_means(values, columns))}
        lost = None if (loss := of.series("loss")) is None else lost_from(loss)
        answer["lost"] = None if lost is None else int(steps[lost])
        first, end = columns.edges[0], columns.edges[-1]
        answer["validation"] = {
            tag: [[step, _number(value)] for step, value in sorted(points.items()) if first <= step < end]
            for tag, points in of.validation.items()
        }
        return answer

    def layer(self, run: str, layer: str, statistic: str, companion: str = "", step: int = -1, **window: int) -> Answer:
        """Return all that is known of one layer: a statistic with its usual band, and all statistics at a step."""
        of = self._run(run)
        rows = of.rows(companion)
        if layer not in rows.layers:
            raise Unknown(f"run {run!r} has no layer {layer!r}")
        column = rows.layers.index(layer)
        columns = _columns(rows.steps, **window)
        at = int(np.searchsorted(rows.steps, step)) if step >= 0 else len(rows.steps) - 1
        at = min(at, len(rows.steps) - 1)
        return {
            "layer": layer,
            "step": int(rows.steps[at]),
            "edges": columns.edges.tolist(),
            "band": self._band(of, statistic, companion, column, columns),
            "table": [self._at(of, name, companion, column, at) for name in of.statistics(companion)],
            "profile": self._profile(of, statistic, companion, at),
            "channels": _channels(of, column, columns) if not companion else None,
            "others": {
                other.name: packed(extremes(values[:, other.rows(companion).layers.index(layer)],
                                            _columns(other.rows(companion).steps, **window))[1])
                for other in self.runs()
                if other is not of and layer in other.rows(companion).layers
                and (values := other.series(statistic, companion)) is not None
            },
        }  # fmt: skip

    def _band(self, run: Run, statistic: str, companion: str, column: int, columns: Columns) -> Answer:
        values = self._values(run, statistic, companion)
        baseline = run.baseline(statistic, companion)
        low, high = extremes(values[:, column], columns)
        at = np.clip(columns.starts[1:] - 1, 0, None)
        usual, scale = baseline.usual(at)[:, column], baseline.scale(at)[:, column]
        bounds = {"under": packed(usual * np.exp(-BOUND * scale)), "over": packed(usual * np.exp(BOUND * scale))}
        return {"low": packed(low), "high": packed(high), "usual": packed(usual), **bounds}

    def _at(self, run: Run, statistic: str, companion: str, column: int, at: int) -> Answer:
        values = self._values(run, statistic, companion)
        where = np.array([at])
        baseline = run.baseline(statistic, companion)
        scores = baseline.scores(values[at : at + 1], where)[0, column]
        lam = None if companion else run.series("lam")
        if lam is not None and definition(statistic).axis == _GRADIENTS and lam[at, column] < 1:
            scores = np.nan  # a layer whose own norm is taken away loses its gradients, as it should
        return {
            "statistic": statistic,
            "value": _number(values[at, column]),
            "usual": _number(baseline.usual(where)[0, column]),
            "sigmas": _number(scores),
            "every": run.measured_every(statistic, companion),
        }

    def _profile(self, run: Run, statistic: str, companion: str, at: int) -> Answer:
        values = self._values(run, statistic, companion)
        usual = run.baseline(statistic, companion).usual(np.array([at]))[0]
        return {"value": packed(values[at]), "usual": packed(usual)}

    def switch(self, run: str, **window: int) -> Answer:
        """Return lam of each layer in columns, the gate's decisions, affine residuals, and where each fold went."""
        of = self._run(run)
        lam = of.series("lam")
        rows = of.rows()
        if lam is None or not len(rows.steps):
            return {}
        columns = _columns(rows.steps, **window)
        residual = of.series("affine_residual")
        return {
            "layers": list(rows.layers),
            "edges": columns.edges.tolist(),
            "lam": packed(extremes(lam, columns)[0]),
            "residual": None if residual is None else packed(extremes(residual, columns)[1]),
            "gate": [{"at": event.step, **event.data} for event in of.events if event.kind == "hold"],
            "folds": next((event.data for event in reversed(of.events) if event.kind == "fold_report"), None),
        }

    def csv(self, run: str, statistic: str, companion: str = "", first: int = 0, last: int = -1) -> str:
        """Return a statistic as text, a line for each step; a name that a spreadsheet would compute is quoted."""
        of = self._run(run)
        rows = of.rows(companion)
        values = self._values(of, statistic, companion)
        begin, end = np.searchsorted(rows.steps, (first, last + 1 if last >= 0 else np.iinfo(np.int64).max))
        writer = csv.writer(file := io.StringIO())
        writer.writerow(["step", *(f"'{name}" if name[:1] in "=+-@" else name for name in rows.layers)])
        writer.writerows(
            [step, *row] for step, row in zip(rows.steps[begin:end].tolist(), values[begin:end].tolist(), strict=True)
        )
        return file.getvalue()

    def questions(self) -> dict[str, Callable[..., Answer]]:
        """Return the questions by the names that the page uses."""
        return {
            "overview": self.overview,
            "map": self.map,
            "range": self.range,
            "lines": self.lines,
            "layer": self.layer,
            "switch": self.switch,
        }


def _columns(steps: npt.NDArray[np.int64], first: int = 0, last: int = -1, columns: int = 600) -> Columns:
    """Return the columns of a window; without a last step it ends where the record ends."""
    end = int(steps[-1]) if len(steps) else 0
    begin = max(first, int(steps[0]) if len(steps) else 0)
    last = end if last < 0 else last
    return columns_of(steps, min(begin, last), last, min(columns, MOST_COLUMNS))


def _means(values: npt.NDArray[np.float32], columns: Columns) -> npt.NDArray[np.float64]:
    known = ~np.isnan(values)
    sums = np.r_[0.0, np.cumsum(np.where(known & np.isfinite(values), values, 0), dtype=np.float64)][columns.starts]
    counts = np.r_[0, np.cumsum(known & np.isfinite(values))][columns.starts]
    with np.errstate(invalid="ignore", divide="ignore"):
        means: npt.NDArray[np.float64] = np.diff(sums) / np.diff(counts)
    return means


def _lost(
    values: npt.NDArray[np.float32], tokens: npt.NDArray[np.float32] | None, columns: Columns
) -> npt.NDArray[np.float32]:
    """Return 1 where a layer ran and its statistic was NaN although it had been known before, else 0."""
    missing = np.isnan(values)
    ran = np.ones_like(missing) if tokens is None else tokens > 0
    before = np.maximum.accumulate(~missing, axis=0)
    lost = (missing & ran & before).astype(np.float32)
    out = extremes(lost, columns)[1]
    return np.nan_to_num(out)


def _channels(run: Run, column: int, columns: Columns) -> Answer | None:
    """Return the channels of a layer that were loudest most often, and when each of them was among the loudest."""
    ids, values = run.series("top_channel_ids"), run.series("top_channel_values")
    if ids is None or values is None or ids.ndim != 3:
        return None
    ids, values = ids[:, column], values[:, column]
    begin, end = columns.starts[0], columns.starts[-1]
    known = ~np.isnan(ids[begin:end]) & ~np.isnan(values[begin:end])  # which channel holds a NaN is not known
    found, counts = np.unique(ids[begin:end][known], return_counts=True)
    loudest = found[np.argsort(-counts, kind="stable")][:8].astype(int)
    of_channel = [
        np.where(ids == channel, values, np.nan).max(1, initial=-np.inf, where=ids == channel) for channel in loudest
    ]
    rows = [extremes(np.where(np.isneginf(row), np.nan, row), columns)[1] for row in of_channel]
    return {
        "ids": loudest.tolist(),
        "values": packed(np.array(rows).T if rows else np.empty((len(columns.edges) - 1, 0))),
    }


def packed(values: npt.NDArray[Any]) -> Answer:
    """Return an array as the page reads it.

    Example:
        >>> packed(np.array([[1.0, np.nan]]))
        {'shape': [1, 2], 'data': 'AACAPwAAwH8='}
    """
    return {"shape": list(values.shape), "data": base64.b64encode(values.astype("<f4").tobytes()).decode()}


def _number(value: Any) -> float | str:
    """Return a number, or what is not finite as a string that both `float` and `Number` read."""
    value = float(value)
    if np.isnan(value):
        return "NaN"
    return value if np.isfinite(value) else "Infinity" if value > 0 else "-Infinity"
