"""Measure a forward with LayerNorm, switched, folded, and without norms: `python -m benchmarks.inference`.

There are four variants of one network, with the shapes of ViT-Tiny and GPT-2 small and random weights: `layer norm`;
`switched`, where every norm is a RepBN in eval mode; `folded` by `fold_norms`; and `floor`, without norms. In each
round every variant runs once, in a random order, so that other load on the machine affects all alike. The figures are
ratios to `layer norm` within a round: the median, and the interquartile range of the rounds.

The first table counts operations of the exported graphs: the folded network has the operations of the floor.

Args: --models, --batch N ..., --dtype, --modes eager compiled, --rounds N, --threads N, --device cpu|cuda.
"""

import argparse
import copy
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.monitor_overhead import WIDTHS, Block, ViT
from benchmarks.rounds import in_turn
from stabnorm import fold_norms
from stabnorm.nn import RepBN

WARM_UP = 3
Example: TypeAlias = Callable[[int, torch.device, torch.dtype], Tensor]


class GPT(nn.Module):
    """GPT-2 small: 12 layers of width 768, 25 norms, and a head that is not tied."""

    def __init__(self, vocabulary: int = 50257, dim: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(1024, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, -1])
        return logits


def _images(batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)


def _tokens(batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randint(50257, (batch, 128), device=device)


MODELS: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "vit-tiny": (lambda: ViT(*WIDTHS["vit-tiny"]), _images),
    "gpt2-small": (GPT, _tokens),
}


def replace_norms(model: nn.Module, new: Callable[[int], nn.Module]) -> nn.Module:
    """Return a copy of the model with other modules in place of its LayerNorms."""
    model = copy.deepcopy(model)
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.LayerNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new(norm.normalized_shape[0]))
    return model.eval()


def used_norm(channels: int) -> nn.Module:
    """Return a RepBN with parameters and statistics as after a training."""
    norm = RepBN(channels)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(0.8, 0.2)
        assert norm.running_mean is not None
        norm.running_mean.normal_(0, 0.5)
        norm.running_var.uniform_(0.5, 2)
    return norm


def variants(model: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """Return the four variants, LayerNorm first."""
    switched = replace_norms(model, used_norm)
    folded = fold_norms(switched, example)
    left = [site.name for site in folded.norms if site.status not in ("forward", "backward")]
    assert not left, f"not folded: {left}"
    return {
        "layer norm": model.eval(),
        "switched": switched,
        "folded": folded.model,
        "floor": replace_norms(model, lambda channels: nn.Identity()),
    }


def operations(model: nn.Module, example: Tensor) -> Counter[str]:
    """Count each operation in the exported graph, except assertions."""
    graph = torch.export.export(model, (example,)).run_decompositions({}).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    names = [target.overloadpacket.__name__ for target in targets if isinstance(target, torch._ops.OpOverload)]
    return Counter(name for name in names if not name.startswith("_assert"))


def count_table(four: dict[str, nn.Module], example: Tensor) -> str:
    """Return the operations of each variant's exported graph as Markdown."""
    counts = {name: operations(model, example) for name, model in four.items()}
    lines = ["| | operations | more than the floor |", "|---|---:|---|"]
    for name, count in counts.items():
        more = count - counts["floor"]
        extra = ", ".join(f"{number} {op}" for op, number in more.most_common()) or "none"
        lines.append(f"| {name} | {sum(count.values())} | {extra} |")
    return "\n".join(lines)


@torch.no_grad()
def time_table(variants: Mapping[str, Callable[[Tensor], object]], inputs: Sequence[Tensor], rounds: int) -> str:
    """Return latencies as Markdown, in units of the first variant; each runs once in a round."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    device = inputs[0].device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for number in range(WARM_UP + rounds):
        for name in in_turn(names, number):
            start = now()
            variants[name](inputs[number % len(inputs)])
            took = now() - start
            if number >= WARM_UP:
                seconds[name].append(took)
    base = seconds[names[0]]
    lines = ["| | ms | x layer norm (interquartile range) |", "|---|---:|---:|"]
    for name, these in seconds.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(these, base, strict=True)], n=4)
        ratio = "1" if name == names[0] else f"{middle:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {name} | {1e3 * statistics.median(these):.2f} | {ratio} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    allocation = "keeps freed memory" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "glibc's default"
    print(
        f"{options.rounds} rounds on {options.device} ({options.threads} threads, {platform.machine()}, "
        f"allocation: {allocation}), torch {torch.__version__}"
    )
    for name in options.models:
        build, example = MODELS[name]
        torch.manual_seed(0)
        four = variants(build(), example(2, torch.device("cpu"), torch.float32))
        print(f"\n**{name}**, exported\n\n{count_table(four, example(2, torch.device('cpu'), torch.float32))}")
        for kind in options.dtype:
            dtype = getattr(torch, kind)
            cast = {label: copy.deepcopy(model).to(device, dtype) for label, model in four.items()}
            for mode in options.modes:
                for batch in options.batch:
                    torch.compiler.reset()
                    ready = {
                        label: torch.compile(model, fullgraph=True, dynamic=False) if mode == "compiled" else model
                        for label, model in cast.items()
                    }
                    inputs = [example(batch, device, dtype) for _ in range(3)]
                    print(f"\n**{name}**, {kind}, {mode}, batch {batch}\n", flush=True)
                    print(time_table(ready, inputs, options.rounds), flush=True)


if __name__ == "__main__":
    main()
