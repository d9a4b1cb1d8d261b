"""Ways through a forward's Python code that no example took, and what of a norm's channels they could meet.

The operations that ran say nothing of an early exit, of a layer that is skipped, or of a branch on a size. The code
does: where its condition depends on an argument and went one way only, the other way is read from the bytecode. What
that way reads, and what may be another value behind it, must stay what it is.

Only the user's own code is read so. That of an installed package serves many models and tasks, and most of its other
ways cannot be reached from the model at hand.
"""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from stabnorm.fold._trace import Obstacle
from stabnorm.fold._ways import Fork, Ways, given_arguments

_ways = cache(Ways)
_PATHS = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_CALLS = nn.Module.__call__.__code__.co_filename
_FOREIGN = {f"{path}{os.sep}" for path in (*_PATHS, Path(str(torch.__file__)).parent, Path(__file__).parents[1])}

Tags = dict[bytes, Tensor]  # sets of tags, each once


class Branches:
    """Watches the code of a model's forward while it runs.

    Args:
        tags_of: Gives the tags of the tensors in a value.
        path: Gives the name of the module that runs, None where nothing is to be watched.
        arrived: The tags that the forward of each module got so far.
    """

    def __init__(
        self,
        tags_of: Callable[[Any], Sequence[Tensor]],
        path: Callable[[], str | None],
        arrived: Mapping[str, Sequence[Tensor]],
    ) -> None:
        self.tags_of, self.path, self.arrived = tags_of, path, arrived
        self.functions: dict[tuple[str, CodeType], _Function] = {}
        self.inner: set[CodeType] = set()  # of functions that are defined while the model runs

    def __enter__(self) -> Self:
        self.before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def obstacles(self) -> Iterator[Obstacle]:
        """List what the ways that were not taken could meet."""
        for (path, _), function in self.functions.items():
            where = f" in '{path}'" if path else ""
            for fork, tags in function.not_taken():
                met = torch.unique(torch.cat([*tags.values()]))
                place = f"{function.ways.text(fork)}{where}"
                what = "another number of rounds" if fork.ends_rounds else "the other way"
                yield Obstacle(met, f"{what} at {place} could meet it, and no example reaches that: pass one that does")

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not _is_own(code.co_filename):
            return None
        self.inner.update(each for each in code.co_consts if isinstance(each, CodeType))
        path, ways = self.path(), _ways(code)
        if path is None or not ways.forks:
            return None
        function = self.functions.setdefault((path, code), _Function(ways, not path, code not in self.inner))
        function.given.update(_given(frame, ways, path))
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return _Run(self, function, path).step


class _Function:
    """What was seen of one function, run by one module."""

    def __init__(self, ways: Ways, is_root: bool, fixed_closure: bool) -> None:
        self.ways, self.is_root, self.fixed_closure = ways, is_root, fixed_closure
        self.given: set[str] = set()
        self.modules: set[str] = set()  # variables that hold a module where a condition asks for them
        self.others: set[str] = set()  # variables that hold something else there
        self.taken: dict[Fork, set[bool]] = {}
        self.held: dict[tuple[int, str], Tags] = {}  # by offset and variable
        self.values: dict[Fork, Tags] = {}
        self.returned: Tags = {}

    def not_taken(self) -> Iterator[tuple[Fork, Tags]]:
        """List the forks with a way that was not taken, and the tags that it could meet."""
        constants = self.ways.constants(self.given, fixed_closure=self.fixed_closure) | (self.modules - self.others)
        for fork, taken in self.taken.items():
            if fork.asks <= constants or (len(taken) > 1 and not fork.ends_rounds):
                continue
            own, other = fork.sides if False in taken else fork.sides[::-1]
            tags: Tags = {}
            if len(taken) == 1:
                if other.meets is None and not other.returns:
                    continue  # it raises
                tags |= self._held(fork.at, other.reads)
                if own.is_value:
                    tags |= self.values.get(fork, {}) | self._held(fork.at, own.reads)
                if own.meets is None and not self.is_root:
                    tags |= self.returned
            changed = (own.writes | other.writes) & fork.later
            if len(taken) == 1:
                tags |= self._held(fork.at, changed - other.writes)
            else:
                changed |= fork.rounds & (own.reads | other.reads | fork.later)
                tags |= self._held(fork.at, changed)
            for at in fork.behind:
                tags |= self._held(at, changed)
            if tags:
                yield fork, tags

    def _held(self, at: int, names: Iterable[str]) -> Tags:
        tags: Tags = {}
        for name in names:
            tags |= self.held.get((at, name), {})
        return tags


class _Run:
    """One run of a function."""

    def __init__(self, branches: Branches, function: _Function, path: str) -> None:
        self.branches, self.function, self.path = branches, function, path
        self.fork: Fork | None = None  # at which the run was a step ago
        self.waiting: dict[int, list[tuple[Fork, int]]] = {}  # by where they meet, and what had arrived before

    def step(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Look at the run before a step of it, or as it returns."""
        function, ways = self.function, self.function.ways
        if event == "return":
            _note(function.returned, self.branches.tags_of(arg))
        if event != "opcode":
            return self.step
        at = ways.offset(frame.f_lasti)
        if self.fork is not None and at != self.fork.at:
            function.taken.setdefault(self.fork, set()).add(ways.is_jump(self.fork, at))
        arrived = self.branches.arrived.get(self.path, ())
        for fork, count in self.waiting.pop(at, ()):
            _note(function.values.setdefault(fork, {}), arrived[count:])
        names = ways.watched.get(at)
        if names:
            values = frame.f_locals
            for name in names:
                if name in values:
                    _note(function.held.setdefault((at, name), {}), self.branches.tags_of(values[name]))
        self.fork = ways.fork_at.get(at)
        if self.fork is not None:
            for name in self.fork.asks:
                (function.modules if isinstance(frame.f_locals.get(name), nn.Module) else function.others).add(name)
            for side in self.fork.sides:
                if side.is_value and side.meets is not None:
                    self.waiting.setdefault(side.meets, []).append((self.fork, len(arrived)))
        return self.step


def _note(into: Tags, tags: Iterable[Tensor]) -> None:
    into |= {each.numpy().tobytes(): each for each in tags if len(each)}


def _given(frame: FrameType, ways: Ways, path: str) -> Iterable[str]:
    """Name the arguments that the caller of a function hands over; those of the model itself may all be handed over."""
    caller = frame.f_back
    arguments = ways.arguments
    if caller is None:
        return arguments
    if caller.f_code.co_filename == _CALLS:  # between a module and its forward
        args, kwargs = caller.f_locals.get("args", ()), caller.f_locals.get("kwargs", {})
        return (*arguments[: len(args) + 1], *kwargs) if path else arguments
    return given_arguments(ways, _ways(caller.f_code), caller.f_lasti)


@cache
def _is_own(file: str) -> bool:
    """Whether a file holds the user's own code."""
    return not file.startswith(("<frozen", *_FOREIGN))
