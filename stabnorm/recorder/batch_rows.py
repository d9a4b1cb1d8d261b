"""Which rows of a batch, its samples, an alarm comes from: `look_at_rows` runs the batch again and compares its rows.

A row is named only if the step was unlike the steps before it, and if the batch without the row is calm: the rows that
stand out are replaced by an ordinary one, and the batch is run once more. So neither a wrong guess about the layout of
a tensor nor a fault of the weights accuses a sample, nor are those accused that are always harder than others.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stabnorm._models.hooks import hooked
from stabnorm._models.watched import Watcher, Watching
from stabnorm.monitor.layer_hook import valid_of, why_not
from stabnorm.norms import NormLayer
from stabnorm.norms.rows import tokens_of
from stabnorm.recorder.row_axis import Rows
from stabnorm.recorder.row_losses import RowLosses
from stabnorm.recorder.row_words import STANDS_OUT, sentence_of

_LOSS_STANDS_OUT = 10.0  # times the median row; losses differ more from row to row than inputs of norms do
_NEAR = 0.6  # of the highest ratio: the first layer in depth order that reaches it is looked at
_SHOWN, _CHANNELS = 5, 3
_RAISED = 2.0  # times the median of the steps before
_PAST, _FEWEST = 128, 32  # steps before, and the fewest of them that tell what is usual

MicroBatch = Mapping[str, Any]  # as a dump has it: "batch", "indices", "masks" and "random"
Run = Callable[[MicroBatch], Tensor | None]


@dataclass(frozen=True)
class BatchRow:
    """One row of a batch.

    Attributes:
        row: its number in the batch.
        micro_batch: which batch of the step it is in.
        sample: its number in the data set; None if the sampler does not tell it.
        largest: its largest ``|x|`` among the valid tokens of the layer; infinite where a value is not finite.
        token: where that is in the row: its position, or several numbers such as (head, position) or (line, column).
        channels: the channels with the largest values of that token.
        loss: what it adds to the loss; infinite where that is not finite, NaN if the loss function does not tell it.
        loss_share: the same as a share of the loss; NaN where the loss is not finite, too.
    """

    row: int
    micro_batch: int
    sample: int | None
    largest: float
    token: tuple[int, ...]
    channels: tuple[int, ...]
    loss: float = math.nan
    loss_share: float = math.nan


@dataclass(frozen=True)
class BatchRows:
    """The rows of a step, compared with one another at one layer.

    Attributes:
        step: the step.
        layer: the first layer in depth order that is not finite, else the one that was named, else, or if no row stands
            out there, the first one where rows differ most.
        count: the number of rows, in all micro-batches.
        micro_batches: the number of micro-batches.
        usual: the largest ``|x|`` of the median row.
        guilty: whether `rows` did it: the batch is calm without them.
        without: the largest ``|x|`` of the layer without them; NaN where that was not tried.
        rows: the guilty rows, or those that stand out and could not be left out; else the one with the largest
            ``|x|``. At most 5.
        sentence: all of this in words.
    """

    step: int
    layer: str
    count: int
    micro_batches: int
    usual: float
    guilty: bool
    without: float
    rows: tuple[BatchRow, ...]
    sentence: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers, for records."""
        return dataclasses.asdict(self)


class AgainstPast(NamedTuple):
    """How many times its usual value something was at a step; NaN if that is not known.

    Attributes:
        largest: the largest input of each layer.
        loss: the loss.
    """

    largest: Mapping[str, float]
    loss: float

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> "AgainstPast":
        """Read what a dump says, which has NaN as a text."""
        return cls({name: float(ratio) for name, ratio in saved["largest"].items()}, float(saved["loss"]))

    @classmethod
    def of(
        cls,
        step: int,
        steps: npt.NDArray[Any],
        losses: npt.NDArray[Any],
        largest: npt.NDArray[Any] | None,
        layers: Sequence[str],
    ) -> "AgainstPast":
        """Compare a step with the median of those before it.

        Args:
            step: the step.
            steps: ``[steps]``, their numbers.
            losses: ``[steps]``.
            largest: ``[steps, layers]``, the statistic "amax"; None if it was not watched.
            layers: their names.
        """
        here, before = steps == step, (steps < step) & (steps >= step - _PAST)

        def ratio(values: npt.NDArray[Any]) -> float:
            past, now = values[before], values[here]
            past = past[np.isfinite(past)]
            usual = float(np.median(past)) if len(past) >= _FEWEST else math.nan
            return float(now[-1]) / usual if len(now) and usual > 0 else math.nan

        of_layers = {} if largest is None else {name: ratio(largest[:, i]) for i, name in enumerate(layers)}
        return cls(of_layers, ratio(losses))


UNKNOWN = AgainstPast({}, math.nan)


class _Seen(NamedTuple):
    """The input of a layer: ``[rows]`` the largest value of each row, and of the worst rows token and channels."""

    largest: Tensor
    places: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]


class _RowHook:
    """Reads the largest value of each row at the input of a layer; of several calls the one with the largest value."""

    def __init__(self, layer: NormLayer, rows: Rows) -> None:
        self.layer, self.rows = layer, rows
        self.seen: _Seen | None = None

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = self.layer
        x = layer.input_of(args, kwargs)
        if why_not(layer, x) is not None:
            return
        values = layer.rows(x.detach()).float().abs()  # [tokens, channels]
        values = torch.where(values.isfinite(), values, torch.inf)
        valid = valid_of(layer, module, x, args, kwargs)
        heights = values.amax(-1)
        if valid is not None:
            heights = torch.where(valid.reshape(-1), heights, 0)
        tokens = torch.arange(len(values), device=x.device)
        tokens = tokens.reshape(tokens_of(x.shape, layer.channel_dim, layer.feature_dims))
        of_row = self.rows.apart(tokens)
        if of_row is None:
            return
        places = of_row.reshape(len(of_row), -1)
        largest, at = heights[places].max(1)
        if self.seen is not None and largest.max() <= self.seen.largest.max():
            return
        worst = largest.topk(min(_SHOWN, len(largest))).indices
        known = {}
        for row, values_there in zip(worst.tolist(), values[places[worst, at[worst]]], strict=True):
            known[row] = _position(int(at[row]), of_row.shape[1:]), _worst_channels(values_there)
        self.seen = _Seen(largest.cpu(), known)


def _worst_channels(values: Tensor) -> tuple[int, ...]:
    """Return the channels with the largest values, largest first; those that are not finite, unless all are not."""
    broken = values.isinf()
    if broken.any():
        return () if broken.all() else tuple(broken.nonzero()[:_CHANNELS, 0].tolist())
    return tuple(values.topk(min(_CHANNELS, len(values))).indices.tolist())


def _position(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers along each axis of an element that is the `place`-th of all."""
    numbers = []
    for size in reversed(shape):
        place, number = divmod(place, size)
        numbers.append(number)
    return tuple(reversed(numbers))


class _Ran(NamedTuple):
    """What came of running a micro-batch."""

    rows: Rows
    seen: Mapping[str, _Seen]
    losses: Tensor | None  # [rows]
    loss: float


def _ran(run: Run, one: MicroBatch, layers: Sequence[NormLayer], rows: Rows) -> _Ran:
    hooks = [_RowHook(layer, rows) for layer in layers]
    watching = (Watching(hook.layer.module, Watcher(hook)) for hook in hooks)
    with hooked(watching), torch.enable_grad(), RowLosses() as losses:
        loss = run(one)
    seen = {hook.layer.name: hook.seen for hook in hooks if hook.seen is not None}
    if loss is None:
        return _Ran(rows, seen, None, math.nan)
    return _Ran(rows, seen, losses.of_rows(loss, rows), float(loss.detach().sum()))


def look_at_rows(
    model: nn.Module,
    layers: Sequence[NormLayer],
    batches: Sequence[MicroBatch],
    run: Run,
    *,
    step: int,
    named: str = "",
    past: AgainstPast = UNKNOWN,
) -> BatchRows | None:
    """Run the batches of a step again, and compare their rows.

    Args:
        model: the model; what a run changes in it is the caller's matter.
        layers: its norms, in depth order.
        batches: the micro-batches of the step, as a dump has them.
        run: runs the model on a micro-batch, twice with the same random numbers, and returns the loss; None if no loss
            is known.
        step: the step.
        named: the layer that an alarm names. Default: none.
        past: how the step differs from those before. A row is accused only if the largest input of the layer, or the
            loss, is more than twice its usual value. Default: that is not known, and no reason to accuse none.

    Returns:
        The rows; None if nothing tells which part of a batch is a row.
    """
    ran = []
    for one in batches:
        rows = Rows.of(one["batch"], model, one["indices"])
        if rows is None:
            return None
        ran.append(_ran(run, one, layers, rows))
    layer = _chosen([layer.name for layer in layers], ran, named)
    if layer is None:
        return None
    watched = [one for one in layers if one.name == layer]
    heights = torch.cat([one.seen[layer].largest for one in ran])
    losses = None
    if all(one.losses is not None for one in ran):
        losses = torch.cat([one.losses for one in ran if one.losses is not None])
    usual = _median(heights)
    # Written so that NaN, which stands for what is not known, hinders nothing.
    by_height, by_loss = not past.largest.get(layer, math.nan) <= _RAISED, not past.loss <= _RAISED
    suspects = _suspects(heights, losses if by_loss else None, usual, by_height=by_height)
    guilty, without = False, math.nan
    after = _without(suspects, heights, batches, ran, lambda one, rows: _ran(run, one, watched, rows))
    if after is not None:
        without = max(float(one.seen[layer].largest.max()) if layer in one.seen else math.inf for one in after)
        if losses is not None and not _losses_fit(suspects, losses, after):
            losses = None
        by_height = float(heights[suspects].max()) > STANDS_OUT * usual
        halfway = math.sqrt(usual) * math.sqrt(float(heights[heights.isfinite()].max()))
        guilty = without <= max(halfway, STANDS_OUT * usual) if by_height else losses is not None
    shown = suspects if guilty or (suspects and math.isnan(without)) else [int(heights.argmax())]
    found = tuple(_row(place, layer, batches, ran, losses) for place in shown[:_SHOWN])
    result = BatchRows(step, layer, len(heights), len(ran), usual, guilty, without, found)
    return dataclasses.replace(result, sentence=sentence_of(result, len(suspects)))


def _chosen(order: Sequence[str], ran: Sequence[_Ran], named: str) -> str | None:
    """Return the layer at which rows are compared; None if no layer has told rows apart."""
    known = [name for name in order if all(name in one.seen for one in ran)]
    heights = {name: torch.cat([one.seen[name].largest for one in ran]) for name in known}
    broken = next((name for name in known if heights[name].isinf().any()), None)
    if broken is not None:
        return broken
    ratios = {name: float(of.max()) / max(_median(of), 1e-30) for name, of in heights.items()}
    highest = max(ratios.values(), default=0.0)
    if named in known and (ratios[named] > STANDS_OUT or highest <= STANDS_OUT):
        return named
    return next((name for name in known if ratios[name] >= _NEAR * highest), None)


def _median(values: Tensor) -> float:
    """Return the median of the finite values, the lower one of two; infinite if there are none."""
    finite = values[values.isfinite()]
    return float(finite.median()) if len(finite) else math.inf


def _suspects(heights: Tensor, losses: Tensor | None, usual: float, *, by_height: bool) -> list[int]:
    """Return the rows that stand out, the worst first; none if these are more than half of all."""
    over = heights.isinf() | ((heights > STANDS_OUT * usual) & by_height)
    score = heights
    if losses is not None and not over.any():
        score = torch.where(losses.isfinite(), losses, torch.inf)
        over = score.isinf() | (losses > _LOSS_STANDS_OUT * _median(losses))
    order: list[int] = score.argsort(descending=True, stable=True).tolist()
    return [place for place in order if over[place]] if 2 * int(over.sum()) <= len(over) else []


def _place(place: int, ran: Sequence[_Ran]) -> tuple[int, int]:
    """Return micro-batch and row of a row that is the `place`-th of all."""
    for number, one in enumerate(ran):
        if place < one.rows.count:
            return number, place
        place -= one.rows.count
    raise IndexError(place)


def _without(
    suspects: Sequence[int],
    heights: Tensor,
    batches: Sequence[MicroBatch],
    ran: Sequence[_Ran],
    again: Callable[[MicroBatch, Rows], _Ran],
) -> list[_Ran] | None:
    """Run each micro-batch with an ordinary row in the place of the suspects; None if that is impossible."""
    if not suspects:
        return None
    after, first = list[_Ran](), 0
    for number, one in enumerate(ran):
        own = [row for at, row in (_place(place, ran) for place in suspects) if at == number]
        of_rows = heights[first : first + one.rows.count]
        first += one.rows.count
        if not own:
            after.append(one)
            continue
        others = [row for row in of_rows.argsort().tolist() if row not in own]
        if not others:
            return None
        calm = others[(len(others) - 1) // 2]
        batch = batches[number]
        replaced = {part: one.rows.replaced(batch[part], own, calm) for part in ("batch", "masks")}
        try:
            after.append(again({**batch, **replaced}, one.rows))
        except Exception:  # such a batch is not what the user's model expects
            return None
    return after


def _losses_fit(suspects: Sequence[int], before: Tensor, after: Sequence[_Ran]) -> bool:
    """Whether the losses of the rows that were replaced have changed most, as they do if losses and rows fit."""
    if any(one.losses is None for one in after):
        return False
    changed = (torch.cat([one.losses for one in after if one.losses is not None]) - before).abs()
    changed = torch.where(changed.isfinite(), changed, torch.inf)
    return int(changed.argmax()) in suspects


def _row(place: int, layer: str, batches: Sequence[MicroBatch], ran: Sequence[_Ran], losses: Tensor | None) -> BatchRow:
    number, row = _place(place, ran)
    samples, seen = batches[number]["indices"], ran[number].seen[layer]
    token, channels = seen.places.get(row, ((), ()))
    loss = share = math.nan
    if losses is not None:
        loss = float(losses[place]) if losses[place].isfinite() else math.inf
        share = loss / float(losses.sum())
    sample = int(samples[row]) if samples is not None and len(samples) == ran[number].rows.count else None
    return BatchRow(row, number, sample, float(seen.largest[row]), token, channels, loss, share)
