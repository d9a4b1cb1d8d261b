"""A post-norm graph transformer with batch norm, on padded graphs, that folds: `python -m stabnorm.examples.graphs`.

The graphs are scikit-learn's digits: a node for each pixel with ink, and an edge between neighbours. So each graph has
another number of nodes. Such models use a BatchNorm over all nodes of a batch, which stand one after the other without
padding (arXiv 2012.09699). Here the graphs are padded to one length, and a mask says which nodes there are: the norms
then compute the same as over the packed nodes. At the end no norm is left: each folds into the layers that read it, its
scale along the residual stream.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from stabnorm import fold_norms, valid_tokens
from stabnorm.fold import FoldResult
from stabnorm.nn import RepBN

INK = 4  # of 16; a pixel with less is no node
TRAIN_GRAPHS = 1000


class Graphs(NamedTuple):
    """Padded graphs.

    Attributes:
        nodes: ink of each node, and row and column as one-hot vectors, ``[B, N, 17]``; 0 in padding.
        edges: which nodes see which, ``[B, N, N]`` bool; each sees itself.
        mask: which nodes there are, ``[B, N]`` bool.
        digits: what the graphs show, ``[B]``.
    """

    nodes: Tensor
    edges: Tensor
    mask: Tensor
    digits: Tensor

    def rows(self, rows: Tensor) -> "Graphs":
        """Return some of the graphs."""
        return Graphs(*(part[rows] for part in self))


def digit_graphs() -> Graphs:
    """Make a graph of each of the 1797 images; the pixels without ink are the padding."""
    digits = load_digits()
    ink = torch.from_numpy(digits.images).float()
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    mask = (ink >= INK).flatten(1)
    place = torch.stack([row, column], -1).flatten(0, 1)
    near = (place[:, None] - place).abs().amax(-1) <= 1
    where = F.one_hot(place, 8).flatten(1).float()
    nodes = torch.cat([ink.flatten(1)[..., None] / 16, where.expand(len(ink), -1, -1)], -1)
    edges = near & mask[:, None] & mask[:, :, None] | torch.eye(64, dtype=torch.bool)
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    graph = torch.arange(len(ink))[:, None]
    mask = mask[graph, order]
    nodes = torch.where(mask[..., None], nodes[graph, order], 0)
    edges = edges[graph[..., None], order[:, :, None], order[:, None]]
    return Graphs(nodes, edges, mask, torch.from_numpy(digits.target))


class GraphLayer(nn.Module):
    """Attention along the edges, and an MLP; a norm behind each sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = RepBN(width, init="norm"), RepBN(width, init="norm")

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, edges[:, None]).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(attended))
        y: Tensor = self.norm2(x + self.down(F.relu(self.up(x))))
        return y


class GraphTransformer(nn.Module):
    """Classify graphs by the mean of what their nodes say."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(17, width)
        self.layers = nn.ModuleList(GraphLayer(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        """Return logits ``[B, 10]``."""
        x = self.embed(nodes)
        for layer in self.layers:
            x = layer(x, edges)
        votes = torch.where(mask[..., None], self.head(x), 0)
        return votes.sum(1) / mask.sum(1, keepdim=True)


def train(graphs: Graphs, steps: int, batch_size: int = 64) -> GraphTransformer:
    """Train from seed 0; padding enters no statistic."""
    torch.manual_seed(0)
    model = GraphTransformer()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = graphs.rows(torch.randint(len(graphs.digits), (batch_size,)))
        with valid_tokens(batch.mask):
            logits = model(batch.nodes, batch.edges, batch.mask)
        loss = F.cross_entropy(logits, batch.digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, graphs: Graphs) -> float:
    """Return the share of graphs that are recognised."""
    right: Tensor = model(*graphs[:3]).argmax(1) == graphs.digits
    return right.float().mean().item()


def main(arguments: Sequence[str] | None = None) -> tuple[GraphTransformer, FoldResult]:
    """Train, fold, and print what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    graphs = digit_graphs()
    order = torch.randperm(len(graphs.digits), generator=torch.Generator().manual_seed(0))
    train_set, test_set = graphs.rows(order[:TRAIN_GRAPHS]), graphs.rows(order[TRAIN_GRAPHS:])
    sizes = graphs.mask.sum(1)
    print(f"{len(sizes)} graphs of {int(sizes.min())} to {int(sizes.max())} nodes")
    model = train(train_set, options.steps)
    print(f"trained for {options.steps} steps: accuracy {100 * accuracy(model, test_set):.1f} %")
    result = fold_norms(model, tuple(test_set.rows(torch.arange(8))[:3]))
    print(result)
    print(f"folded: accuracy {100 * accuracy(result.model, test_set):.1f} %")
    return model, result


if __name__ == "__main__":
    main()
