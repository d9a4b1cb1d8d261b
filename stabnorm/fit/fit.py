r"""Replace trained norms by the closest affine map per channel: least squares, norm by norm in depth order.

.. math:: a_c = \mathrm{cov}(x_c, y_c) / \mathrm{var}(x_c),\qquad b_c = \overline{y_c} - a_c \overline{x_c}

y is the output of the norm in the original model, and x is the input of its successor in the converted model, where all
norms before it are affine maps already. So each fit also corrects a part of the error that the fits before it left. If
all were fitted at once, each on the input in the original model, the errors would add up along the depth.

The sums are exact: they are float64, and merged over batches and ranks by Chan's rule. There is one pass over the
batches for each depth. Norms that do not depend on each other's output have the same depth.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from stabnorm._checks import (
    check_all,
    check_has_numbers,
    check_instance,
    check_loader,
    check_model,
    nearest,
    wrong_type,
)
from stabnorm._models.batches import batches_of
from stabnorm._models.devices import device_of
from stabnorm.errors import StabNormError
from stabnorm.fit.feed import Feeder, JointSums, Rests, change_layer, draw, passing, refit_table, rests_of
from stabnorm.fit.sums import Affine, ChannelSums, Seen
from stabnorm.fit.watch import Runner, seen_in
from stabnorm.nn.prep import PRepBN
from stabnorm.norms import NormLayer, NormSearch


@torch.no_grad()
def write_affine(norm: PRepBN, fit: Affine) -> None:
    r"""Write the affine map into the norm's RepBN, with the input statistics of the fit as running statistics.

    .. math:: \gamma = a \sqrt{\sigma^2 + \epsilon},\quad \beta = b + a \mu,\quad \eta = 0

    So gamma is in units of the output, whatever the scale of the input, which trains well. With batch statistics, in
    training, the RepBN starts at the same fit.
    """
    rep = norm.rep
    if rep.running_mean is not None:
        rep.running_mean.copy_(fit.mean)
    rep.running_var.copy_(fit.square)
    std = (rep.running_var.double() + rep.eps).sqrt()
    rep.weight.copy_(fit.scale * std)
    if rep.bias is not None:
        mean = torch.zeros_like(fit.mean) if rep.running_mean is None else rep.running_mean.double()
        rep.bias.copy_(fit.shift + rep.weight.double() / std * mean)  # corrects for the rounding to float32
    rep.eta.zero_()


class _Pair:
    """A norm of the original model, its successor in the converted one, and the layers that feed them."""

    def __init__(
        self, converted: NormLayer, original: NormLayer, fed: list[nn.Module], original_fed: list[nn.Module]
    ) -> None:
        assert isinstance(converted.module, PRepBN)
        self.converted, self.original, self.norm = converted, original, converted.module
        self.feeders, self.original_feeders = fed, original_fed
        self.fed = bool(fed)
        device = device_of(original.module)
        self.sums = ChannelSums(original.num_features, device)
        linear = fed[0] if fed else None
        self.linear = linear if isinstance(linear, nn.Linear) else None
        self.joint = None if self.linear is None else JointSums(self.linear.in_features, original.num_features, device)
        self.rests: list[list[Rests]] = [[] for _ in self.feeders]

    def add(self, now: Sequence[Seen], then: Sequence[Seen], fed: Sequence[Any], original_fed: Sequence[Any]) -> None:
        """Add one batch.

        Args:
            now: the calls of the successor in the converted model.
            then: the calls of the norm in the original model.
            fed: inputs and outputs of the feeders in the converted model.
            original_fed: the same in the original model.
        """
        for call, wanted in zip(now, then, strict=True):
            self.sums.add(call, wanted.written)
        if not self.fed or not all(len(calls) == len(now) for calls in (*fed, *original_fed)):
            self.fed = False  # a feeder that runs more often than its norm also feeds something else
            return
        if self.joint is not None:
            for (u, _), call, wanted in zip(fed[0], now, then, strict=True):
                self.joint.add(u.flatten(0, -2), call, wanted.written)
            return
        for rests, calls, original_calls in zip(self.rests, fed, original_fed, strict=True):
            rests += [rests_of(*four) for four in zip(calls, original_calls, now, then, strict=True)]

    def affine(self) -> Affine:
        """Return the fit, and change the linear layer before the norm if that was fitted together with it.

        Raises:
            StabNormError: the norm saw no valid token, or a value that is not finite.
        """
        alone = self.sums.affine(center=self.norm.rep.center)
        together = self.joint.solve(alone) if self.joint is not None and self.fed else None
        if together is None or self.linear is None:
            return alone
        fit, change = together
        change_layer(self.linear, change)
        return fit


def fit_norms(
    model: nn.Module,
    original: nn.Module,
    loader: Iterable[Any],
    levels: Sequence[Sequence[str]],
    run: Runner,
    calls: Mapping[str, int] | None = None,
    feeders: Mapping[str, Feeder] | None = None,
) -> dict[str, Affine | str]:
    """Fit a converted model's norms to those of the original, level by level, and set lam of each fitted norm to 0.

    Args:
        model: converted with `convert_norms`, in eval mode. The RepBN and lam of each norm in `levels` are changed.
        original: the model before its conversion, in eval mode.
        loader: batches; every level needs one pass over them.
        levels: the names of the norms by depth, see `stabnorm.fit.measure`.
        run: how both models are run.
        calls: how often each norm is called on a batch, for the norms where this number is always the same. If it is
            known for all norms of a level, a forward stops as soon as they have all been called. Default: forwards run
            to the end.
        feeders: the layers before the norms that are fitted, too, see `stabnorm.fit.feed`; their weights are changed.
            Each embedding table needs one more pass, and the norm after them another one. Default: none.

    Returns:
        The fit of each norm, or the reason, as a string, why it has none. In that case its lam does not change.
    """
    check_model("model", model)
    check_model("original", original)
    for part in (model, original):
        check_has_numbers(part, "to fit")
    check_loader("loader", loader)
    check_instance("run", run, Runner, "a Runner")
    if not isinstance(levels, Sequence) or isinstance(levels, str):
        raise wrong_type("levels", levels, "a list of lists of names")
    for level in levels:
        check_all("levels", level, str, "a list of lists of names")
    for argument, value in (("calls", calls), ("feeders", feeders)):
        if value is not None:
            check_instance(argument, value, Mapping, "a dict by the names of norms, from measure_norms")
    originals = {layer.name: layer for layer in NormSearch(original).found}
    converted = {layer.name: layer for layer in NormSearch(model).found}
    for name in (name for level in levels for name in level):
        if name not in converted or name not in originals:
            raise ValueError(f"levels: there is no norm {name!r} in both models{nearest(name, converted)}")
    fits: dict[str, Affine | str] = {}
    for level in levels:
        enough = sum(calls[name] for name in level) if calls and all(name in calls for name in level) else None

        def pair_of(name: str) -> _Pair:
            paths = feeders[name].names if feeders and name in feeders else ()
            fed, original_fed = ([part.get_submodule(path) for path in paths] for part in (model, original))
            return _Pair(converted[name], originals[name], fed, original_fed)

        pairs = {name: pair_of(name) for name in level}
        _pass(model, original, loader, pairs, run, enough)
        tables = {name: pair_of(name) for name in level if pairs[name].fed and pairs[name].linear is None}
        for name, pair in pairs.items():
            try:
                fits[name] = _write(pair)
            except StabNormError as error:
                fits[name] = str(error)
                tables.pop(name, None)
        for number in range(max((len(pair.feeders) for pair in tables.values()), default=0)):
            _pass(model, original, loader, tables, run, enough)
            for name, pair in tables.items():
                fit = fits[name]
                if number < len(pair.feeders) and isinstance(fit, Affine):
                    table, original_table = pair.feeders[number], pair.original_feeders[number]
                    assert isinstance(table, nn.Embedding)
                    assert isinstance(original_table, nn.Embedding)
                    refit_table(table, original_table, pair.original.module, fit, draw(pair.rests[number]))
            tables = {name: pair_of(name) for name in tables}
        if tables:
            _pass(model, original, loader, tables, run, enough)
            fits |= {name: _write(pair) for name, pair in tables.items()}
    return fits


def _pass(
    model: nn.Module, original: nn.Module, loader: Iterable[Any], pairs: Mapping[str, _Pair], run: Runner,
    enough: int | None,
) -> None:  # fmt: skip
    for batch in batches_of(loader):
        with ExitStack() as stack:
            fed = {name: stack.enter_context(passing(pair.feeders)) for name, pair in pairs.items()}
            original_fed = {name: stack.enter_context(passing(pair.original_feeders)) for name, pair in pairs.items()}
            wanted = seen_in(original, [pair.original for pair in pairs.values()], batch, run, enough)
            seen = seen_in(model, [pair.converted for pair in pairs.values()], batch, run, enough)
        for name, pair in pairs.items():
            pair.add(seen.get(name, ()), wanted.get(name, ()), fed[name], original_fed[name])


def _write(pair: _Pair) -> Affine:
    fit = pair.affine()
    write_affine(pair.norm, fit)
    pair.norm.lam.zero_()
    return fit
