"""`StabilityMonitor`: what every normalization layer of a model sees, at every step, in any training loop."""

import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabnorm._models.wrappers import unwrapped
from stabnorm.companions.companion import Companion
from stabnorm.errors import StabNormError
from stabnorm.monitor import buffers
from stabnorm.monitor.buffers import SIDE_COLUMNS, DeviceState, Flight, History
from stabnorm.monitor.cost import Cost, Stopwatch
from stabnorm.monitor.detailed import DetailedPast
from stabnorm.monitor.details import Details, is_detailed
from stabnorm.monitor.detect import Alert, Detector
from stabnorm.monitor.observe import Observer
from stabnorm.monitor.past import Moments, Past
from stabnorm.monitor.ranks import Gathered, is_first_rank, merge_over_ranks, merging_ranks, refuse_other_layers
from stabnorm.monitor.record import Block, RecordWriter
from stabnorm.monitor.statistics import Statistic, resolve
from stabnorm.monitor.track import Tracks
from stabnorm.monitor.trial import try_own_statistics
from stabnorm.nn.prep import PRepBN
from stabnorm.norms import find_norms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


logger = logging.getLogger("stabnorm")


class StabilityMonitor:
    """Tracks how mean and variance fluctuate and how large the outliers are at every norm of a model.

    Use it as a context manager around a training loop, or call `attach` and `detach`. Forwards count while ``model`` is
    in training mode; everything between two calls of `step` is one step, however many micro-batches it took.

    Processes that train together (DDP, FSDP2) each have a monitor and call `step` alike; what they see is merged, one
    collective a step, so that all hold the figures of the whole batch, and the first of them writes the record.

    Args:
        model: the model; its norms are found by `find_norms`.
        preset: "economy", "standard", "full", or a list of statistics: names, see `stabnorm.monitor.statistics`, and
            objects of its class `Statistic`, which may be your own.
        flush_every: steps between two copies to the host, each of which keeps every step of every layer. Default: 50.
        include: a regular expression, or a list of them, that a layer's name must match. Default: all.
        exclude: the same for layers to leave out. Default: none.
        gradients: False leaves out the gradient statistics and their hooks. Default: True.
        sync: merge over all processes of `torch.distributed` where it is initialised; False: this one is on its own; a
            process group: over its processes, where others have other layers. Default: True.
        companions: what to watch beside the norms, by name ("attention", "weights", "embedding", "output") or as
            objects of `stabnorm.companions`. Default: nothing.
        fused: run torch's own LayerNorm and RMSNorm in one pass with what watches them, in eager mode, where there is
            a kernel for both, see `stabnorm.ops.backends`. Output and gradients are then the norm's to rounding, not
            to the bit. Default: False, looking changes nothing.

    Raises:
        ValueError: no norm to watch, an unknown statistic or preset, a flush interval below 1, a statistic of your own
            that does not give one number per layer, a companion that finds nothing to watch.
        TypeError: a statistic that is neither a name nor a `Statistic`.

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
        preset: str | Sequence[str | Statistic] = "standard",
        *,
        flush_every: int = 50,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        gradients: bool = True,
        sync: "bool | ProcessGroup" = True,
        companions: Sequence[str | Companion] = (),
        fused: bool = False,
    ) -> None:
        if flush_every < 1:
            raise ValueError(f"flush_every counts the steps from flush to flush, got {flush_every}; use 1 or more")
        chosen = [s for s in resolve(preset) if gradients or "gradients" not in s.needs_all]
        if not chosen:
            raise ValueError(f"preset {preset!r} holds gradient statistics only, and gradients=False leaves them out")
        model = unwrapped(model)
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
        self.sync = sync
        self._norms = norms
        needs = frozenset[str]().union(*(s.needs_all for s in chosen))
        width = max(norm.num_features for norm in norms)
        self._past_class = DetailedPast if any(s.remembers for s in chosen) else Past
        self._details = Details(norms, width, needs) if is_detailed(chosen) else None
        self._observer = Observer(
            model, norms, tokens="tokens" in needs, normalized="normalized" in needs, gradients="gradients" in needs,
            details=self._details, merged=bool(sync), fused=fused,
        )  # fmt: skip
        try_own_statistics(chosen, norms, self._observer, self._details, self._past_class)
        self._agreed = False  # all ranks watch the same
        self._speaks = True  # the first of them does
        self._state: DeviceState | None = None  # made at the first step, on the device the model is on by then
        self.has_running_statistics = np.array([norm.running_mean is not None for norm in norms])
        self._with_buffers = [(i, norm) for i, norm in enumerate(norms) if norm.running_mean is not None]
        fading = [norm.name for norm in norms if isinstance(norm.module, PRepBN)]
        self._detector = Detector(self.statistics, self.layers, fading)
        self._filled = 0  # rows since the last flush
        self._in_flight: Flight | None = None
        self._columns = len(chosen) + SIDE_COLUMNS
        self._history = History(len(norms), self._columns, flush_every)
        self._stopwatch = Stopwatch()
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
        self._agree()
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
        optimizer: Optimizer | Sequence[Optimizer] = (),
    ) -> None:
        """End an optimizer step: call it after the last backward and before the next forward.

        Args:
            loss: the step's loss, for the record. A tensor is not read before the flush.
            learning_rate: the step's learning rate, for the record.
            grad_scale: by what gradients were multiplied, ``scaler.get_scale()`` or the scaler's own tensor; call
                before ``scaler.update()``. Default: 1.
            optimizer: the one that has just stepped, or several, for the statistics of its moments ("full" has some);
                call before ``zero_grad()``. Default: none, which makes those NaN.

        Raises:
            StabNormError: the hooks are not on, or another rank watches other layers.
            ValueError: the loss is not one number.
            TypeError: the optimizer is none.
        """
        if not self._observer.attached:
            raise StabNormError("step() on a monitor whose hooks are off; use `with monitor:` or call attach() first")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss is one number, got a tensor of shape {tuple(loss.shape)}; use loss.mean()")
        start = self._stopwatch.begin_step(self._hook_seconds)
        self._agree()
        state = self._on_device()
        past = state.past
        row, scalars = state.rows[self._filled], state.scalars[self._filled]
        for column, scalar in enumerate((loss, learning_rate)):
            value = torch.nan if scalar is None else scalar
            scalars[column] = value.detach().reshape(()) if isinstance(value, Tensor) else value
        raw, gradient = self._observer.take(state.device)
        if grad_scale is not None:
            gradient = gradient / grad_scale
        detail, gap = None, scalars.new_full((1,), torch.nan)
        if self._details is not None:
            detail, gap = self._details.slabs.take(state.device), self._details.branch_gap(state.device)
        gathered, between = (
            Gathered(gradient, buffers.running_buffers(self._with_buffers, past), scalars[:1], gap),
            None,
        )
        if merging_ranks(self.sync) > 1:
            raw, gathered, between, detail = merge_over_ranks(self.sync, raw, gathered, detail)
            scalars[:1] = gathered.loss
        now = Moments.of(raw, gathered.gradient, state.layout, between)
        if self._details is not None and detail is not None:
            now = self._details.beside(now, detail, gathered.branch_gap, optimizer)
        values = torch.stack([statistic.compute(now, past) for statistic in self.statistics], -1)
        row[:, : len(self.statistics)] = torch.where(now.ran[:, None], values, torch.nan)
        buffers.write_side_columns(row[:, len(self.statistics) :], now)
        past.update(now, *gathered.running)
        self._observer.discard()
        self.companions.step()
        for listen in self.listeners:
            listen(self.steps_done, row[:, : len(self.statistics)])
        self._filled += 1
        self.steps_done += 1
        self._stopwatch.end_step(start, self._hook_seconds)
        if self._filled == self.flush_every:
            self._send()

    def _agree(self) -> None:
        """Find out, once, whether all ranks watch the same: what they see is merged blindly from then on."""
        if not self._agreed and merging_ranks(self.sync) > 1:
            refuse_other_layers(self.sync, [*self.layers, *(statistic.name for statistic in self.statistics)])
            self._agreed, self._speaks = True, is_first_rank(self.sync)

    def _on_device(self) -> DeviceState:
        device, before = self._observer.device, self._state
        if before is None or before.device != device:
            shape = (self.flush_every, len(self._norms), self._columns)
            self._state = DeviceState.of(self._norms, self._observer.width, shape, device, self._past_class)
            if before is not None:  # the model has moved
                self._state.past.load_state_dict(before.past.state_dict())
                self._state.rows.copy_(before.rows)
                self._state.scalars.copy_(before.scalars)
            return self._state
        return before

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
        rows = self._history.values()
        return {name: rows[:, :, column] for column, name in enumerate(self._column_names())}

    def history_steps(self) -> Tensor:
        """The optimizer steps that the rows of `history()` stand for, counted from 0."""
        self.flush()
        return self._history.steps()

    def _column_names(self) -> tuple[str, ...]:
        return (*(statistic.name for statistic in self.statistics), "tokens")

    def _send(self) -> None:
        """Start the copy to the host; on a GPU it runs beside the next steps."""
        if not self._filled:
            return
        start = time.perf_counter()
        self._receive()
        self._in_flight, self._filled = self._flight(), 0
        self.companions.send(self.steps_done)
        self._stopwatch.flushes += time.perf_counter() - start
        if self._observer.device.type == "cpu":
            self._receive()

    def _flight(self) -> Flight:
        """The rows since the last flush, on their way to the host."""
        state, filled = self._state, self._filled
        assert state is not None  # a row was filled
        return Flight(self.steps_done - filled, state.rows[:filled], state.scalars[:filled])

    def _receive(self) -> None:
        """Take what has arrived: history, alerts, record."""
        if self._in_flight is None:
            return
        start = time.perf_counter()
        flight, self._in_flight = self._in_flight, None
        flight.wait()
        self._history.add(flight)
        statistics = len(self.statistics)
        values, tokens, nonfinite = flight.rows.split([statistics, 1, 1, SIDE_COLUMNS - 2], dim=-1)[:3]
        alerts = self._detector.update(flight.first_step, values, tokens[..., 0], nonfinite[..., 0] > 0)
        self.alerts += alerts
        if self._speaks:
            self._say_if_nothing_ran(tokens)
        self._report(flight.block(self.layers, self._column_names()), alerts)
        for block, found in self.companions.receive():
            self.alerts += found
            self._report(block, found)
        self._stopwatch.flushes += time.perf_counter() - start

    def _report(self, block: Block, alerts: Sequence[Alert]) -> None:
        """What has arrived, to the log and the record."""
        if not self._speaks:
            return
        for alert in alerts:
            where = f"stabnorm, step {alert.step}, {alert.layer}"
            logger.warning("%s: %s = %.4g: %s", where, alert.statistic, alert.value, alert.reason)
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
            "model.train()? If it runs from a graph that is never made anew, torch.jit's or a CUDA graph of your own, "
            "say, attach the monitor before that graph is made",
            len(tokens),
        )

    @property
    def _hook_seconds(self) -> float:
        return self._observer.seconds + self.companions.hook_seconds

    @property
    def seconds(self) -> float:
        """Time spent in hooks, steps and flushes so far, on the host."""
        return self._hook_seconds + self._stopwatch.steps + self._stopwatch.flushes

    @property
    def cost(self) -> Cost:
        """What monitoring cost so far, measured on the host."""
        return self._stopwatch.cost(self._hook_seconds)

    # -- resume --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Baselines, counters, and the rows since the last flush; the steps before are in the record, not in here.

        Tensors and plain containers. Nothing is flushed or written for it.
        """
        waiting = buffers.joined(self._in_flight, self._flight() if self._filled else None)
        return {
            "version": 2,
            "layers": list(self.layers),
            "channels": [norm.num_features for norm in self._norms],
            "statistics": [statistic.name for statistic in self.statistics],
            "steps_done": self.steps_done,
            "past": self._state.past.state_dict() if self._state is not None else None,
            "detector": self._detector.state_dict(),
            "alerts": [alert.as_dict() for alert in self.alerts],
            "rows": self._history.none() if waiting is None else waiting.rows,
            "scalars": torch.empty(0, 2, device="cpu") if waiting is None else waiting.scalars,
            "companions": self.companions.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: `history()` then begins with the rows that were not flushed by then.

        The step counter is always restored; the rest when layers and statistics are the same, else it starts afresh,
        with a warning. Rows that a flush had received when the run was killed come a second time to its record, of
        which the last counts.
        """
        self.flush()
        self._history.clear()
        self.steps_done = int(state["steps_done"])
        self.alerts = [Alert(**alert) for alert in state["alerts"]]
        self.companions.load_state_dict(state.get("companions", {}), self.steps_done)
        mine = self.state_dict()
        if any(state[part] != mine[part] for part in ("version", "layers", "channels", "statistics")):
            logger.warning(
                "the checkpoint watched other layers or statistics, or is of another version: baselines start afresh "
                "at this step"
            )
            return
        if state["past"] is not None:
            self._on_device().past.load_state_dict(state["past"])
        self._detector.load_state_dict(state["detector"])
        if len(state["rows"]):
            rows, scalars = state["rows"].cpu(), state["scalars"].cpu()
            self._in_flight = Flight(self.steps_done - len(rows), rows, scalars)  # for the next flush
