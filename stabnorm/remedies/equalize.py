"""`equalize_channels`: give all channels of a norm's output the same range, and let the readers undo it."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabnorm._checks import check_flag, check_names, wrong_item
from stabnorm._models.copies import copied
from stabnorm._models.devices import device_of
from stabnorm._models.examples import Example, read_examples, run
from stabnorm._models.hooks import hooked
from stabnorm._models.names import Patterns
from stabnorm._models.random_state import random_state_kept
from stabnorm.fold._sites import Site, find_gains
from stabnorm.fold.fold import fold_sites
from stabnorm.norms import NormLayer, find_norms
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def equalize_channels(
    model: nn.Module,
    example: Any,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    shift: bool = False,
    scales: Mapping[str, Tensor] | None = None,
) -> RemedyReport:
    r"""Divide each channel of a norm's output by its range, and multiply the weights that read it, in place; exact.

    .. math:: \gamma' = \gamma / r, \quad \beta' = \beta / r - b, \qquad W' = W \operatorname{diag}(r), \quad
        c' = c + W' b

    r is the range of a channel over the mean range of all channels, so that afterwards all channels have the same
    range, and an outlier channel no longer takes the digits of the others in a quantiser with one scale. The model
    computes the same, up to rounding; its norms stay. What may take part is what `fold_gains` can follow: everything
    that reads the output must be a linear or convolution layer of its own.

    The statistic `channel_spread` is of what a norm reads. This changes what it returns.

    Args:
        model: any module, in any mode.
        example: the model's arguments, as for `fold_norms`; pass a list of real inputs. The ranges are those that a
            copy of the model has on them, in eval mode.
        include: a regular expression, or several, searched for in a norm's name. Default: all layer and rms norms with
            a gain.
        exclude: the same, for norms to leave alone; it wins over `include`. Default: none.
        shift: whether the channels get the same smallest value, too (b above). The norm must have a bias, and a reader
            without one gets one. Default: False, b is 0.
        scales: r by the name of the norm, ``[channels]``, all above 0, in place of what the example shows. Default:
            none.

    Returns:
        What was changed: the largest range over the median range of a channel, before and after, and which weights have
        taken the scale; and what was left and why.

    Raises:
        TypeError: `example` has none of the formats, or a scale is no tensor.
        ValueError: a pattern is invalid or matches no norm, a scale has another size or is not above 0, or the example
            does not run.
        StabNormError: there is no norm with a gain, none can be changed, or the model is compiled, scripted or wrapped.

    Source: arXiv:2212.08254, RepQ-ViT, scale reparametrization of LayerNorm.

    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    >>> _ = nn.init.constant_(model[0].weight[:1], 100.0)
    >>> x = torch.randn(64, 4)
    >>> before = model(x)
    >>> report = equalize_channels(model, x)
    >>> torch.allclose(model(x), before, rtol=1e-4, atol=1e-4), bool(model[0].weight.max() < 30)
    (True, True)
    """
    check_flag("shift", shift)
    check_remedied(model)
    examples = read_examples("example", example)
    layers = {layer.name: layer for layer in find_norms(model) if layer.kind in ("layer", "rms")}
    sites, staying = find_gains(model)
    staying |= {site.name: "it has no gain" for site in sites if site.gain is None or site.gain.weight is None}
    names = chosen("norms with a gain", [*layers], include, exclude)
    given = _checked(scales or {}, layers)
    with random_state_kept(device_of(model)), torch.inference_mode(False):
        copy = copied(model).eval()
        ranges = _ranges(copy, [name for name in names if name not in staying], examples)
        moves = {name: _move(ranges[name], given.get(name), shift) for name in ranges}
        moved = [_site(site, *moves[site.name]) for site in sites if site.name in moves]
        result = fold_sites(lambda _: (moved, {}), copy, example, tied="refuse")
    into = {norm.name: norm.into for norm in result.norms if norm.into}
    left = {name: staying[name] for name in names if name in staying}
    left |= {name: "no example reaches it" for name in names if name not in left and name not in ranges}
    left |= {norm.name: norm.reason for norm in result.norms if not norm.into}
    now = dict(model.named_parameters())
    new = {name: p for name, p in result.model.named_parameters() if name not in now}
    steps = []
    for name in names:
        if name in into:
            low, high = ranges[name]
            before, after = (_spread(t) for t in (high - low, (high - low) / moves[name][0]))
            action = f"spread of the channels {before:.3g} to {after:.3g}, into {', '.join(into[name])}"
            steps.append(Step(name, action, _nothing))
    if steps:  # the numbers of all of them are written together, because norms may share a reader
        changed = [
            (now[name], p)
            for name, p in result.model.named_parameters()
            if name in now and not torch.equal(p.to(now[name]), now[name])
        ]
        owners = tuple(model.get_submodule(name.rpartition(".")[0]) for name in new)
        write = partial(_write, model, changed, new)
        steps[0] = steps[0]._replace(carry_out=write, modules=owners, numbers=tuple(old for old, _ in changed))
    return carried_out("equalize_channels", model, steps, left, "1e-6")


def _nothing() -> None:
    """Stand in for the step of a norm whose numbers the first step writes."""


def _write(model: nn.Module, changed: list[tuple[nn.Parameter, nn.Parameter]], new: Mapping[str, Tensor]) -> None:
    for old, numbers in changed:
        old.copy_(numbers)
    for name, bias in new.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        module.register_parameter(attribute, nn.Parameter(bias.detach().clone(), trained))


def _checked(scales: Mapping[str, Tensor], layers: Mapping[str, NormLayer]) -> Mapping[str, Tensor]:
    check_names("scales", scales, layers)
    for name, scale in scales.items():
        if not isinstance(scale, Tensor):
            raise wrong_item("scales", scale, "a tensor for each norm")
        size = layers[name].num_features
        if scale.shape != (size,) or not bool((scale > 0).all()):
            raise ValueError(f"scales[{name!r}] must have shape ({size},), with all numbers above 0; got {scale}")
    return scales


def _ranges(model: nn.Module, names: list[str], examples: list[Example]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the examples, and return the smallest and the largest value of each channel of the norms' outputs."""
    layers = {layer.name: layer for layer in find_norms(model)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        rows = layers[name].rows(output.detach()).double().cpu()
        low, high = rows.amin(0), rows.amax(0)
        before = seen.get(name)
        seen[name] = (low, high) if before is None else (low.minimum(before[0]), high.maximum(before[1]))

    def registrations() -> Iterator[RemovableHandle]:
        for name in names:
            yield model.get_submodule(name).register_forward_hook(partial(hook, name))

    with hooked(registrations()):
        for example in examples:
            try:
                run(model, example)
            except Exception as error:
                raise ValueError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
    return seen


def _move(of: tuple[Tensor, Tensor], given: Tensor | None, shift: bool) -> tuple[Tensor, Tensor]:
    """Return r and b; a channel that never varies keeps its scale."""
    low, high = of
    if given is not None:
        r = given.double().cpu()
    else:
        size = high - low if shift else low.abs().maximum(high.abs())
        varies = size > 1e-6 * size.mean()
        r = torch.where(varies, size / size[varies].mean(), 1.0) if bool(varies.any()) else torch.ones_like(size)
    smallest = low / r
    return r, smallest - smallest.mean() if shift else torch.zeros_like(r)


def _site(site: Site, r: Tensor, b: Tensor) -> Site:
    """Return what the readers take in, y = r (x + b), where gain and bias of the norm give x."""
    if site.gain is not None and site.gain.bias is None:
        b = torch.zeros_like(b)
    return dataclasses.replace(site, scale=r, shift=r * b, stays=(site.scale / r, site.shift / r - b))


def _spread(ranges: Tensor) -> float:
    return float(ranges.max() / ranges.median()) if float(ranges.median()) else float("inf")
