"""Measure the memory of norm modules and of the monitor: `python -m benchmarks.memory`.

For a module, it counts the bytes that a forward keeps for the backward, without input and parameters, as a share of the
input. They are counted where autograd saves them, so the count is exact and the same on every device. For the monitor,
it measures the bytes that it holds, and on CUDA how much the peak of a training step rises.

Args: --shape ROWSxCHANNELS, --dtype float32|bfloat16, --batch N, --device cpu|cuda.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from benchmarks.monitor_overhead import WIDTHS, ViT
from benchmarks.norm_modules import BATCH, _shape, variants
from stabnorm import StabilityMonitor


def kept_for_backward(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> int:
    """Return the bytes that autograd keeps of a forward, without the input and tensors that exist anyway."""
    known = {t.untyped_storage().data_ptr() for t in (x, *parameters)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(x.requires_grad_())
    del y
    return sum(kept.values())


def module_table(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> str:
    """Markdown."""
    lines = ["| module, in training | kept for the backward beside the input, share of the input |", "|---|---:|"]
    for variant in variants(channels, dtype, device, False):
        module = variant.module
        assert isinstance(module, nn.Module)
        shape = (BATCH, rows // BATCH, channels) if variant.batched else (rows, channels)
        x = torch.randn(shape).to(device, dtype)
        for _ in range(8):  # past the warm-up
            module(x)
        lives = [*module.parameters(), *module.buffers()]
        kept = kept_for_backward(module, x.clone(), lives)
        lines.append(f"| {variant.name} | {kept / x.nbytes:.2f} |")
    return "\n".join(lines)


def live_bytes() -> int:
    """Return the bytes of every tensor that Python holds."""
    gc.collect()
    held = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta]
    tensors = [t for t in held if t.layout == torch.strided]  # others have no storage of their own
    storages = {}
    for tensor in tensors:
        # Torch 2.6 keeps tensors in Python that are not defined, and an export leaves some whose storage is gone.
        with suppress(NotImplementedError, RuntimeError):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def monitor_table(batch: int, device: torch.device) -> str:
    """Markdown."""
    model = ViT(*WIDTHS["vit-tiny"]).to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)

    def step() -> float:
        """Take a step, and return the peak bytes on a GPU."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model(images).square().mean().backward()
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else float("nan")

    step()
    peak = step()
    lines = ["| monitor of ViT-Tiny | holds, MiB | peak of a step, + MiB |", "|---|---:|---:|"]
    for preset in ("economy", "standard"):
        before = live_bytes()
        with StabilityMonitor(model, preset) as monitor:
            rises = []
            for _ in range(3):
                rises.append(step() - peak)
                monitor.step()
            held = live_bytes() - before
        rise = f"{rises[-1] / 2**20:.1f}" if device.type == "cuda" else "not measured on a CPU"
        lines.append(f"| {preset} | {held / 2**20:.1f} | {rise} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=_shape, default=(8192, 384))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    print(f"\n{options.shape[0]} x {options.shape[1]}, {options.dtype}\n")
    rows, channels = options.shape
    print(module_table(rows, channels, getattr(torch, options.dtype), device))
    print(f"\n{monitor_table(options.batch, device)}", flush=True)


if __name__ == "__main__":
    main()
