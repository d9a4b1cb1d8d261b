"""Traces the ops on fake CUDA tensors and compiles the kernels for a GPU that is not there; a script of its own.

Not under the interpreter, so not in the process of the tests: `tests/ops/test_triton_builds.py` runs it. Prints a line
for each kernel, and whether it needs local memory. An argument is the compute capability, 90 unless given.
"""

import functools
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from stabnorm.functional import RawMoments, empty_moments
from stabnorm.ops.triton import accumulators as _triton_accounts
from stabnorm.ops.triton import blended as _triton_blended
from stabnorm.ops.triton import groups as _triton_groups
from stabnorm.ops.triton import moments as _triton_moments
from stabnorm.ops.triton import observed as _triton_observed
from stabnorm.ops.triton import one_pass as _triton_one_pass
from stabnorm.ops.triton import rows as _triton_rows
from stabnorm.ops.triton import running as _triton_running
from stabnorm.ops.triton import shared as _triton_shared


class Driver:
    """Names a target, and is never asked to run anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The GPU compiled for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None in particular."""
        return device


def compile_only(kernel: Any) -> Any:
    """What stands for a kernel: a launch compiles."""

    class Launch:
        def __getitem__(self, grid: object) -> Any:
            return functools.partial(self.run, grid)

        def run(self, grid: object, *args: Any, **options: Any) -> None:
            built = kernel.warmup(*args, grid=grid, **options)
            local = sum(line.count("__local_depot") for line in built.asm["ptx"].splitlines())
            assert "cubin" in built.asm
            print(f"{kernel.__module__.rpartition('.')[2]}.{kernel.fn.__name__} local {local}", flush=True)

    return Launch()


def passes(x: Tensor, w: Tensor, valid: Tensor, token: Tensor, lam: Tensor) -> list[Tensor]:
    """Every op with kernels in it once."""
    y, r = _triton_groups.scaled(x, 7, 1e-5)
    mean = _triton_rows.moments(x, valid, True).mean
    assert mean is not None
    out, _ = _triton_one_pass.affine_with_square(x, valid, w, w)
    dx, _ = _triton_one_pass.gradient_with_sums(x, x, valid, w, w)
    right = lam == 0.5
    _triton_one_pass.redo_affine_(out, right, x, w, w)
    _triton_one_pass.redo_gradient_(dx, right, x, x, valid, w, w)
    return [
        out,
        dx,
        mean,
        _triton_rows.sums(x, x, w, valid)[0],
        _triton_rows.affine(x, w, w),
        _triton_rows.gradient(x, x, w, valid, w, w, w),
        _triton_blended.norm(lam, x, w, w, 1e-5, w, w)[0],
        _triton_blended.sums(x, x, w, valid, token, token)[0],
        _triton_blended.gradient(lam, x, x, w, w, w, valid, w, w, token, token, w, w)[0],
        _triton_blended.blend(lam, x, x),
        _triton_groups.gradient(x, y, r, True),
        _triton_observed.gradient(x, x, w, token, token, False)[0],
    ]


def main(capability: int) -> None:
    """Trace, then compile."""
    setattr(_triton_shared, "_programs", lambda device, index: 528)  # noqa: B010
    setattr(_triton_observed, "splits_of", lambda device, index: 132)  # noqa: B010
    with FakeTensorMode():
        shapes = ((64, 70), (70,), (64,), (64,), ())
        x, w, valid, token, lam = (torch.empty(shape, device="cuda") for shape in shapes)
        arguments = (x.bfloat16(), w, valid.bool(), token, lam)
        assert next(tuple(t.shape) for t in passes(*arguments)) == (64, 70)
        traced = [str(node.target) for node in make_fx(passes)(*arguments).graph.nodes]
    print(f"traced {sum('triton_' in target for target in traced)} ops")

    triton.runtime.driver.set_active(Driver(capability))
    for module in (_triton_blended, _triton_groups, _triton_observed, _triton_one_pass, _triton_rows):
        setattr(module, "wrap_triton", compile_only)  # noqa: B010
        for name in [name for name, value in vars(module).items() if isinstance(value, CustomOpDef)]:
            setattr(module, name, getattr(module, name)._init_fn)
    for name in ("_tokens", "_add"):
        setattr(_triton_moments, name, compile_only(getattr(_triton_moments, name)))
    for module, name in ((_triton_accounts, "_merge"), (_triton_observed, "_observed")):
        setattr(module, name, compile_only(getattr(module, name)))
    setattr(_triton_running, "_track", compile_only(_triton_running._track))  # noqa: B010
    for length, channels in ((64, 770), (1, 7)):  # a size of 1 is a constant to the compiler
        rows, vector = torch.randn(length, channels).bfloat16(), torch.randn(channels)
        valid = torch.ones(length, dtype=torch.bool)
        passes(rows, vector, valid, torch.randn(length), torch.tensor(0.5))
        account = empty_moments(_triton_moments.splits_of(channels, rows.device), channels)
        _triton_moments.add_moments_of_rows_(account, rows, "layer", 1e-5, None, None, valid, True, True)
        step, skips, progress = torch.zeros(3, 3, dtype=torch.int64).unbind()
        _triton_running.track_batch_(vector, vector, vector[0], vector, vector, step, skips, progress, 0.1, True)
        for rms in (False, True):
            _triton_observed.norm(rows, vector, vector, 1e-5, rms, rows, account, valid, True, True, True)
        _triton_accounts.merge_splits(RawMoments(*(part[None] for part in account)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
