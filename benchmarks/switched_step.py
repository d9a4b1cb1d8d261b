"""Measure a whole training step with LayerNorm, while it is switched, and after: `python -m benchmarks.switched_step`.

There are three variants of one network with random weights: `layer norm`; `switching`, where every norm is a PRepBN
with lam = 0.5, which computes both norms; and `switched`, where every norm is a RepBN. A step is forward, backward and
AdamW. In each round every variant takes one step, in a random order, so that other load on the machine affects all
alike. The figures are ratios to `layer norm` within a round: the median, and the interquartile range of the rounds.

Args: --models, --modes eager compiled, --rounds N, --threads N, --device cpu|cuda.
"""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.inference import time_table
from benchmarks.monitor_overhead import WIDTHS, Block, ViT
from stabnorm import convert_norms
from stabnorm.nn import PRepBN

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the shape of a batch
    "vit-tiny": (lambda: ViT(*WIDTHS["vit-tiny"]), (16, 3, 224, 224)),
    "gpt2-blocks": (lambda: nn.Sequential(*(Block(768, 12, causal=True) for _ in range(4))), (4, 256, 768)),
    "tiny": (lambda: Block(16, 2), (2, 8, 16)),  # shows that the benchmark runs
}


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """Return the three variants, LayerNorm first."""
    switching, switched = copy.deepcopy(model), copy.deepcopy(model)
    convert_norms(switching)
    convert_norms(switched, to="repbn")
    for norm in switching.modules():
        if isinstance(norm, PRepBN):
            norm.lam.fill_(0.5)
    return {"layer norm": model, "switching": switching, "switched": switched}


def training(model: nn.Module, mode: str) -> Callable[[Tensor], None]:
    """Return a function that takes one training step on a batch."""
    run = torch.compile(model, fullgraph=True, dynamic=False) if mode == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    @torch.enable_grad()
    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        run(batch).square().mean().backward()
        optimizer.step()

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vit-tiny", "gpt2-blocks"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.models:
        build, shape = MODELS[name]
        for mode in options.modes:
            torch.manual_seed(0)
            torch.compiler.reset()
            three = {label: model.to(options.device) for label, model in variants(build()).items()}
            steps = {label: training(model, mode) for label, model in three.items()}
            inputs = [torch.randn(shape, device=options.device) for _ in range(3)]
            print(f"\n**{name}**, training step, {mode}, {options.rounds} rounds\n", flush=True)
            print(time_table(steps, inputs, options.rounds), flush=True)


if __name__ == "__main__":
    main()
