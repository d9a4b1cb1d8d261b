"""Traces the ops on fake CUDA tensors and compiles the kernels for a GPU that is not there; a script of its own.

Not under the interpreter, so not in the process of the tests: `tests/ops/testbuilds.py` runs it. Prints a line
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

from stabnorm.functional import empty_moments
from stabnorm.ops.blended import BlendedSums, LayerNormArgs, TokenMoments
from stabnorm.ops.moments import Request
from stabnorm.ops.observed import Spec
from stabnorm.ops.rows import BatchMap
from stabnorm.ops.selftest.observed import KINDS
from stabnorm.ops.standard import Layers
from stabnorm.ops.triton import (
    accumulators,
    blend,
    blended,
    groups,
    moments,
    observed,
    one_pass,
    rows,
    running,
    shared,
    standard,
)


class Driver:
    """Names a target; it cannot run anything."""

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
    """Return a replacement for a kernel whose launch only compiles."""

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
    y, r = groups.scaled(x, 7, 1e-5)
    mean = rows.moments(x, valid, center=True).mean
    assert mean is not None
    out, _ = one_pass.affine(x, valid, w, w)
    dx, _ = one_pass.gradient(x, x, valid, w, w)
    own, of, tokens = LayerNormArgs(w, w, 1e-5), BatchMap(w, w, w, w), TokenMoments(token, token)
    right, sums = lam == 0.5, BlendedSums(w, w, w, w, w)
    one_pass.redo_map_(out, right, x, w, w)
    one_pass.redo_input_gradient_(dx, right, x, x, valid, w, w)
    return [
        out,
        dx,
        mean,
        rows.sums(x, x, w, valid)[0],
        rows.affine(x, w, w),
        rows.gradient(x, x, valid, of),
        blended.norm(lam, x, own, w, w)[0],
        blended.sums(lam, x, x, w, valid, tokens)[0],
        blended.gradient(lam, x, x, valid, own, of, tokens, sums)[0],
        blend.blend_elements(lam, x, x),
        groups.gradient(x, y, r, True),
        observed.gradient(x, x, w, token, token, "layer")[0],
    ]


def track_all(vector: Tensor) -> None:
    """The running statistics, with and without a filter."""
    step, skips, progress = torch.zeros(3, 3, dtype=torch.int64).unbind()
    window, recent = vector.repeat(4, 1), torch.zeros(16, 2 * len(vector) + 1)
    for filter_ in (None, window):
        running.track(vector, vector, vector[0], vector, vector, filter_, step, skips, progress, 8, 0.1, 1e-5, True)
    _, gate = running.smooth(
        vector, vector[0], window, vector, recent, step, skips, progress, 5, 8, 0.1, 1e-5, True, True
    )
    running.smooth_gradient(vector, gate, window, vector, step[0], 0.1)
    running.track_mean_square(vector, vector[0], vector, recent, step, skips, progress, 5, 0.9, True)
    running.quadratic_gradient(vector, vector, gate, vector, 0.9)


def step_of(layers: int, channels: int) -> None:
    """The statistics of a step, once with all that there can be and once with the least."""
    moments_of = empty_moments(layers, channels)
    wide = torch.zeros(layers, 10, channels, dtype=torch.float64)
    number, flag = torch.ones(layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.bool)
    of_layers, gradient = Layers(number, number, flag, flag), torch.zeros(layers, 2, channels)
    for between, own in ((None, None), (wide[:, 0], wide[:, :2].contiguous())):
        standard.standard(
            moments_of.seen, moments_of.channel, moments_of.token, gradient, between, of_layers, own, wide,
            torch.zeros(layers, 2, dtype=torch.float64), torch.zeros(layers, 32),
        )  # fmt: skip


def main(capability: int) -> None:
    """Trace, then compile."""
    setattr(shared, "_programs", lambda device, index: 528)  # noqa: B010
    setattr(observed, "splits_of_rows", lambda device, index: 132)  # noqa: B010
    with FakeTensorMode():
        shapes = ((64, 70), (70,), (64,), (64,), ())
        x, w, valid, token, lam = (torch.empty(shape, device="cuda") for shape in shapes)
        arguments = (x.bfloat16(), w, valid.bool(), token, lam)
        assert next(tuple(t.shape) for t in passes(*arguments)) == (64, 70)
        traced = [str(node.target) for node in make_fx(passes)(*arguments).graph.nodes]
    print(f"traced {sum('triton_' in target for target in traced)} ops")

    triton.runtime.driver.set_active(Driver(capability))
    for module in (blend, blended, groups, observed, one_pass, rows):
        setattr(module, "traceable", compile_only)  # noqa: B010
        for name in [name for name, value in vars(module).items() if isinstance(value, CustomOpDef)]:
            setattr(module, name, getattr(module, name)._init_fn)
    launched = [(moments, "_tokens"), (moments, "add_rows"), (accumulators, "merge_layers"), (observed, "norm_rows")]
    launched.append((standard, "standard_of_layers"))
    kernels_of_running = ("_track", "_smooth_square", "_smooth_gradient", "_track_quadratic", "_quadratic_gradient")
    launched += [(running, name) for name in kernels_of_running]
    for module, name in launched:
        setattr(module, name, compile_only(getattr(module, name)))
    for length, channels in ((64, 770), (1, 7)):  # a size of 1 is a constant to the compiler
        x, vector = torch.randn(length, channels).bfloat16(), torch.randn(channels)
        valid = torch.ones(length, dtype=torch.bool)
        passes(x, vector, valid, torch.randn(length), torch.tensor(0.5))
        into = empty_moments(shared.columns(channels, x.device).splits, channels)
        moments.add_moments_of_rows_(x, valid, into, Request("layer", 1e-5))
        track_all(vector)
        for kind in KINDS:
            spec = Spec(kind, (channels,), 1e-5, True, True)
            observed.norm(x, vector, vector, spec, x, into, valid, True)
        accumulators.merge(*(part[None] for part in into))
        for layers in (1, 2):
            step_of(layers, channels)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
