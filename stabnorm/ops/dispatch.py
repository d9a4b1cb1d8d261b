"""Ops, and the one place that decides which backend of an op runs.

`op` makes an op from a formula, which runs anywhere and is the backend "reference". An op may have faster backends:

* "aten" for CPUs uses ATen's fast primitives. A compiled graph gets the formula instead, which its compiler fuses.
* "cpp" for CPUs is C++, which comes with a wheel or is built where there is a compiler (`stabnorm.ops.cpp.library`).
* "triton" for GPUs is a kernel. It runs on devices where its own tests have passed (`stabnorm.ops.tested`).

The environment variable STABNORM_KERNELS, or `use_kernels`, sets which of them may run:

* auto, the default, uses the fastest backend that has passed its own self-test on this device: Triton on GPUs, C++ on
  CPUs. The self-test runs by itself, once (`stabnorm.ops.admission`). Where neither is there, ATen runs on CPUs.
* aten uses ATen on CPUs, as `auto` does where there is no compiler, and tested kernels on GPUs.
* cpp uses C++ on CPUs without a self-test. It is built at first use, which takes some seconds, and then kept.
* triton also uses kernels that are untested, or that round LayerNorm differently from torch. On a CPU it uses Triton's
  interpreter, for tests.
* reference uses the formulas everywhere.

`backends` lists which backend runs. To add a backend, for example of the ops in `stabnorm/ops/rows.py`, write the file
`stabnorm/ops/<backend>/rows.py` with functions under ``@moments_of_rows.backend("<backend>")``. The dispatcher finds it
by its name and imports it when the backend is first considered. `stabnorm.ops.selftest` compares it with the formula.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from stabnorm._checks import check_choice
from stabnorm._registration import define
from stabnorm.ops import admission, tested

KERNELS = ("auto", "aten", "cpp", "triton", "reference")
VARIABLE = "STABNORM_KERNELS"
REFERENCE = "reference"
ABOVE = ("stabnorm.monitor.standard",)  # files of rooms above this one that have ops: this is all that is known of them
BACKENDS = ("triton", "cpp", "aten")  # in order of preference

_P = ParamSpec("_P")
_T = TypeVar("_T")


# --- the setting ---


def _checked(kernels: str, where: str) -> str:
    check_choice(where, kernels, KERNELS)
    return kernels


_kernels = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)
_choices: dict[tuple[object, ...], str] = {}  # the backend that runs, by all that decides about it
_forgotten = 0


def forget_choices() -> None:
    """Forget which backends were chosen, because other ones may run now."""
    global _forgotten
    _choices.clear()
    _forgotten += 1


def times_forgotten() -> int:
    """Return how often choices were forgotten: while it stays the same, the backend that was chosen runs."""
    return _forgotten


tested.on_change.append(forget_choices)


def kernels() -> str:
    """Return the current setting.

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

one_at_a_time = threading.RLock()  # held while state is changed, because several threads may run one model


@dataclass(frozen=True)
class Backend:
    """What a backend of an op supports; the formula handles float64 and empty input."""

    masks: bool = True
    in_graphs: bool = False  # whether a compiled graph can call it, because it is an op of PyTorch's dispatcher
    same_bits: bool = True  # False if it rounds a user's LayerNorm differently from torch; then it is opt-in


class Op(Generic[_P, _T]):
    """A formula and its faster backends; a call runs the fastest one that may run. `op` creates it.

    Args:
        formula: the function that every backend must equal.
        by: name of the tensor whose device and dtype decide which backend runs; None if there is only the formula.
        unless: returns True for arguments that only the formula supports.
        mutates, fake, observes: see `op`.
    """

    def __init__(
        self,
        formula: Callable[_P, _T],
        by: str | None,
        unless: Callable[..., bool] | None,
        mutates: Sequence[str],
        fake: Callable[..., Any] | None,
        observes: bool = False,
    ) -> None:
        functools.update_wrapper(self, formula)
        self.name = formula.__name__
        self.observes = observes
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
        self._changes = bool(mutates)
        self._node = None if fake is None else define(self.name, formula, self._dispatch, mutates, fake)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run the fastest backend that may run."""
        if self._node is not None and torch.compiler.is_compiling():
            return self._node(*args, **kwargs)  # type: ignore[no-any-return]
        return self._dispatch(*args, **kwargs)

    def _dispatch(self, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not self._changes:
            return self._run(*args, **kwargs)
        with one_at_a_time:
            return self._run(*args, **kwargs)

    def _run(self, *args: _P.args, **kwargs: _P.kwargs) -> _T:
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
        """Return the function of a backend that was `chosen`, for a backward that needs the backend of its forward."""
        return self._runs[backend]

    def chosen(self, x: Tensor, valid: object = None) -> str:
        """Return the backend that runs for these rows: "reference", "aten", "cpp" or "triton"."""
        if x.dtype == torch.float64 or x.numel() == 0:
            return REFERENCE
        device, masked, plain = x.device, valid is not None, type(x) is Tensor
        if torch.compiler.is_compiling():
            return _chosen_in_graph(self.name, _kernels, device.type, device.index, masked, plain)
        key = (self.name, _kernels, device, masked, plain)
        name = _choices.get(key)
        if name is None:
            if _kernels == "auto" and device.type == "cpu":
                admission.start(device)
            name = _choices[key] = _choose(self, _kernels, device.type, device.index, masked, plain, False)
        return name

    def find(self, name: str) -> Backend | None:
        """Return the backend of this name; import its file at first use."""
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
    observes: bool = False,
) -> Callable[[Callable[_P, _T]], Op[_P, _T]]:
    """Make an op from a formula.

    Args:
        by: name of the tensor whose device and dtype decide which backend runs. Pass this tensor, and a mask called
            `valid`, by position. Default: the op has no backends.
        unless: returns True for arguments that only the formula supports. Default: never.
        mutates: names of the arguments that it changes in place; only with `fake`.
        fake: returns empty tensors of the results' shapes. With it the op is registered with PyTorch's dispatcher: in a
            compiled graph it is one opaque node, and the backend is chosen at run time.
        observes: no result of it enters the training, so another backend may take over while a model trains. All others
            keep their backend as long as the process lives, so that a run has the same bits from its first step to its
            last. Default: False.
    """

    def make(formula: Callable[_P, _T]) -> Op[_P, _T]:
        made = Op(formula, by, unless, mutates, fake, observes)
        OPS[made.name] = made
        return made

    return make


def all_ops() -> list[Op[..., Any]]:
    """Return all ops that have a backend, in the order of their files."""
    package = importlib.import_module("stabnorm.ops")
    inside = [module.name for module in pkgutil.iter_modules(package.__path__, "stabnorm.ops.") if not module.ispkg]
    for name in (*inside, *ABOVE):
        importlib.import_module(name)
    usable = [name for name in BACKENDS if name != "triton" or tested.has_triton()]
    return [one for one in OPS.values() if any([one.find(name) for name in usable])]


# --- the choice ---


def admit(device: torch.device) -> None:
    """Test the kernels of a device unless they were tested: a CPU's in the background, a GPU's before this returns."""
    if _kernels != "auto" or device.type not in ("cpu", "cuda") or (device.type == "cuda" and not tested.has_triton()):
        return
    admission.start(device)
    if device.type == "cuda":
        admission.wait(device)


def look_again() -> None:
    """Let the ops that only observe use what a self-test in the background has admitted since the last call."""
    global _forgotten
    if admission.ended():
        _forgotten += 1
        for key in [key for key in _choices if OPS[str(key[0])].observes]:
            del _choices[key]


def _choose(
    op: Op[..., Any], kernels: str, device: str, index: int | None, masked: bool, plain: bool, in_graph: bool
) -> str:
    for name in BACKENDS:
        if name == "cpp" and not plain:
            continue  # a fake or distributed tensor has no memory address
        if why_not(kernels, name, op.name, device, index) is None:
            backend = op.find(name)
            # A graph's own compiler rounds a LayerNorm otherwise than C++, which is as torch is without a compiler.
            takes_graphs = backend is not None and backend.in_graphs and not (name == "cpp" and kernels == "auto")
            if backend is not None and (backend.masks or not masked) and (takes_graphs or not in_graph):
                return name
    return REFERENCE


def _chosen_in_graph(name: str, kernels: str, device: str, index: int | None, masked: bool, plain: bool) -> str:
    return _choose(OPS[name], kernels, device, index, masked, plain, True)


# This is what torch.compiler.assume_constant_result does, but that function imports the whole compiler, for seconds.
_chosen_in_graph.__dict__["_dynamo_marked_constant"] = True


def why_not(kernels: str, backend: str, op: str, device: str, index: int | None) -> str | None:
    """Return why a backend of an op does not run on a device with this setting; None if it does."""
    if kernels == REFERENCE:
        return f"{VARIABLE} is {REFERENCE}"
    if backend == "triton":
        return _why_no_triton(kernels, op, device, index)
    if device != "cpu":
        return "is for CPUs"
    if backend == "cpp":
        return _why_no_cpp(kernels, op)
    return None


def _why_no_cpp(kernels: str, op: str) -> str | None:
    if kernels not in ("auto", "cpp"):
        return f"{VARIABLE} is {kernels}"
    reason = tested.why_untested(op, torch.device("cpu")) if kernels == "auto" else None
    if reason is not None:
        return reason
    from stabnorm.ops.cpp import library

    return library.why_not()


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
    return tested.why_untested(op, torch.device(device, index or 0))


# --- the table of what runs ---


@dataclass(frozen=True)
class Choice:
    """The backend that runs for one op on one device."""

    op: str
    device: str
    runs: str
    why: str


class Choices(tuple[Choice, ...]):
    """The choice for every op and device; `str` gives a table."""

    def __str__(self) -> str:
        widths = [max(len(getattr(line, field)) for line in self) for field in ("op", "device", "runs")]
        return "\n".join(
            f"{line.op:{widths[0]}}  {line.device:{widths[1]}}  {line.runs:{widths[2]}}  {line.why}" for line in self
        )


def backends(devices: Sequence[str | torch.device] | None = None) -> Choices:
    """What would run for each op in eager mode, and why.

    Args:
        devices: those to ask for. Default: the CPU and every CUDA device there is.

    >>> with use_kernels("reference"):
    ...     {line.runs for line in backends(["cpu"])}
    {'reference'}
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
