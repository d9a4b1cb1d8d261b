"""What the tests of the norm modules share."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from stabnorm.nn import PowerNorm, PRepBN, RepBN, TaperNorm, UnifiedNorm

HOLDS_A_NORM = ("prep", "taper", "taper, calibrating")  # lam is above 0
COUNTERS = ("step", "skips", "rep.step", "rep.skips")


def half_way(channels: int, **options: bool) -> PRepBN:
    norm = PRepBN(channels, **options)  # type: ignore[arg-type]
    norm.lam.fill_(0.4)
    return norm


def tapered(channels: int, lam: float, **options: bool) -> TaperNorm:
    norm = TaperNorm(channels, **options)  # type: ignore[arg-type]
    norm.lam.fill_(lam)
    return norm


MODULES: dict[str, Callable[..., nn.Module]] = {
    "unified, warming up": lambda c, **o: UnifiedNorm(c, **o),
    "unified": lambda c, **o: UnifiedNorm(c, warmup_steps=0, **o),
    "rep": lambda c, **o: RepBN(c, **o),
    "rep, scale only": lambda c, **o: RepBN(c, center=False, **o),
    "rep, filtered": lambda c, **o: RepBN(c, filtration="calibrated", **o),
    "rep, l1": lambda c, **o: RepBN(c, statistic="l1", **o),
    "prep": half_way,
    "taper, calibrating": lambda c, **o: tapered(c, 1.0, **o),
    "taper": lambda c, **o: tapered(c, 0.4, **o),
    "power, warming up": lambda c, **o: PowerNorm(c, **o),
    "power": lambda c, **o: PowerNorm(c, warmup_steps=3, **o),
    "power, groups": lambda c, **o: PowerNorm(c, groups=2, warmup_steps=3, **o),
}


def built(name: str, channels: int = 8, **options: object) -> nn.Module:
    """A module with parameters that are not all one."""
    norm = MODULES[name](channels, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return norm


def compile_one_graph(norm: nn.Module, backend: Any = "inductor") -> nn.Module:
    return cast(nn.Module, torch.compile(norm, backend=backend, fullgraph=True))


def state(norm: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}


def run(norm: nn.Module, x: Tensor, upstream: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and input gradient; parameters' gradients add up."""
    x = x.detach().requires_grad_()
    y = norm(x) if mask is None else norm(x, mask)
    parameters = [p for p in norm.parameters() if p.requires_grad]
    dx, *gradients = torch.autograd.grad(y, [x, *parameters], upstream)  # once: a backward is an event
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return y.detach(), dx


def batches(count: int, *shape: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs and upstream gradients of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(count)]


def close_states(first: nn.Module, second: nn.Module, tolerance: float = 1e-6) -> None:
    theirs = state(second)
    for name, value in state(first).items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)
