"""What stays on the device between two flushes, and what is on its way to the host."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from stabnorm.monitor.past import Layout, Moments, Past
from stabnorm.monitor.record import Block
from stabnorm.norms import NormLayer

TOP_CHANNELS = 3
_HISTORY_BYTES = 64 << 20
SIDE_COLUMNS = 2 + 2 * TOP_CHANNELS  # what a row holds of each layer beside the statistics


@dataclass(frozen=True)
class DeviceState:
    """What stays on the device between flushes."""

    device: torch.device
    layout: Layout
    past: Past
    rows: Tensor  # [flush_every, layers, columns]
    scalars: Tensor  # [flush_every, 2]: loss, learning rate

    @staticmethod
    def of(
        norms: Sequence[NormLayer],
        width: int,
        shape: tuple[int, int, int],
        device: torch.device,
        past_class: type[Past] = Past,
    ) -> "DeviceState":
        """Empty, for these layers."""
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        sizes = torch.tensor([norm.num_features for norm in norms], device="cpu")
        uniform = all(norm.num_features == width for norm in norms)
        layout = Layout(
            exists=None if uniform else (torch.arange(width, device="cpu") < sizes[:, None]).to(device),
            channels=sizes.to(device, dtype),
            eps=torch.tensor([norm.eps for norm in norms], dtype=dtype).to(device),
            per_channel=torch.tensor([norm.kind == "batch" for norm in norms]).to(device),
            own_buffers=torch.tensor([norm.running_mean is not None for norm in norms]).to(device),
        )
        past = past_class(len(norms), width, device, dtype)
        return DeviceState(
            device,
            layout,
            past,
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape[0], 2, dtype=torch.float32, device=device),
        )


def write_side_columns(side: Tensor, now: Moments) -> None:
    """Into ``[layers, SIDE_COLUMNS]``: tokens, non-finite channels, the largest channels and their magnitudes."""
    side[:, 0] = now.count
    side[:, 1] = (~torch.isfinite(now.absmax)).sum(-1)  # of x: a variance may overflow where x does not
    absmax = now.absmax if now.layout.exists is None else now.absmax.masked_fill(~now.layout.exists, -torch.inf)
    top = absmax.topk(min(TOP_CHANNELS, absmax.shape[-1]))
    side[:, 2:] = torch.nan
    there = now.ran[:, None] & ~torch.isneginf(top.values)
    count = top.values.shape[-1]
    side[:, 2 : 2 + count] = torch.where(there, top.indices, torch.nan)
    side[:, 2 + TOP_CHANNELS : 2 + TOP_CHANNELS + count] = torch.where(there, top.values, torch.nan)


def running_buffers(norms: Sequence[tuple[int, NormLayer]], past: Past) -> Tensor:
    """Running mean and variance of the layers that have them, ``[2, L, C]`` with NaN elsewhere; or ``[2, 1, 1]``."""
    shape = past.mean.shape if norms else (1, 1)
    own = torch.full((2, *shape), torch.nan, device=past.mean.device, dtype=past.mean.dtype)
    for index, norm in norms:
        for part, buffer in enumerate((norm.running_mean, norm.running_var)):
            if buffer is not None:
                own[part, index, : norm.num_features] = buffer.detach()
    return own


class Flight:
    """Steps on their way to the host."""

    def __init__(self, first_step: int, rows: Tensor, scalars: Tensor) -> None:
        self.first_step = first_step
        self._event: torch.cuda.Event | None = None
        if rows.device.type == "cuda":
            self.rows, self.scalars = (
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in (rows, scalars)
            )
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self.rows, self.scalars = rows.cpu().clone(), scalars.cpu().clone()

    def wait(self) -> None:
        """Until the copy is done."""
        if self._event is not None:
            self._event.synchronize()

    def block(self, layers: Sequence[str], names: Sequence[str]) -> Block:
        """As a record has it: the columns by name, the largest channels, and what scalars there are."""
        rows: npt.NDArray[Any] = self.rows.numpy()
        series = {name: rows[:, :, column] for column, name in enumerate(names)}
        top = rows[:, :, -2 * TOP_CHANNELS :]
        series["top_channel_ids"], series["top_channel_values"] = top[..., :TOP_CHANNELS], top[..., TOP_CHANNELS:]
        for column, name in enumerate(("loss", "learning_rate")):
            scalars = self.scalars[:, column]
            if not bool(scalars.isnan().all()):
                series[name] = scalars.numpy()
        return Block(self.first_step, tuple(layers), series)


def joined(*flights: Flight | None) -> Flight | None:
    """One flight of those there are, in their order; None where there are none."""
    there = [flight for flight in flights if flight is not None]
    for flight in there:
        flight.wait()
    if not there:
        return None
    rows, scalars = (torch.cat(parts) for parts in zip(*((f.rows, f.scalars) for f in there), strict=True))
    return Flight(there[0].first_step, rows, scalars)


class History:
    """The flights that have arrived; of a very long run the last ones.

    Args:
        rows: layers, or whatever is measured.
        columns: numbers for each of them.
        at_least: steps to keep, though they be large.
    """

    def __init__(self, rows: int, columns: int, at_least: int) -> None:
        self._empty = torch.empty(0, rows, columns, device="cpu")
        self._most = max(at_least, _HISTORY_BYTES // (4 * rows * columns))
        self._flights: deque[Flight] = deque()

    def add(self, flight: Flight) -> None:
        """Take the next one in."""
        self._flights.append(flight)
        while sum(len(f.rows) for f in self._flights) - len(self._flights[0].rows) >= self._most:
            self._flights.popleft()

    def clear(self) -> None:
        """Forget all."""
        self._flights.clear()

    def none(self) -> Tensor:
        """``[0, rows, columns]``."""
        return self._empty

    def values(self) -> Tensor:
        """``[steps, rows, columns]``."""
        return torch.cat([self._empty, *(flight.rows for flight in self._flights)])

    def steps(self) -> Tensor:
        """The optimizer step of each, counted from 0."""
        steps = [flight.first_step + i for flight in self._flights for i in range(len(flight.rows))]
        return torch.tensor(steps, dtype=torch.int64, device="cpu")
