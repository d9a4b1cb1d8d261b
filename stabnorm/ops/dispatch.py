"""Ops, and which backend of an op runs where: the one place that decides.

`op` makes an op of a formula, which runs anywhere: the backend "reference". There may also be

* "aten": a backend for CPUs of ATen's fast primitives; a compiled graph holds the formula, which its compiler fuses;
* "cpp": one for CPUs in C++, which a compiler must be there to build (`stabnorm.ops.cpp.library`);
* "triton": a kernel for GPUs, which is trusted on devices where its own tests have passed (`stabnorm.ops.tested`).

The environment variable STABNORM_KERNELS, or `use_kernels`, says which of them may run:

* auto: what is always there and does not change from machine to machine: ATen on CPUs, tested kernels on GPUs. Default.
* cpp: as auto, and on CPUs the C++ backend. It is built when it is first needed, which takes seconds, and kept.
* triton: as auto, and Triton kernels that are untested or round LayerNorm otherwise than torch; on a CPU under Triton's
  interpreter, for their tests.
* reference: the formulas, everywhere.

`backends` lists the outcome. To add a backend of the ops in `stabnorm/ops/rows.py`, say, write the file
`stabnorm/ops/<backend>/rows.py` with functions under ``@moments_of_rows.backend("<backend>")``. It is found by its name
and imported when the backend is first considered; `stabnorm.ops.selftest` then compares it with the formula.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from stabnorm.ops import tested
from stabnorm.ops.registration import define

KERNELS = ("auto", "cpp", "triton", "reference")
VARIABLE = "STABNORM_KERNELS"
REFERENCE = "reference"
BACKENDS = ("triton", "cpp", "aten")  # in order of preference

_P = ParamSpec("_P")
_T = TypeVar("_T")


# --- the setting ---


def _checked(kernels: str, where: str) -> str:
    if kernels not in KERNELS:
        raise ValueError(f"{where}={kernels!r} is unknown. Choose one of {', '.join(map(repr, KERNELS))}")
    return kernels


_kernels = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)
_choices: dict[tuple[object, ...], str] = {}  # the backend that runs, by all that decides about it


def forget_choices() -> None:
    """Choose every backend anew: what may run on this machine has changed."""
    _choices.clear()


tested.on_change.append(forget_choices)


def kernels() -> str:
    """The setting that holds now.

    >>> kernels() in KERNELS
    True
    """
    return _kernels


class use_kernels:
    """Set which backends may run, from now on, or as a context manager for the block.

    Args:
        kernels: see the module.

    Raises:
        ValueError: an unknown setting.

    >>> with use_kernels("reference"):
    ...     kernels()
    'reference'
    """

    def __init__(self, kernels: str) -> None:
        self._before = _kernels
        self._set(_checked(kernels, "kernels"))

    @staticmethod
    def _set(kernels: str) -> None:
        global _kernels
        _kernels = kernels
        forget_choices()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(self._before)


# --- ops ---


@dataclass(frozen=True)
class Backend:
    """What a backend of an op can take; float64 and empty input are left to the formula."""

    masks: bool = True
    in_graphs: bool = False  # is an op of the dispatcher, so that a compiled graph calls it too
    same_bits: bool = True  # False: rounds a user's LayerNorm otherwise than torch does, so that it is opt-in


class Op(Generic[_P, _T]):
    """A formula and its faster backends; calling it runs the fastest that may run. `op` makes it.

    Args:
        formula: what every backend must equal.
        by: the name of the tensor whose device and dtype decide; None: there is the formula only.
        unless: says of a call's arguments that only the formula can take them.
        mutates, fake: see `op`.
    """

    def __init__(
        self,
        formula: Callable[_P, _T],
        by: str | None,
        unless: Callable[..., bool] | None,
        mutates: Sequence[str],
        fake: Callable[..., Any] | None,
    ) -> None:
        functools.update_wrapper(self, formula)
        self.name = formula.__name__
        self.formula = formula
        self.checks: list[Callable[..., Any]] = []  # comparisons of the self-test
        self.backends: dict[str, Backend] = {}
        self._runs: dict[str, Callable[_P, _T]] = {REFERENCE: formula}
        self.file = formula.__module__.rpartition(".")[2]
        self._searched: set[str] = set()
        names = list(inspect.signature(formula).parameters)
        self._by = None if by is None else names.index(by)
        self._mask = names.index("valid") if "valid" in names else None
        self._unless = unless
        self._node = None if fake is None else define(self.name, formula, self._dispatch, mutates, fake)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run the fastest backend that may run."""
        if self._node is not None and torch.compiler.is_compiling():
            return self._node(*args, **kwargs)  # type: ignore[no-any-return]
        return self._dispatch(*args, **kwargs)

    def _dispatch(self, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if self._by is None or (self._unless is not None and self._unless(*args)):
            return self.formula(*args, **kwargs)
        x: Any = args[self._by]
        valid = None if self._mask is None else args[self._mask]
        return self._runs[self.chosen(x, valid)](*args, **kwargs)

    def backend(
        self, name: str, *, masks: bool = True, in_graphs: bool = False, same_bits: bool = True
    ) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
        """Make a function a backend of this op; see `Backend` for what it can take."""

        def add(run: Callable[_P, _T]) -> Callable[_P, _T]:
            self._runs[name], self.backends[name] = run, Backend(masks, in_graphs, same_bits)
            return run

        return add

    def check(self, compare: Callable[..., Any]) -> Callable[..., Any]:
        """Add a comparison to the self-test, see `stabnorm.ops.selftest`."""
        self.checks.append(compare)
        return compare

    def on(self, backend: str) -> Callable[_P, _T]:
        """What runs on a backend that was `chosen`, for a backward that takes its forward's."""
        return self._runs[backend]

    def chosen(self, x: Tensor, valid: object = None) -> str:
        """The backend that runs for these rows: "reference", "aten", "cpp" or "triton"."""
        if x.dtype == torch.float64 or x.numel() == 0:
            return REFERENCE
        device, masked, plain = x.device, valid is not None, type(x) is Tensor
        if torch.compiler.is_compiling():
            return _chosen_in_graph(self.name, _kernels, device.type, device.index, masked, plain)
        key = (self.name, _kernels, device, masked, plain)
        name = _choices.get(key)
        if name is None:
            name = _choices[key] = _choose(self, _kernels, device.type, device.index, masked, plain, False)
        return name

    def find(self, name: str) -> Backend | None:
        """The backend of this name; imports its file the first time."""
        if name not in self._searched:
            module = f"stabnorm.ops.{name}.{self.file}"
            if importlib.util.find_spec(module) is not None:
                try:
                    importlib.import_module(module)
                except ModuleNotFoundError as error:
                    if error.name != "triton":
                        raise
            self._searched.add(name)
        return self.backends.get(name)


OPS: dict[str, Op[..., Any]] = {}  # those whose files were imported


def op(
    by: str | None = None,
    *,
    unless: Callable[..., bool] | None = None,
    mutates: Sequence[str] = (),
    fake: Callable[..., Any] | None = None,
) -> Callable[[Callable[_P, _T]], Op[_P, _T]]:
    """Make an op of a formula.

    Args:
        by: the name of the tensor whose device and dtype decide which backend runs. It, and a mask called `valid`, must
            be handed over by position. Default: the op has no backends.
        unless: says of a call's arguments that only the formula can take them.
        mutates: the names of the arguments that it changes in place; only with `fake`.
        fake: gives empty tensors of the results' shapes. With it the op is registered with PyTorch's dispatcher: in a
            compiled graph it is one opaque node, and the backend is chosen at run time.
    """

    def make(formula: Callable[_P, _T]) -> Op[_P, _T]:
        made = Op(formula, by, unless, mutates, fake)
        OPS[made.name] = made
        return made

    return make


def all_ops() -> list[Op[..., Any]]:
    """Every op that a backend has been written for, in the order of their files."""
    package = importlib.import_module("stabnorm.ops")
    for module in pkgutil.iter_modules(package.__path__, "stabnorm.ops."):
        if not module.ispkg:
            importlib.import_module(module.name)
    usable = [name for name in BACKENDS if name != "triton" or tested.has_triton()]
    return [one for one in OPS.values() if any([one.find(name) for name in usable])]


# --- the choice ---


def _choose(
    op: Op[..., Any], kernels: str, device: str, index: int | None, masked: bool, plain: bool, in_graph: bool
) -> str:
    for name in BACKENDS:
        if name == "cpp" and not plain:
            continue  # a fake or distributed tensor has no address
        if why_not(kernels, name, op.name, device, index) is None:
            backend = op.find(name)
            if backend is not None and (backend.masks or not masked) and (backend.in_graphs or not in_graph):
                return name
    return REFERENCE


def _chosen_in_graph(name: str, kernels: str, device: str, index: int | None, masked: bool, plain: bool) -> str:
    return _choose(OPS[name], kernels, device, index, masked, plain, True)


# What torch.compiler.assume_constant_result does; that one loads the whole compiler, which takes seconds.
_chosen_in_graph.__dict__["_dynamo_marked_constant"] = True


def why_not(kernels: str, backend: str, op: str, device: str, index: int | None) -> str | None:
    """Why a backend that an op has does not run on a device with this setting; None: it does."""
    if kernels == REFERENCE:
        return f"{VARIABLE} is {REFERENCE}"
    if backend == "triton":
        return _why_no_triton(kernels, op, device, index)
    if device != "cpu":
        return "is for CPUs"
    if backend == "cpp":
        from stabnorm.ops.cpp import library

        return library.why_not() if kernels == "cpp" else f"is opt-in: set {VARIABLE}=cpp"
    return None


def _why_no_triton(kernels: str, op: str, device: str, index: int | None) -> str | None:
    if device == "cpu" and not (kernels == "triton" and tested.interpreted()):
        return "is for GPUs"
    if device not in ("cpu", "cuda"):
        return "is for CUDA devices"
    if not tested.has_triton():
        return "Triton is not installed"
    if kernels == "triton":
        return None
    backend = OPS[op].find("triton")
    if backend is not None and not backend.same_bits:
        return f"changes bits of LayerNorm, so that it is opt-in: set {VARIABLE}=triton"
    return tested.why_untested(op, index)


# --- what runs, for people ---


@dataclass(frozen=True)
class Choice:
    """What runs for one op on one device."""

    op: str
    device: str
    runs: str
    why: str


class Choices(tuple[Choice, ...]):
    """A line for every op and device; prints as a table."""

    def __str__(self) -> str:
        widths = [max(len(getattr(line, field)) for line in self) for field in ("op", "device", "runs")]
        return "\n".join(
            f"{line.op:{widths[0]}}  {line.device:{widths[1]}}  {line.runs:{widths[2]}}  {line.why}" for line in self
        )


def backends(devices: Sequence[str | torch.device] | None = None) -> Choices:
    """What would run for each op in eager mode, and why.

    Args:
        devices: those to ask for. Default: the CPU and every CUDA device there is.

    >>> [line.runs for line in backends(["cpu"]) if line.op == "affine_of_rows"]
    ['aten']
    """
    if devices is None:
        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return Choices(_choice(op, torch.device(device)) for op in all_ops() for device in devices)


def _choice(op: Op[..., Any], device: torch.device) -> Choice:
    refused: list[str] = []
    for name in BACKENDS:
        if (name != "triton" or tested.has_triton()) and op.find(name) is None:
            continue
        reason = why_not(_kernels, name, op.name, device.type, device.index)
        backend = op.backends.get(name)
        if reason is None and backend is not None:
            limits = [] if backend.masks else ["with a mask: reference"]
            limits += [] if backend.in_graphs else ["in a compiled graph: the formula, fused by its compiler"]
            return Choice(op.name, str(device), name, "; ".join([*refused, *limits]))
        if reason is not None and (device.type != "cpu" or name != "triton"):
            refused.append(f"{name} {reason}" if reason.startswith("is ") else f"{name}: {reason}")
    return Choice(op.name, str(device), REFERENCE, "; ".join(refused) or "there is no other")
