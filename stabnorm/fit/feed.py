r"""Fit the layer before a norm together with the affine map: its weights can often do what no affine map can.

**A linear layer** can be fitted when only the norm reads the sum that the layer adds to: x = W u + rest, as in every
post-norm block. A ridge regression with one Gram matrix for all channels finds the affine map and a change V of the
layer together:

.. math:: \min_{a, b, V} \sum_t \|a \odot x_t + V u_t + b - \hat y_t\|^2 + \rho \|V\|^2,\qquad
          W' = W + \mathrm{diag}(a)^{-1} V

The inputs u_t of the layer are usually a nonlinear function of the tokens, so the layer can correct errors that differ
from token to token.

**Embedding tables** can be fitted when only the norm reads their sum. Each row becomes what the norm would make of it,
as a mean over samples r_m of what the other tables add to it. This also works for words that do not occur in the
batches.

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

# Rho as a share of the mean variance of the layer's inputs. With a smaller one the model ended further from the
# original on other text.
RIDGE = 0.1
TOKENS = 4  # tokens needed per input of the layer; with fewer the layer is not fitted, because it would fit noise
WIDEST = 8192  # a layer with more inputs is not fitted: its Gram matrix would be too large
STEEP = 0.1  # the smallest scale that a channel may have, as a share of its scale without the layer
RESTS = 32  # samples of what is added to an embedding


@dataclass(frozen=True)
class Feeder:
    """The modules that produce a norm's input: one linear layer, or embedding tables.

    Args:
        kind: "linear" or "embedding".
        names: the names of the modules.
    """

    kind: str
    names: tuple[str, ...]


@contextmanager
def passing(modules: Sequence[nn.Module]) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Record input and output of each of these modules, call by call, while the context is open."""
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
    """Streaming sums for the joint fit of a norm and the linear layer before it.

    They are the second moments of the layer's input u, the norm's input x and the output y that the norm should have.
    The products of a batch are computed in the precision of the inputs, around the means of the batch, and merged in
    float64 by Chan's rule.

    Args:
        inputs: number of the layer's inputs, K.
        channels: number of the norm's channels, C.
    """

    def __init__(self, inputs: int, channels: int, device: torch.device | None = None) -> None:
        self.inputs, self.channels = inputs, channels
        size = inputs + 2 * channels
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._gram = torch.zeros(inputs, size, dtype=torch.float64, device=device)  # u with u, x, y
        self._pairs = torch.zeros(3, channels, dtype=torch.float64, device=device)  # xx, xy and yy of each channel

    def add(self, u: Tensor, seen: Seen, wanted: Tensor) -> None:
        """Add one call: the layer's input ``[R, K]``, the norm's call, and the output it should have, ``[R, C]``."""
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
        """Return the sums of all ranks, merged."""
        parts = (self._count.reshape(1), self._mean, self._gram.flatten(), self._pairs.flatten())
        merged = JointSums(self.inputs, self.channels, self._mean.device)
        for of_rank in gather_over_ranks(torch.cat(parts)):
            count, mean, gram, pairs = of_rank.split([part.numel() for part in parts])
            merged._merge(count[0], mean, gram.view_as(self._gram), pairs.view_as(self._pairs))
        return merged

    def solve(self, alone: Affine) -> tuple[Affine, Tensor] | None:
        """Return the affine map, and what to add to the layer's weight, ``[C, K]``; None if there are too few tokens.

        Args:
            alone: the fit without the layer. A channel keeps it where the joint fit would have almost no scale.
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
        rest = xx - (d * of_x).sum(0)  # the variance of x that the layer's inputs do not explain
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
    """Add `change` to the layer's weight. Its bias stays, because the norm's shift takes up constants."""
    layer.weight.copy_(layer.weight.double() + change)


# --- embedding tables ---


@dataclass(frozen=True)
class Rests:
    """Samples of what is added to a table's rows, in the original and in the converted model, each ``[M, C]``."""

    original: Tensor
    converted: Tensor


def draw(rests: Sequence[Rests]) -> Rests:
    """Pick samples at even distances from those of all ranks."""
    both = torch.cat([torch.cat([rest.original, rest.converted], 1) for rest in rests])
    own = both[torch.linspace(0, len(both) - 1, RESTS, dtype=torch.float64, device=both.device).long()]
    everyone = gather_over_ranks(own).flatten(0, 1)
    original, converted = everyone[:: len(everyone) // RESTS].chunk(2, 1)
    return Rests(original, converted)


def rests_of(call: tuple[Tensor, Tensor], original_call: tuple[Tensor, Tensor], now: Seen, then: Seen) -> Rests:
    """Return what was added to a table's rows at the valid tokens of one call: the norm's input minus these rows."""
    keep: Any = slice(None) if now.valid is None else now.valid
    converted = now.read - as_rows(call[1].expand(_shape(call[1], now)), -1)
    original = then.read - as_rows(original_call[1].expand(_shape(original_call[1], then)), -1)
    return Rests(original[keep], converted[keep])


def _shape(output: Tensor, seen: Seen) -> torch.Size:
    """Return the shape of the table's output; a table of positions may give one sequence for the whole batch."""
    rows = output.numel() // output.shape[-1]
    return output.shape if rows == len(seen.read) else torch.Size((len(seen.read) // rows, *output.shape[-2:]))


@torch.no_grad()
def refit_table(table: nn.Embedding, original: nn.Embedding, norm: nn.Module, fit: Affine, rests: Rests) -> None:
    """Make each row of a table what the norm would make of it.

    Args:
        table: the table of the converted model, which is changed.
        original: the table of the original model.
        norm: the norm of the original model, over the last axis.
        fit: the affine map in the norm's place.
        rests: samples of what is added to the rows.
    """
    usable = fit.scale.abs() > 1e-3 * fit.scale.abs().mean()
    scale, shift = (t.to(original.weight) for t in (torch.where(usable, fit.scale, 1), fit.shift))
    chunk = max(1, 2**22 // rests.original.numel())
    for begin in range(0, len(original.weight), chunk):
        rows = original.weight[begin : begin + chunk]
        wanted = norm(rows[:, None] + rests.original)
        new = ((wanted - shift) / scale - rests.converted).mean(1)
        table.weight[begin : begin + chunk] = torch.where(usable, new, table.weight[begin : begin + chunk])
