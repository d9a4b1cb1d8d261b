"""Which execution of an op runs where, and why: the one place that decides.

Every op means a formula of `stabnorm.functional`, which runs anywhere: the execution "reference". There may also be

* "aten": a body for CPUs of ATen's fast primitives; a compiled graph holds the formula, which its compiler fuses;
* "cpp": one for CPUs in C++, which a compiler must be there to build (`stabnorm.ops.cpp.library`);
* "triton": a kernel for GPUs, which is trusted on devices where its own tests have passed (`stabnorm.ops.tested`).

The environment variable STABNORM_KERNELS, or `use_kernels`, says which of them may run:

* auto: what is always there and does not change from machine to machine: ATen on CPUs, tested kernels on GPUs. Default.
* cpp: as auto, and on CPUs the C++ body. It is built when first needed, which takes seconds, and kept.
* triton: as auto, and Triton kernels that round LayerNorm otherwise than torch, or are untested; on a CPU under
  Triton's interpreter, for their tests.
* reference: the formulas, everywhere.

`backends` lists the outcome. To add a body: a function in its own module, an entry in `BODIES`, a branch in the op's
file; `stabnorm.ops.selftest` then compares it with the formula.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from stabnorm.ops import tested
from stabnorm.ops.cpp import library as _cpp

KERNELS = ("auto", "cpp", "triton", "reference")
VARIABLE = "STABNORM_KERNELS"
REFERENCE = "reference"


@dataclass(frozen=True)
class Body:
    """A faster execution of an op, and what it can take; float64 and empty input are left to the formula."""

    execution: str
    masks: bool = True
    in_graphs: bool = False  # is an op of the dispatcher, so that a compiled graph calls it too
    same_bits: bool = True  # False: rounds a user's LayerNorm otherwise than torch does, so that it is opt-in


# In order of preference.
BODIES: dict[str, tuple[Body, ...]] = {
    # The whole op is opaque to a compiled graph.
    "accumulate_moments_": (Body("triton", in_graphs=True), Body("cpp", in_graphs=True), Body("aten", in_graphs=True)),
    "merge_accounts": (Body("triton"),),
    "observed_norm": (Body("triton"), Body("cpp")),  # changes bits of LayerNorm, and runs only where that was asked for
    "moments_of_rows": (Body("triton", in_graphs=True), Body("cpp", in_graphs=True), Body("aten", masks=False)),
    "affine_of_rows": (Body("triton", in_graphs=True), Body("cpp", in_graphs=True), Body("aten")),
    "sums_of_rows": (Body("triton", in_graphs=True), Body("cpp", in_graphs=True), Body("aten", masks=False)),
    "gradient_of_rows": (Body("triton", in_graphs=True), Body("cpp", in_graphs=True), Body("aten", masks=False)),
    "one_pass": (Body("triton", in_graphs=True), Body("cpp")),
    "track_batch_": (Body("triton", in_graphs=True),),  # the whole op is opaque to a compiled graph
    "blend": (Body("triton", in_graphs=True), Body("aten")),
    "join_gradients": (Body("triton", in_graphs=True), Body("aten")),
    # A kernel's lam stays on the device, so that it cannot leave the norm to the norm where lam is 1.
    "blended_norm": (
        Body("triton", in_graphs=True, same_bits=False),
        Body("cpp", in_graphs=True),
        Body("aten", masks=False),
    ),
    "scale_groups": (Body("triton", in_graphs=True), Body("cpp", in_graphs=True)),
}


def _checked(kernels: str, where: str) -> str:
    if kernels not in KERNELS:
        raise ValueError(f"{where}={kernels!r} is unknown. Choose one of {', '.join(map(repr, KERNELS))}")
    return kernels


_kernels = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def kernels() -> str:
    """The setting that holds now.

    >>> kernels() in KERNELS
    True
    """
    return _kernels


class use_kernels:
    """Set which executions may run, from now on, or as a context manager for the block.

    Args:
        kernels: see the module.

    Raises:
        ValueError: an unknown setting.

    >>> with use_kernels("reference"):
    ...     kernels()
    'reference'
    """

    def __init__(self, kernels: str) -> None:
        global _kernels
        self._before, _kernels = _kernels, _checked(kernels, "kernels")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _kernels
        _kernels = self._before


def execution(op: str, rows: Tensor, valid: Tensor | None = None) -> str:
    """The execution of `op` for these rows: "reference", "aten", "cpp" or "triton"."""
    if _kernels == REFERENCE or rows.dtype == torch.float64 or rows.numel() == 0:
        return REFERENCE
    compiling = torch.compiler.is_compiling()
    for body in BODIES[op]:
        if body.execution == "cpp" and type(rows) is not Tensor:
            continue  # a fake or distributed one has no address
        if (valid is None or body.masks) and (body.in_graphs or not compiling):
            device = rows.device
            if _may_run(_kernels, body.execution, op, device.type, device.index):
                return body.execution
    return REFERENCE


def _may_run(kernels: str, execution: str, op: str, device: str, index: int | None) -> bool:
    return why_not(kernels, execution, op, device, index) is None


# What torch.compiler.assume_constant_result does; that one loads the whole compiler, which takes seconds.
_may_run.__dict__["_dynamo_marked_constant"] = True


def why_not(kernels: str, execution: str, op: str, device: str, index: int | None) -> str | None:
    """Why `execution` does not run on a device with this setting; None: it does."""
    if kernels == REFERENCE:
        return f"{VARIABLE} is {REFERENCE}"
    if execution == "triton":
        return _why_no_triton(kernels, op, device, index)
    if device != "cpu":
        return "is for CPUs"
    if execution == "cpp":
        return _cpp.why_not() if kernels == "cpp" else f"is opt-in: set {VARIABLE}=cpp"
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
    if not all(body.same_bits for body in BODIES[op] if body.execution == "triton"):
        return f"changes bits of LayerNorm, so that it is opt-in: set {VARIABLE}=triton"
    return tested.why_untested(op, index)


# --- what runs, for people ---


@dataclass(frozen=True)
class Backend:
    """What runs for one op on one device."""

    op: str
    device: str
    runs: str
    why: str


class Backends(tuple[Backend, ...]):
    """A line for every op and device; prints as a table."""

    def __str__(self) -> str:
        widths = [max(len(getattr(line, field)) for line in self) for field in ("op", "device", "runs")]
        return "\n".join(
            f"{line.op:{widths[0]}}  {line.device:{widths[1]}}  {line.runs:{widths[2]}}  {line.why}" for line in self
        )


def backends(devices: Sequence[str | torch.device] | None = None) -> Backends:
    """What would run for each op in eager mode, and why.

    Args:
        devices: those to ask for. Default: the CPU and every CUDA device there is.

    >>> backends()[0].op
    'accumulate_moments_'
    """
    if devices is None:
        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return Backends(_backend(op, torch.device(device)) for op in BODIES for device in devices)


def _backend(op: str, device: torch.device) -> Backend:
    refused: list[str] = []
    for body in BODIES[op]:
        reason = why_not(_kernels, body.execution, op, device.type, device.index)
        if reason is None:
            limits = [] if body.masks else ["with a mask: reference"]
            limits += [] if body.in_graphs else ["in a compiled graph: the formula, fused by its compiler"]
            return Backend(op, str(device), body.execution, "; ".join([*refused, *limits]))
        if device.type != "cpu" or body.execution != "triton":
            refused.append(f"{body.execution} {reason}" if reason.startswith("is ") else f"{body.execution}: {reason}")
    return Backend(op, str(device), REFERENCE, "; ".join(refused) or "there is no other")
