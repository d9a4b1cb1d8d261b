"""`Snapshot`: all of a training that a step changes, on the host."""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Snapshot:
    """Keeps weights, buffers, optimizers, schedulers, scaler and random state on the host, and gives them back.

    `restore` writes in place, so that what holds on to a tensor, such as DDP or a compiled graph, goes on. Of a sharded
    tensor each process keeps its part.

    Args:
        models: the model, and averaged copies of it if there are any.
        optimizers: its optimizers. Default: none.
        schedulers: the schedulers of their learning rates. Default: none.
        scaler: the gradient scaler. Default: none.

    >>> model = nn.Linear(2, 2)
    >>> before, snapshot = model.weight.clone(), Snapshot([model])
    >>> _ = nn.init.zeros_(model.weight)
    >>> snapshot.restore()
    >>> bool((model.weight == before).all())
    True
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Iterable[Optimizer] = (),
        schedulers: Iterable[Any] = (),
        scaler: Any = None,
    ) -> None:
        self._models, self._optimizers = list(models), list(optimizers)
        self._schedulers, self._scaler = list(schedulers), scaler
        self._tensors = [_on_host(tensor) for tensor in self._live()]
        self._states = [
            {p: {k: _copied(v) for k, v in state.items()} for p, state in o.state.items()} for o in self._optimizers
        ]
        self._groups = [
            [{k: _copied(v) for k, v in group.items() if k != "params"} for group in o.param_groups]
            for o in self._optimizers
        ]
        self._plans = [copy.deepcopy(one.state_dict()) for one in self._schedulers]
        self._scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
        self.random = random_state()

    def _live(self) -> Iterator[Tensor]:
        for model in self._models:
            yield from model.parameters()
            yield from model.buffers()

    @torch.no_grad()
    def restore(self) -> None:
        """Make everything again what it was."""
        for live, kept in zip(self._live(), self._tensors, strict=True):
            _local(live).copy_(kept)
        for optimizer, states, groups in zip(self._optimizers, self._states, self._groups, strict=True):
            for parameter in [p for p in optimizer.state if p not in states]:
                del optimizer.state[parameter]
            for parameter, state in states.items():
                _restore(optimizer.state[parameter], state)
            for group, kept_group in zip(optimizer.param_groups, groups, strict=True):
                _restore(group, kept_group)
        for scheduler, plan in zip(self._schedulers, self._plans, strict=True):
            scheduler.load_state_dict(copy.deepcopy(plan))
        if self._scaler is not None:
            self._scaler.load_state_dict(copy.deepcopy(self._scale))
        restore_random_state(self.random)


def random_state() -> dict[str, Any]:
    """Return the random states of Python, NumPy and torch, on the CPU and on the current GPU."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _restore(live: Any, kept: dict[str, Any]) -> None:
    for name in [name for name in live if name not in kept and name != "params"]:
        del live[name]
    for name, value in kept.items():
        present = live.get(name)
        if isinstance(value, Tensor) and isinstance(present, Tensor) and _local(present).shape == value.shape:
            _local(present).copy_(value)
        else:
            live[name] = _copied(value)


def _copied(value: Any) -> Any:
    return _on_host(value) if isinstance(value, Tensor) else copy.deepcopy(value)


def _on_host(tensor: Tensor) -> Tensor:
    return _local(tensor).detach().to("cpu", copy=True)


def _local(tensor: Tensor) -> Tensor:
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own
