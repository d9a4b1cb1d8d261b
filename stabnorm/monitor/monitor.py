"""`StabilityMonitor`: what every normalization layer of a model sees, at every step, in any training loop."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabnorm.companions.companion import Companion
from stabnorm.companions.tracks import Tracks
from stabnorm.errors import StabNormError
from stabnorm.monitor.buffers import DeviceState, Flight
from stabnorm.monitor.cost import Cost
from stabnorm.monitor.detect import Alert, Detector
from stabnorm.monitor.observe import Observer
from stabnorm.monitor.past import Moments, Past
from stabnorm.monitor.record import Block, RecordWriter
from stabnorm.monitor.statistics import resolve
from stabnorm.nn.prep import PRepBN
from stabnorm.norms import find_norms

TOP_CHANNELS = 3
_HISTORY_BYTES = 64 << 20
_INTERVALS = 128  # step durations remembered, of which the median is taken: a validation pass in between is no step

logger = logging.getLogger("stabnorm")


class StabilityMonitor:
    """Tracks how mean and variance fluctuate and how large the outliers are at every norm of a model.

    Use it as a context manager around a training loop, or call `attach` and `detach`. Forwards count while ``model`` is
    in training mode; everything between two calls of `step` is one step, however many micro-batches it took.

    Args:
        model: the model; its norms are found by `find_norms`.
        preset: "economy", "standard" or a list of statistics by name, see `stabnorm.monitor.statistics`.
        flush_every: steps between two copies to the host, each of which keeps every step of every layer. Default: 50.
        include: a regular expression, or a list of them, that a layer's name must match. Default: all.
        exclude: the same for layers to leave out. Default: none.
        gradients: False leaves out the gradient statistics and their hooks. Default: True.
        companions: what to watch beside the norms, by name ("attention", "weights", "embedding", "output") or as
            objects of `stabnorm.companions`. Default: nothing.

    Raises:
        ValueError: no norm to watch, an unknown statistic or preset, a flush interval below 1, a companion that finds
            nothing to watch.

    Shape: `history()` gives ``[steps, layers]`` for every statistic, float32; `companions[name].history()` the same
    for its own rows: heads, matrices, ...

    Functions in `listeners` are called at the end of each step with its number and all its statistics, ``[layers,
    statistics]`` in the order of `layers` and `statistics`, on the device: who must not wait copies them.

    >>> import torch, stabnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> with stabnorm.StabilityMonitor(model, gradients=False) as monitor:
    ...     for _ in range(3):
    ...         _ = model(torch.randn(5, 4))
    ...         monitor.step()
    >>> monitor.layers, monitor.history()["token_std_mean"].shape
    (('1',), torch.Size([3, 1]))
    """

    def __init__(
        self,
        model: nn.Module,
        preset: str | Sequence[str] = "standard",
        *,
        flush_every: int = 50,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        gradients: bool = True,
        companions: Sequence[str | Companion] = (),
    ) -> None:
        if flush_every < 1:
            raise ValueError(f"flush_every counts the steps from flush to flush, got {flush_every}; use 1 or more")
        chosen = [s for s in resolve(preset) if gradients or s.needs != "gradients"]
        if not chosen:
            raise ValueError(f"preset {preset!r} holds gradient statistics only, and gradients=False leaves them out")
        norms = find_norms(model, include=include, exclude=exclude)
        if not norms:
            narrowed = f" with include={include!r}, exclude={exclude!r}" if include or exclude else ""
            raise ValueError(
                f"no normalization layer found in {type(model).__name__}{narrowed}: nothing to monitor. If it has "
                "norms of its own, tell stabnorm with stabnorm.register_norm"
            )
        self.statistics = tuple(chosen)
        self.layers = tuple(norm.name for norm in norms)
        self.flush_every = flush_every
        self.alerts: list[Alert] = []
        self.records: list[RecordWriter] = []
        self.listeners: list[Callable[[int, Tensor], None]] = []
        self.companions = Tracks(companions, model, flush_every, self.flush)
        self.steps_done = 0
        self.label = ""  # said before an alert: which of several processes this is
        self._norms = norms
        needs = {s.needs for s in chosen}
        self._observer = Observer(
            model, norms, tokens="tokens" in needs, normalized="normalized" in needs, gradients="gradients" in needs
        )
        self._state: DeviceState | None = None  # made at the first step, on the device the model is on by then
        self.has_running_statistics = np.array([norm.running_mean is not None for norm in norms])
        self._with_buffers = [(i, norm) for i, norm in enumerate(norms) if norm.running_mean is not None]
        fading = [norm.name for norm in norms if isinstance(norm.module, PRepBN)]
        self._detector = Detector(self.statistics, self.layers, fading)
        self._filled = 0  # rows since the last flush
        self._in_flight: Flight | None = None
        self._columns = len(chosen) + 2 + 2 * TOP_CHANNELS
        per_step = 4 * len(norms) * self._columns
        self._most_rows = max(flush_every, _HISTORY_BYTES // per_step)
        self._history: deque[Flight] = deque()
        self._bare_steps: deque[float] = deque(maxlen=_INTERVALS)  # durations, less what monitoring took of them
        self._last_step: tuple[float, float] | None = None  # when it was, and the seconds spent until then
        self._step_seconds = self._flush_seconds = 0.0
        self._first_step_seconds = (0.0, 0.0, 0.0)  # the first one allocates, and is no measure
        self._timed_steps = 0
        self._nothing_ran = False

    # -- life ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "StabilityMonitor":
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        self.flush()

    def attach(self) -> None:
        """Put the hooks on; a second call changes nothing."""
        self._observer.detach()
        self._observer.attach()
        self.companions.attach()
        self._on_device()  # now: what it allocates would hold a GPU up in the first step

    def detach(self) -> None:
        """Take every hook off; what was gathered stays readable."""
        self._observer.detach()
        self.companions.detach()

    def discard(self) -> None:
        """Forget what was gathered since the last step: forwards that were no part of training."""
        self._observer.discard()
        self.companions.discard()

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        *,
        loss: Tensor | float | None = None,
        learning_rate: Tensor | float | None = None,
        grad_scale: Tensor | float | None = None,
    ) -> None:
        """End an optimizer step: call it after the last backward and before the next forward.

        Args:
            loss: the step's loss, for the record. A tensor is not read before the flush.
            learning_rate: the step's learning rate, for the record.
            grad_scale: by what gradients were multiplied, ``scaler.get_scale()`` or the scaler's own tensor; call
                before ``scaler.update()``. Default: 1.

        Raises:
            StabNormError: the hooks are not on.
            ValueError: the loss is not one number.
        """
        if not self._observer.attached:
            raise StabNormError("step() on a monitor whose hooks are off; use `with monitor:` or call attach() first")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss is one number, got a tensor of shape {tuple(loss.shape)}; use loss.mean()")
        start = time.perf_counter()
        self._time_step(start)
        state = self._on_device()
        past = state.past
        raw, gradient = self._observer.take(state.device)
        if grad_scale is not None:
            gradient = gradient / grad_scale
        now = Moments.of(raw, gradient, state.layout)
        row = state.rows[self._filled]
        values = torch.stack([statistic.compute(now, past) for statistic in self.statistics], -1)
        row[:, : len(self.statistics)] = torch.where(now.ran[:, None], values, torch.nan)
        self._write_side_columns(row, now)
        for column, scalar in enumerate((loss, learning_rate)):
            value = torch.nan if scalar is None else scalar
            state.scalars[self._filled, column] = value.detach().reshape(()) if isinstance(value, Tensor) else value
        past.update(now, *self._own_running_buffers(past))
        self._observer.discard()
        self.companions.step()
        for listen in self.listeners:
            listen(self.steps_done, row[:, : len(self.statistics)])
        self._filled += 1
        self.steps_done += 1
        self._step_seconds += time.perf_counter() - start
        if self._timed_steps == 1:
            self._first_step_seconds = (self._hook_seconds, self._step_seconds, self._flush_seconds)
        if self._filled == self.flush_every:
            self._send()

    def _time_step(self, now: float) -> None:
        if self._last_step is not None:
            at, seconds = self._last_step
            self._bare_steps.append(now - at - (self.seconds - seconds))
        self._last_step = now, self.seconds
        self._timed_steps += 1

    def _on_device(self) -> DeviceState:
        device, before = self._observer.device, self._state
        if before is None or before.device != device:
            shape = (self.flush_every, len(self._norms), self._columns)
            self._state = DeviceState.of(self._norms, self._observer.width, shape, device)
            if before is not None:  # the model has moved
                self._state.past.load_state_dict(before.past.state_dict())
                self._state.rows.copy_(before.rows)
                self._state.scalars.copy_(before.scalars)
            return self._state
        return before

    def _write_side_columns(self, row: Tensor, now: Moments) -> None:
        side = row[:, len(self.statistics) :]
        side[:, 0] = now.count
        side[:, 1] = (~torch.isfinite(now.absmax)).sum(-1)  # of x: a variance may overflow where x does not
        absmax = now.absmax if now.layout.exists is None else now.absmax.masked_fill(~now.layout.exists, -torch.inf)
        top = absmax.topk(min(TOP_CHANNELS, absmax.shape[-1]))
        side[:, 2:] = torch.nan
        there = now.ran[:, None] & ~torch.isneginf(top.values)
        count = top.values.shape[-1]
        side[:, 2 : 2 + count] = torch.where(there, top.indices, torch.nan)
        side[:, 2 + TOP_CHANNELS : 2 + TOP_CHANNELS + count] = torch.where(there, top.values, torch.nan)

    def _own_running_buffers(self, past: Past) -> tuple[Tensor, Tensor]:
        own = torch.full((2, *past.mean.shape), torch.nan, device=past.mean.device, dtype=past.mean.dtype)
        for index, norm in self._with_buffers:
            for part, buffer in enumerate((norm.running_mean, norm.running_var)):
                if buffer is not None:
                    own[part, index, : norm.num_features] = buffer.detach()
        return own[0], own[1]

    # -- what was gathered ---------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Copy what was gathered to the host, look for trouble, and write the record."""
        self._send()
        self._receive()

    def history(self) -> dict[str, Tensor]:
        """Every statistic of every step, ``[steps, layers]``; flushes first.

        NaN where a layer did not run, or where a statistic needs a past that is not there yet. Beside the statistics:
        "tokens", the valid tokens each layer saw. Bounded in memory: of a very long run the last 64 MiB are kept, and
        `history_steps` says which.
        """
        self.flush()
        if not self._history:
            return {name: torch.empty(0, len(self.layers)) for name in self._column_names()}
        rows = torch.cat([flight.rows for flight in self._history])
        return {name: rows[:, :, column] for column, name in enumerate(self._column_names())}

    def history_steps(self) -> Tensor:
        """The optimizer steps that the rows of `history()` stand for, counted from 0."""
        self.flush()
        return torch.tensor([f.first_step + i for f in self._history for i in range(len(f.rows))], dtype=torch.int64)

    def _column_names(self) -> tuple[str, ...]:
        return (*(statistic.name for statistic in self.statistics), "tokens")

    def _send(self) -> None:
        """Start the copy to the host; on a GPU it runs beside the next steps."""
        if not self._filled:
            return
        start = time.perf_counter()
        self._receive()
        state, filled = self._state, self._filled
        assert state is not None  # a row was filled
        self._in_flight = Flight(self.steps_done - filled, state.rows[:filled], state.scalars[:filled])
        self.companions.send(self.steps_done)
        self._filled = 0
        self._flush_seconds += time.perf_counter() - start
        if state.device.type == "cpu":
            self._receive()

    def _receive(self) -> None:
        """Take what has arrived: history, alerts, record."""
        if self._in_flight is None:
            return
        start = time.perf_counter()
        flight, self._in_flight = self._in_flight, None
        flight.wait()
        self._history.append(flight)
        while sum(len(f.rows) for f in self._history) - len(self._history[0].rows) >= self._most_rows:
            self._history.popleft()
        statistics = len(self.statistics)
        values, tokens, nonfinite = flight.rows.split([statistics, 1, 1, 2 * TOP_CHANNELS], dim=-1)[:3]
        self._say_if_nothing_ran(tokens)
        alerts = self._detector.update(flight.first_step, values, tokens[..., 0], nonfinite[..., 0] > 0)
        self._report(self._block(flight), alerts)
        for block, found in self.companions.receive():
            self._report(block, found)
        self._flush_seconds += time.perf_counter() - start

    def _report(self, block: Block, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            where = f"stabnorm, {self.label}step {alert.step}, {alert.layer}"
            logger.warning("%s: %s = %.4g: %s", where, alert.statistic, alert.value, alert.reason)
        self.alerts += alerts
        for record in self.records:
            record.write_block(block)
            for alert in alerts:
                record.write_event("alert", alert.step, alert.as_dict())

    def _say_if_nothing_ran(self, tokens: Tensor) -> None:
        if self._nothing_ran or bool((tokens > 0).any()):
            return
        self._nothing_ran = True
        logger.warning(
            "stabnorm: no monitored norm ran in training mode in %d steps. Is the model in training mode, "
            "model.train()? If it was compiled and run before the monitor was attached, its graphs have no hooks: call "
            "torch.compiler.reset() after attaching",
            len(tokens),
        )

    def _block(self, flight: Flight) -> Block:
        rows: np.ndarray[Any, Any] = flight.rows.numpy()
        series = {name: rows[:, :, column] for column, name in enumerate(self._column_names())}
        top = rows[:, :, len(self.statistics) + 2 :]
        series["top_channel_ids"], series["top_channel_values"] = top[..., :TOP_CHANNELS], top[..., TOP_CHANNELS:]
        for column, name in enumerate(("loss", "learning_rate")):
            scalars = flight.scalars[:, column]
            if not bool(scalars.isnan().all()):
                series[name] = scalars.numpy()
        return Block(flight.first_step, self.layers, series)

    @property
    def _hook_seconds(self) -> float:
        return self._observer.seconds + self.companions.hook_seconds

    @property
    def seconds(self) -> float:
        """Time spent in hooks, steps and flushes so far, on the host."""
        return self._hook_seconds + self._step_seconds + self._flush_seconds

    @property
    def cost(self) -> Cost:
        """What monitoring cost so far, measured on the host."""
        steps = self._timed_steps - 1
        if steps < 1:
            return Cost(*[float("nan")] * 4)
        spent = (self._hook_seconds, self._step_seconds, self._flush_seconds)
        hooks, step, flush = (1e3 * (a - b) / steps for a, b in zip(spent, self._first_step_seconds, strict=True))
        return Cost(hooks, step, flush, 0.1 * (hooks + step + flush) / float(np.median(self._bare_steps)))

    # -- resume --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Baselines and counters as tensors and plain containers; the past steps are in the record, not in here."""
        self.flush()
        return {
            "version": 1,
            "layers": list(self.layers),
            "channels": [norm.num_features for norm in self._norms],
            "statistics": [statistic.name for statistic in self.statistics],
            "steps_done": self.steps_done,
            "past": self._state.past.state_dict() if self._state is not None else None,
            "detector": self._detector.state_dict(),
            "alerts": [alert.as_dict() for alert in self.alerts],
            "companions": self.companions.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. The step counter is always restored.

        Baselines are restored when layers and statistics are the same; else they start afresh, with a warning.
        """
        self.steps_done = int(state["steps_done"])
        self.alerts = [Alert(**alert) for alert in state["alerts"]]
        self.companions.load_state_dict(state.get("companions", {}))
        mine = self.state_dict()
        if any(state[part] != mine[part] for part in ("version", "layers", "channels", "statistics")):
            logger.warning("the checkpoint watched other layers or statistics: baselines start afresh at this step")
            return
        if state["past"] is not None:
            self._on_device().past.load_state_dict(state["past"])
        self._detector.load_state_dict(state["detector"])
