"""`Measurement`: what a step has gathered becomes a row of numbers for each layer, and a part of its past."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stabnorm.monitor.accumulators import Accumulators
from stabnorm.monitor.bands import Band, LayerOrder
from stabnorm.monitor.budget import dear_statistics
from stabnorm.monitor.detailed import DetailedPast
from stabnorm.monitor.details import Details
from stabnorm.monitor.past import Layout, Moments, Past, running_buffers
from stabnorm.monitor.ranks import Gathered
from stabnorm.monitor.rows import RowLayout, beside_statistics
from stabnorm.monitor.saved_past import load_pasts, saved_pasts
from stabnorm.monitor.standard import STANDARD, has_backend, standard_step
from stabnorm.statistic import Statistic


@dataclass(frozen=True)
class BandState:
    """A band's layout and past, on the device."""

    band: Band
    layout: Layout
    past: Past


class NormsOfStep:
    """What companions read of the norms in a step, in the order of the layers.

    Args:
        moments: functions that return those of each band.
        in_order: puts the layers of all bands in their order.
        everything: whether the step has gathered the dear data, too.
    """

    def __init__(self, moments: Sequence[Callable[[], Moments]], in_order: LayerOrder, everything: bool) -> None:
        self._moments, self._in_order, self._everything = moments, in_order, everything

    @cached_property
    def ran(self) -> Tensor:
        """Whether the layer saw a valid token, ``[L]``."""
        return self._in_order([now().ran for now in self._moments])

    @cached_property
    def affine_residual(self) -> Tensor:
        """See `Moments.affine_residual`, ``[L]``; NaN in a step that did not gather what it needs."""
        residual = self._in_order([now().affine_residual for now in self._moments])
        return residual if self._everything else torch.full_like(residual, torch.nan)


class Measurement:
    """Runs the catalogue over each band of layers, and keeps their pasts on the device.

    In a step that does not gather the dear data (`Accumulators.dear`), the statistics that need them are NaN.

    Args:
        accumulators: what the hooks fill.
        statistics: those that are computed.
        details: what is gathered beside the moments; None if no statistic needs it.
        columns: the columns of a row.
    """

    def __init__(
        self,
        accumulators: Accumulators,
        statistics: Sequence[Statistic],
        details: Details | None,
        columns: RowLayout,
    ) -> None:
        self._accumulators, self.statistics, self._details = accumulators, tuple(statistics), details
        self._columns = columns
        self._remembers = any(statistic.remembers for statistic in statistics)
        self._past_class = DetailedPast if self._remembers else Past
        self._others = [statistic for statistic in statistics if statistic.name not in STANDARD.statistics]
        # The columns of a row among those of `standard_step` and, after them, the other statistics.
        given = [*STANDARD.statistics, *STANDARD.beside_columns, *(statistic.name for statistic in self._others)]
        picked = [given.index(name) for name in (*columns.statistics, *columns.beside_columns)]
        self._picked = None if picked == list(range(len(given))) else torch.tensor(picked, device="cpu")
        self._in_order = LayerOrder(accumulators.bands)
        self._states: list[BandState] = []  # made at first use, on the model's device
        self.dear = dear_statistics(statistics)
        spared = [column for column, name in enumerate(columns.statistics) if name in self.dear]
        self._spared = torch.tensor(spared, device="cpu")
        self._channels = [layer.num_features for layer in accumulators.layers]

    def states(self, device: torch.device) -> list[BandState]:
        """Return layout and past of each band, on a device; after a move of the model, the pasts move, too."""
        before = self._states
        if not before or before[0].layout.eps.device != device:
            self._states = self.fresh_states(device)
            if before:
                self.load_past(saved_pasts(before, self._channels), device)
        return self._states

    def fresh_states(self, device: torch.device) -> list[BandState]:
        """Return layout and past of each band as they are before the first step."""
        with_buffers = any(layer.running_mean is not None for layer in self._accumulators.layers)
        layouts = [(band, Layout.of(band, device, with_buffers)) for band in self._accumulators.bands]
        return [BandState(band, layout, self._past_class(layout, band.width)) for band, layout in layouts]

    def gathered(self, states: Sequence[BandState], device: torch.device) -> list[Gathered]:
        """Return what each band has gathered on this process since the last step."""
        taken = self._accumulators.take(device)
        details = [None] * len(taken) if self._details is None else self._details.take(device)
        return [
            Gathered(moments, gradient, running_buffers(state.band, state.layout), detail)
            for (moments, gradient), detail, state in zip(taken, details, states, strict=True)
        ]

    def rows(
        self, states: Sequence[BandState], gathered: Sequence[Gathered], optimizers: Sequence[Optimizer]
    ) -> tuple[Tensor, NormsOfStep]:
        """Return the step's row ``[L, columns]``, and what companions read of it; the step then belongs to the past."""
        moments = [
            _MomentsOfStep(self, state, of, optimizers) for state, of in zip(states, gathered, strict=True)
        ]  # not functools.cache, which takes longer than the rest of this method
        parts = [self._row(state.past, of, now) for state, of, now in zip(states, gathered, moments, strict=True)]
        return self._in_order(parts), NormsOfStep(moments, self._in_order, self._accumulators.dear)

    def _row(self, past: Past, of: Gathered, moments: Callable[[], Moments]) -> Tensor:
        """Return a band's row, and add the step to its past."""
        in_one_pass = has_backend(of.moments.channel)
        everything = self._accumulators.dear
        chosen = self._others if in_one_pass else self.statistics
        spared = frozenset[str]() if everything else self.dear
        values = [_nothing(past) if s.name in spared else s.compute(moments(), past) for s in chosen]
        if self._remembers and everything:
            past.update_details(moments())
        if in_one_pass:
            seen, channel, token = of.moments
            row = standard_step(channel, seen, token, of.gradient, of.between, past)
            if values:
                others = torch.where((seen > 0)[:, None], torch.stack(values, -1), torch.nan)
                row = torch.cat([row, others.to(row.dtype)], -1)
            row = row if self._picked is None else row.index_select(-1, self._picked)
        else:
            now = moments()
            ran = torch.where(now.ran[:, None], torch.stack(values, -1), torch.nan)
            row = self._columns.pack(ran, beside_statistics(now))
            past.update(now)
        past.own = of.running
        if not everything and len(self._spared):
            row.index_fill_(-1, self._spared.to(row.device), torch.nan)
        return row

    def moments(self, state: BandState, gathered: Gathered, optimizers: Sequence[Optimizer]) -> Moments:
        """Return the moments of a band in a step, with the details if there are any."""
        now = Moments.of(gathered.moments, gathered.gradient, state.layout, gathered.between)
        if self._details is None or gathered.detail is None or not self._accumulators.dear:
            return now
        return self._details.beside(state.band, now, gathered.detail, optimizers)

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the past of all layers; None before the first step."""
        return saved_pasts(self._states, self._channels) if self._states else None

    def load_past(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Continue on a device from a saved past of the same layers.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing is loaded then.
        """
        states = self.fresh_states(device)
        load_pasts(states, saved, self._channels)
        self._states = states


class _MomentsOfStep:
    """`Measurement.moments` of a band, computed when it is first called, if it ever is."""

    def __init__(
        self, measurement: Measurement, state: BandState, gathered: Gathered, optimizers: Sequence[Optimizer]
    ) -> None:
        self._measurement, self._of = measurement, (state, gathered, optimizers)
        self._moments: Moments | None = None

    def __call__(self) -> Moments:
        if self._moments is None:
            self._moments = self._measurement.moments(*self._of)
        return self._moments


def _nothing(past: Past) -> Tensor:
    """Return NaN for each layer, as a statistic that was not measured."""
    return torch.full_like(past.layout.eps, torch.nan)
