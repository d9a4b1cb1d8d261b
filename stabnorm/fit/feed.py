r"""The layer that feeds a norm takes part in the fit: what no affine map can do, its weights often can.

**A linear layer**, of which the norm alone reads what it adds to: x = W u + rest, as in every post-norm block. The
affine map and a change V of the layer are fitted together, a ridge regression with one Gram matrix for all channels:

.. math:: \min_{a, b, V} \sum_t \|a \odot x_t + V u_t + b - \hat y_t\|^2 + \rho \|V\|^2,\qquad
          W' = W + \mathrm{diag}(a)^{-1} V

u_t are the layer's inputs, mostly a nonlinear function of the tokens, and so can undo what differs from token to token.

**Embedding tables**, of which the norm reads the sum: each row becomes what the norm would make of it, in the mean over
what is added to it elsewhere. That holds for words that the batches do not have, too.

.. math:: E'_i = \mathrm{mean}_m \big[ (\mathrm{norm}(E_i + r_m) - b) / a - r'_m \big]
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.calls import tensor_input_of
from stabnorm._models.hooks import hooked
from stabnorm._models.ranks import gather_over_ranks
from stabnorm.fit.sums import Affine, Seen
from stabnorm.functional import explained_share
from stabnorm.norms.rows import as_rows

# Rho, as a share of the mean variance of the layer's inputs; less ended further from the original on other text.
RIDGE = 0.1
TOKENS = 4  # for each input of the layer, or it is left as it is: fewer would fit by chance
WIDEST = 8192  # inputs of a layer whose Gram matrix is made
STEEP = 0.1  # a scale may become so much smaller than without the layer
RESTS = 32  # draws of what is added to an embedding


@dataclass(frozen=True)
class Feeder:
    """What feeds a norm, by the names of the modules: one linear layer, or embedding tables.

    Args:
        kind: "linear" or "embedding".
        names: of the modules.
    """

    kind: str
    names: tuple[str, ...]


@contextmanager
def passing(modules: Sequence[nn.Module]) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """While it is open, what each of these modules is given and gives back, call by call."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in modules]

    def hook_of(calls: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = tensor_input_of(args, kwargs, "input")  # what torch's Linear and Embedding call it
            calls.append((x.clone(), output.clone()))  # copies: the model may change both in place

        return hook

    pairs = zip(modules, seen, strict=True)
    with hooked(module.register_forward_hook(hook_of(calls), with_kwargs=True) for module, calls in pairs):
        yield seen


# --- a linear layer ---


class JointSums:
    """Streaming sums for a norm and the linear layer before it: inputs u, the norm's input x and what it should write.

    Products of a batch are taken in the inputs' precision around the batch's means, and merged in float64 by Chan's
    rule.

    Args:
        inputs: K, the layer's.
        channels: C.
    """

    def __init__(self, inputs: int, channels: int, device: torch.device | None = None) -> None:
        self.inputs, self.channels = inputs, channels
        size = inputs + 2 * channels
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._gram = torch.zeros(inputs, size, dtype=torch.float64, device=device)  # u with u, x, y
        self._pairs = torch.zeros(3, channels, dtype=torch.float64, device=device)  # xx, xy, yy per channel

    def add(self, u: Tensor, seen: Seen, wanted: Tensor) -> None:
        """One call: ``u [R, K]``, what the norm read ``[R, C]``, what it should write ``[R, C]``."""
        rows = torch.cat([u, seen.read, wanted.to(seen.read)], 1).detach()
        rows = rows if seen.valid is None else rows[seen.valid]
        if not len(rows):
            return
        rows = rows.double() if rows.dtype == torch.float64 else rows.float()
        mean = rows.double().mean(0)
        rows = rows - mean.to(rows)
        _, x, y = rows.split([self.inputs, self.channels, self.channels], 1)
        pairs = torch.stack([(p * q).sum(0) for p, q in ((x, x), (x, y), (y, y))]).double()
        self._merge(len(rows), mean, (rows[:, : self.inputs].T @ rows).double(), pairs)

    def _merge(self, count: Tensor | int, mean: Tensor, gram: Tensor, pairs: Tensor) -> None:
        total = self._count + count
        delta = mean - self._mean
        spread = self._count * count / total.clamp(min=1)
        du, dx, dy = delta.split([self.inputs, self.channels, self.channels])
        self._gram += gram + spread * torch.outer(du, delta)
        self._pairs += pairs + spread * torch.stack([dx * dx, dx * dy, dy * dy])
        self._mean += delta * (count / total.clamp(min=1))
        self._count = total

    def over_ranks(self) -> "JointSums":
        """Everybody's sums, merged."""
        parts = (self._count.reshape(1), self._mean, self._gram.flatten(), self._pairs.flatten())
        merged = JointSums(self.inputs, self.channels, self._mean.device)
        for one in gather_over_ranks(torch.cat(parts)):
            count, mean, gram, pairs = one.split([part.numel() for part in parts])
            merged._merge(count[0], mean, gram.view_as(self._gram), pairs.view_as(self._pairs))
        return merged

    def solve(self, alone: Affine) -> tuple[Affine, Tensor] | None:
        """The affine map and what to add to the layer's weight, ``[C, K]``; None where the tokens are too few.

        Args:
            alone: the fit without the layer; where the two together have next to no scale, a channel stays with it.
        """
        sums = self.over_ranks()
        if not sums._count >= TOKENS * self.inputs or not torch.isfinite(sums._gram).all():
            return None
        count = sums._count
        g, d, b = (part / count for part in sums._gram.split([self.inputs, self.channels, self.channels], 1))
        xx, xy, yy = sums._pairs / count
        mean_u, mean_x, mean_y = sums._mean.split([self.inputs, self.channels, self.channels])
        damped = g.clone()
        damped.diagonal().add_(RIDGE * g.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            return None
        of_x, of_y = torch.cholesky_solve(d, factor), torch.cholesky_solve(b, factor)
        rest = xx - (d * of_x).sum(0)  # of x, what the layer's inputs do not tell
        scale = torch.where(rest > 1e-9 * xx, (xy - (d * of_y).sum(0)) / rest.clamp(min=1e-300), alone.scale)
        usable = (scale * alone.scale > 0) & (scale.abs() > STEEP * alone.scale.abs())
        scale = torch.where(usable, scale, alone.scale)
        added = torch.where(usable, of_y - scale * of_x, 0)  # V, [K, C]
        change = added / torch.where(usable, scale, 1)
        square = xx + 2 * (change * d).sum(0) + (change * (g @ change)).sum(0)
        cov = xy + (change * b).sum(0)
        mean = mean_x + mean_u @ change
        residual = float(1 - explained_share(square, cov, yy, mean_y, scale).clamp(max=1).mean())
        square = torch.where(usable, square, alone.square)
        return Affine(scale, mean_y - scale * mean, mean, square, residual), change.T


@torch.no_grad()
def change_layer(layer: nn.Linear, change: Tensor) -> None:
    """Add to its weight; a constant is left to the norm's shift."""
    layer.weight.copy_(layer.weight.double() + change)


# --- embedding tables ---


@dataclass(frozen=True)
class Rests:
    """Draws of what is added to a table's rows, in the original and in the converted model, each ``[M, C]``."""

    original: Tensor
    converted: Tensor


def draw(rests: Sequence[Rests]) -> Rests:
    """Some of all ranks' draws, evenly."""
    both = torch.cat([torch.cat([rest.original, rest.converted], 1) for rest in rests])
    own = both[torch.linspace(0, len(both) - 1, RESTS, device=both.device).long()]
    everyone = gather_over_ranks(own).flatten(0, 1)
    original, converted = everyone[:: len(everyone) // RESTS].chunk(2, 1)
    return Rests(original, converted)


def rests_of(call: tuple[Tensor, Tensor], original_call: tuple[Tensor, Tensor], now: Seen, then: Seen) -> Rests:
    """What was added to a table's rows in one call, where tokens are valid: the norm's input without them."""
    keep: Any = slice(None) if now.valid is None else now.valid
    converted = now.read - as_rows(call[1].expand(_shape(call[1], now)), -1)
    original = then.read - as_rows(original_call[1].expand(_shape(original_call[1], then)), -1)
    return Rests(original[keep], converted[keep])


def _shape(output: Tensor, seen: Seen) -> torch.Size:
    """The table's output may be one row of positions for a whole batch."""
    rows = output.numel() // output.shape[-1]
    return output.shape if rows == len(seen.read) else torch.Size((len(seen.read) // rows, *output.shape[-2:]))


@torch.no_grad()
def refit_table(table: nn.Embedding, original: nn.Embedding, norm: nn.Module, fit: Affine, rests: Rests) -> None:
    """Make each row of a table what the norm would make of it.

    Args:
        table: the converted model's; changed.
        original: the original's.
        norm: the original's, over the last axis.
        fit: the affine map in the norm's place.
        rests: what is added to the rows.
    """
    usable = fit.scale.abs() > 1e-3 * fit.scale.abs().mean()
    scale, shift = (t.to(original.weight) for t in (torch.where(usable, fit.scale, 1), fit.shift))
    at_once = max(1, 2**22 // rests.original.numel())
    for begin in range(0, len(original.weight), at_once):
        rows = original.weight[begin : begin + at_once]
        wanted = norm(rows[:, None] + rests.original)
        new = ((wanted - shift) / scale - rests.converted).mean(1)
        table.weight[begin : begin + at_once] = torch.where(usable, new, table.weight[begin : begin + at_once])
