"""Compare every backend of every op with its formula in float64: `python -m stabnorm.ops.selftest`.

All backends that can run on this machine are tested, in the dtypes and at the sizes of `cases`. Each one runs twice,
and must give the same bits. Kernels that pass on a GPU are recorded (`stabnorm.ops.tested`), and from then on `auto`
uses them there. An error is compared with the natural size of the result, for example that of a sum with the root of
its sum of squares, and must stay below `TOLERANCES`. `tests/ops` runs the same comparisons.

The comparisons of an op, for example of those in `stabnorm/ops/rows.py`, are the functions under
``@moments_of_rows.check`` in `stabnorm/ops/selftest/rows.py`. An op that has a backend but no comparison fails.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabnorm.ops import dispatch
from stabnorm.ops.dispatch import REFERENCE, Op, all_ops, use_kernels

# The largest errors allowed: of a statistic, which is always float32, and of rows, which have their own dtype.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (3e-6, 3e-6),
    torch.bfloat16: (3e-6, 8e-3),
    torch.float16: (3e-6, 1e-3),
}


@dataclass(frozen=True)
class Case:
    """The input of one comparison."""

    name: str
    x: Tensor  # [R, C]
    dy: Tensor
    valid: Tensor | None
    vectors: Tensor  # [6, C], float32: gains, means and the like

    def double(self) -> "Case":
        """Return the same case in float64."""
        return replace(self, x=self.x.double(), dy=self.dy.double(), vectors=self.vectors.double())


# The results of an op by name: value, natural size, and whether it consists of rows in the input's dtype.
Results = dict[str, tuple[Tensor, Tensor | float, bool]]
Check = Callable[[Case], Results]


def cases(device: torch.device | str, *, small: bool = False) -> Iterator[Case]:
    """Yield cases with sizes around every block, one row, one channel, means far from 0, and NaN in the padding."""
    shapes = [(1, 1), (1, 7), (3, 1), (129, 33), (65, 192)]
    shapes += [] if small else [(1366, 384), (20001, 3), (5, 4096), (5, 4100)]
    kinds = [(torch.float32, 0.0, False), (torch.float32, 0.0, True), (torch.float32, 1e4, False)]
    kinds += [(torch.bfloat16, 0.0, False), (torch.bfloat16, 0.0, True), (torch.float16, 0.0, True)]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    for rows, channels in shapes:
        for dtype, offset, masked in kinds:
            x = (normal(rows, channels) * (normal(channels).abs() + 0.5) + normal(channels) + offset).to(dtype)
            dy, valid = normal(rows, channels).to(dtype), None
            if masked:
                valid = torch.rand(rows, generator=generator) < 0.7
                x[~valid], dy[~valid] = torch.nan, 0
            vectors = normal(6, channels)
            vectors[0] += offset  # the mean
            name = f"{rows} x {channels}, {str(dtype)[6:]}, mean {offset:g}{', masked' if masked else ''}"
            mask = None if valid is None else valid.to(device)
            yield Case(name, x.to(device), dy.to(device), mask, vectors.to(device))


def halves(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the two halves of the rows with their positions, so that a test can merge two forwards."""
    at = len(x) // 2
    for part in (slice(0, at), slice(at, None)):
        yield part, x[part]


def kept(case: Case, t: Tensor) -> Tensor:
    """Return ``t [R, C]`` with 0 in the padding."""
    return t if case.valid is None else torch.where(case.valid[:, None], t, 0)


def checks_of(op: Op[..., Any]) -> list[Check]:
    """Return the comparisons of an op."""
    if not op.checks:  # an op of a room above this one has them beside it
        importlib.import_module(f"stabnorm.ops.selftest.{op.file}")
    if not op.checks:
        raise NotImplementedError(f"stabnorm/ops/selftest/{op.file}.py has no comparison under @{op.name}.check")
    return op.checks


def backends_of(op: Op[..., Any], device: torch.device) -> list[str]:
    """Return the backends of an op that can run on a device. Each is also a setting of `use_kernels`."""
    return [REFERENCE] + [
        name
        for name in dispatch.BACKENDS
        if dispatch.why_not(name, name, op.name, device.type, device.index) is None and op.find(name) is not None
    ]


def truth(check: Check, case: Case) -> Results:
    """Return the results of the formulas in float64."""
    with use_kernels(REFERENCE):
        return check(case.double())


def failures(check: Check, backend: str, case: Case, right: Results) -> list[str]:
    """Return what is wrong in this case with this backend; empty if nothing is wrong."""
    statistic, rows = TOLERANCES[case.x.dtype]
    wrong = []
    with use_kernels(backend):
        once, again = check(case), check(case)
    for name, (got, _, in_rows) in once.items():
        want, natural, _ = right[name]
        want, got, repeated = want.double(), got.double(), again[name][0].double()
        if not torch.equal(got.nan_to_num(0.5), repeated.nan_to_num(0.5)):
            wrong.append(f"{case.name}, {name}: not the same bits twice")
        allowed = (rows if in_rows else statistic) * (want.abs() + natural)
        error = torch.where(got == want, 0, (got - want).abs())  # min over zero rows is inf
        if not bool((error <= allowed).all()):
            worst = float((error / allowed.clamp(min=1e-30)).max())
            wrong.append(f"{case.name}, {name}: {worst:.3g} times the error allowed")
    return wrong


def compare(
    device: torch.device, *, small: bool = False, only: str | None = None
) -> Iterator[tuple[Op[..., Any], str, list[str]]]:
    """Yield every op, each of its backends that can run on a device, and the list of its faults.

    Args:
        device: the device to test.
        small: leave out the large inputs.
        only: one backend. Default: all.
    """
    verdicts: dict[tuple[Check, str], list[str]] = {}  # a comparison that several ops share runs once
    for op in all_ops():
        backends = [name for name in backends_of(op, device) if only in (None, name)]
        for check in checks_of(op):
            new = [name for name in backends if (check, name) not in verdicts]
            verdicts |= {(check, name): [] for name in new}
            for case in cases(device, small=small) if new else ():
                right = truth(check, case)
                for name in new:
                    verdicts[check, name] += failures(check, name, case, right)
        for name in backends:
            yield op, name, [line for check in op.checks for line in verdicts[check, name]]
