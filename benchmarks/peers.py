"""Other tools that watch a training, at equal frequency, for `benchmarks.monitor_overhead`.

Except for tensor-tracker, which is used if it is installed, none of them runs outside its own trainer or service. So
their operations are written here from their documentation and source, hook by hook. They watch the same norm layers as
stabnorm, at every step; by default they watch every 25 to 1000 steps. What they do with the numbers afterwards is left
out, except for the histogram that the bolts callback passes to TensorBoard.
"""

import importlib
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard.writer import SummaryWriter

Norms = list[tuple[str, nn.Module]]


class Peer:
    """Hooks on a model's norms, and the time in them. A subclass says which and what they do."""

    name = ""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.norms: Norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
        self.seconds = 0.0
        self.results: list[Any] = []  # of the current step
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on."""
        self._handles = [handle for handle in self.hooks() if handle is not None]

    def detach(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()

    def step(self, *, loss: Tensor | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """End the step."""
        self.results.clear()

    def close(self) -> None:
        """Leave nothing behind."""

    def hooks(self) -> list[RemovableHandle]:
        """The hooks of this tool."""
        raise NotImplementedError

    def timed(self, look: Callable[..., object]) -> Callable[..., None]:
        """A hook that looks and counts its time."""

        @torch.no_grad()
        def hook(*arguments: Any) -> None:
            start = time.perf_counter()
            self.results.append(look(*arguments))
            self.seconds += time.perf_counter() - start

        return hook


class WandbWatch(Peer):
    """Weights & Biases, `wandb.watch(log="gradients", log_freq=1)`: a histogram of each parameter's gradient."""

    name = "wandb.watch, gradients (its operations)"

    def hooks(self) -> list[RemovableHandle]:
        """On every parameter."""
        look = self.timed(self.histogram)
        return [p.register_hook(look) for p in self.model.parameters() if p.requires_grad]

    @staticmethod
    def histogram(tensor: Tensor) -> object:
        """`log_tensor_stats`."""
        flat = tensor.detach().clone().reshape(-1)
        if not torch.isfinite(flat).any():
            return None
        if not torch.isfinite(flat).all():
            flat = flat[torch.isfinite(flat)]
        least, most = flat.min().item(), flat.max().item()
        return flat.float().histc(bins=64, min=least, max=most).cpu().tolist(), least, most


class ComposerActivationMonitor(Peer):
    """MosaicML Composer's `ActivationMonitor`: four scalars of each input and output, read back at once."""

    name = "Composer ActivationMonitor (its operations)"

    def hooks(self) -> list[RemovableHandle]:
        """On every norm."""
        look = self.timed(lambda module, args, output: [self.scalars(t) for t in (args[0], output)])
        return [module.register_forward_hook(look) for _, module in self.norms]

    @staticmethod
    def scalars(x: Tensor) -> list[float]:
        """L2 norm, mean, kurtosis and largest value of tokens, averaged; of the whole batch, which it takes apart."""
        deviation = x - x.mean(-1, keepdim=True)
        kurtosis = deviation.pow(4).mean(-1) / deviation.square().mean(-1).square()
        values = (torch.linalg.vector_norm(x, ord=2, dim=-1).mean(), x.mean(), kurtosis.mean(), x.amax(-1).mean())
        return [value.item() for value in values]


class OlmoGapMonitor(Peer):
    """OLMo-core's `GAPMonitor`: largest magnitude, mean and variance of activations and their gradients; no reading."""

    name = "OLMo-core GAPMonitor (its operations)"

    def hooks(self) -> list[RemovableHandle]:
        """On every norm, forward and backward."""
        forward = self.timed(lambda module, args, output: self.moments(output))
        backward = self.timed(lambda module, inputs, outputs: self.moments(outputs[0]))
        return [
            *(module.register_forward_hook(forward) for _, module in self.norms),
            *(module.register_full_backward_hook(backward) for _, module in self.norms),
        ]

    @staticmethod
    def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of every instance, averaged."""
        var, mean = torch.var_mean(x.flatten(1), dim=1)
        return x.abs().max(), mean.mean(), var.mean()


class BoltsModuleDataMonitor(Peer):
    """Lightning-bolts' `ModuleDataMonitor` on the norms: a TensorBoard histogram of each input and output."""

    name = "Lightning-bolts ModuleDataMonitor (its operations)"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.folder = tempfile.mkdtemp()
        self.writer = SummaryWriter(self.folder)

    def close(self) -> None:
        """Remove what was written."""
        self.writer.close()
        shutil.rmtree(self.folder)

    def hooks(self) -> list[RemovableHandle]:
        """On every norm."""
        return [module.register_forward_hook(self.timed(self.of(name))) for name, module in self.norms]

    def of(self, name: str) -> Callable[..., None]:
        """The hook of one module."""

        def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            for part, tensor in (("in", args[0]), ("out", output)):
                self.writer.add_histogram(f"{part}/{name}", tensor.detach().cpu().float())

        return look


class TensorTracker(Peer):
    """pytorch-tensor-tracker with its defaults, on the norms: copies of each output and its gradient."""

    name = "tensor-tracker (its operations)"

    def hooks(self) -> list[RemovableHandle]:
        """On every norm."""
        forward = self.timed(lambda module, args, output: output.detach().cpu().clone())
        backward = self.timed(lambda module, inputs, outputs: outputs[0].detach().cpu().clone())
        return [
            *(module.register_forward_hook(forward) for _, module in self.norms),
            *(module.register_full_backward_hook(backward) for _, module in self.norms),
        ]


class InstalledTensorTracker(Peer):
    """The package itself; its own time is not separated, so that only the A/B difference counts."""

    name = "tensor-tracker (installed)"

    def attach(self) -> None:
        """Track every norm."""
        self.tracker = importlib.import_module("tensor_tracker").track(self.model, include=".*norm.*")
        self.tracker.__enter__()

    def detach(self) -> None:
        """Stop."""
        self.tracker.__exit__(None, None, None)
        self.seconds = float("nan")


def peers(model: nn.Module) -> list[Peer]:
    """All of them."""
    tracker = InstalledTensorTracker if importlib.util.find_spec("tensor_tracker") else TensorTracker
    kinds = (WandbWatch, ComposerActivationMonitor, OlmoGapMonitor, BoltsModuleDataMonitor, tracker)
    return [kind(model) for kind in kinds]
