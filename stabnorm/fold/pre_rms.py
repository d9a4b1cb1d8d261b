"""`to_pre_rms`: where the residual stream has mean zero, a LayerNorm is an RMSNorm."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from stabnorm._models.devices import device_of
from stabnorm._models.examples import Example, read_examples
from stabnorm._models.hooks import has_forward_hooks
from stabnorm._models.outputs import Picker
from stabnorm._models.random_state import random_state_kept
from stabnorm.fold._lanes import make_lanes, try_on
from stabnorm.fold._sites import HOOKED
from stabnorm.fold._ties import drop_ties
from stabnorm.fold._writers import Streams, Writer, find_streams
from stabnorm.fold.fold import fold_gains
from stabnorm.fold.manifest import restructure
from stabnorm.fold.result import FoldedSite, FoldResult
from stabnorm.norms import NormLayer, find_norms


def to_pre_rms(
    model: nn.Module,
    example: Any,
    *,
    check: Any = None,
    tied: Literal["untie", "refuse"] = "untie",
    outputs: Callable[[Any], Any] | None = None,
) -> FoldResult:
    r"""Turn the LayerNorms of a pre-norm transformer into RMSNorms, exactly (Pre-RMSNorm, arXiv:2305.14858).

    .. math:: \operatorname{LN}(x) = \operatorname{RMSNorm}(x - \bar x)

    Gains and biases go into the readers (`fold_gains`). Then the layers that write to the residual stream (projections,
    embeddings, positions) lose their mean over the channels, so that the stream has mean zero, and each LayerNorm whose
    input is such a stream becomes an RMSNorm with the same eps. Nothing but those norms may read the stream. In
    training the two models stay equal only without dropout on the stream.

    Args:
        model: in eval mode.
        example: see `fold_norms`.
        check: see `fold_norms`. Default: the example, redrawn.
        tied: "untie": an embedding tied to the output layer gets a copy; "refuse": its norms stay. Default: "untie".
        outputs: see `fold_norms`. Default: all.

    Returns:
        The converted copy. A norm's status is "rms", with the writers in `into`, or "kept", with the reason.

    Raises:
        TypeError: `example` or `check` has none of the formats, or `model` is no module.
        ValueError: an option is unknown, the example does not run, or the model cannot be copied or followed.
        StabNormError: the model is in training mode, compiled, scripted, without numbers (meta, lazy) or itself a norm.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed, self.norm, self.fc = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)
    ...         self.last, self.head = nn.LayerNorm(4), nn.Linear(4, 2)
    ...     def forward(self, ids):
    ...         x = self.embed(ids)
    ...         return self.head(self.last(x + self.fc(self.norm(x))))
    >>> result = to_pre_rms(Block().eval(), torch.arange(5))
    >>> [(norm.name, norm.status) for norm in result.norms], result.max_rel_error < 1e-12
    ([('norm', 'rms'), ('last', 'rms')], True)
    """
    result = fold_gains(model, example, check=check, tied=tied, outputs=outputs)
    examples = read_examples("example", example)
    with random_state_kept(device_of(model)), torch.inference_mode(False):
        return _centred(result, examples, None if check is None else read_examples("check", check), tied, outputs)


def _centred(
    result: FoldResult, examples: list[Example], check: list[Example] | None, tied: str, outputs: Picker
) -> FoldResult:
    """Centre the writers, and put an RMSNorm in the place of each LayerNorm that then subtracts nothing."""
    lanes = make_lanes(result.model, [], examples, check, outputs)
    layers = {layer.name: layer for layer in find_norms(result.model) if layer.kind == "layer"}
    candidates = [name for name, layer in layers.items() if layer.feature_dims == 1 and layer.channel_dim == -1]
    streams = find_streams(lanes.lanes[0].model, candidates, lanes.lanes[0].examples[: len(examples)], outputs)
    problems = _settle(streams, layers, lanes.tied if tied == "refuse" else {})
    wanted = [name for name in candidates if name not in problems]
    writers = [writer for writer in streams.writers if not writer.problem and _feeds(streams, writer, wanted)]
    names = {writer.weight.name for writer in writers} | {w.bias.name for w in writers if w.bias}
    manifest = {
        **result.manifest,
        "untied": sorted({*result.manifest["untied"], *(name for name in names if name in lanes.tied)}),
        "rms": {name: {"num_features": layers[name].num_features, "eps": layers[name].eps} for name in wanted},
    }
    error, fault = try_on(lanes, lambda copy: _convert(copy, writers, manifest, layers), outputs)
    if fault:
        kept = [FoldedSite(norm.name, "kept", norm.into, fault) for norm in result.norms]
        return dataclasses.replace(result, norms=kept)
    converted = result.model  # fold_gains made it
    _convert(converted, writers, manifest, layers)
    converted_sites = {
        name: FoldedSite(name, "rms", tuple(_owner(w) for w in writers if _feeds(streams, w, [name])))
        for name in wanted
    }
    stays = {
        norm.name: FoldedSite(norm.name, "kept", norm.into, problems.get(norm.name, _OTHER)) for norm in result.norms
    }
    error = max(error, result.max_rel_error)
    norms = [converted_sites.get(norm.name, stays[norm.name]) for norm in result.norms]
    return dataclasses.replace(
        result, model=converted, norms=norms, max_rel_error=error, precision=lanes.precision(error), manifest=manifest
    )


_OTHER = "only a LayerNorm over the last axis is converted"


def _settle(streams: Streams, layers: Mapping[str, NormLayer], tied: Mapping[str, str]) -> dict[str, str]:
    """Say why norms stay. A writer can be centred only if no reader needs its mean; so one that stays keeps others."""
    problems = dict(streams.problems)
    read = {name for name, _ in streams.reads}
    for name, layer in layers.items():
        if layer.bias is not None and bool((layer.bias != 0).any()):
            problems.setdefault(name, "its bias found no reader to go into")
        if name not in read:
            problems.setdefault(name, "no example reaches it")
        if has_forward_hooks(layer.module):
            problems.setdefault(name, HOOKED)
    for index, writer in enumerate(streams.writers):
        if writer.weight.name in tied:
            writer.problem = writer.problem or f"it is tied to '{tied[writer.weight.name]}': pass tied='untie'"
        views = [other.weight for i, other in enumerate(streams.writers) if i != index]
        if any(view.overlaps(writer.weight) for view in views):
            writer.problem = writer.problem or "its weight is used in two ways"
    fresh = True
    while fresh:
        fresh = False
        for name, writers in streams.reads:
            blamed = next((streams.writers[i] for i in sorted(writers) if streams.writers[i].problem), None)
            if blamed and name not in problems:
                problems[name], fresh = f"'{_owner(blamed)}' cannot lose its mean: {blamed.problem}", True
            for i in writers if name in problems else ():
                if not streams.writers[i].problem:
                    streams.writers[i].problem, fresh = f"norm '{name}' reads it and stays", True
    return problems


def _owner(writer: Writer) -> str:
    return writer.name.removesuffix(".weight")


def _feeds(streams: Streams, writer: Writer, norms: list[str]) -> bool:
    index = streams.writers.index(writer)
    return any(name in norms and index in writers for name, writers in streams.reads)


@torch.no_grad()
def _convert(
    model: nn.Module, writers: list[Writer], manifest: Mapping[str, Any], layers: Mapping[str, NormLayer]
) -> None:
    gains = {name: layers[name].gain for name in manifest["rms"]}
    restructure(model, {**manifest, "folded": [], "affine": {}, "biases": {}})
    for name, gain in gains.items():
        norm = model.get_submodule(name)
        assert isinstance(norm, nn.RMSNorm)
        if gain is not None:
            norm.weight.copy_(gain)
    for writer in writers:
        for view, axis in ((writer.weight, 2), (writer.bias, 1)):
            if view is not None:
                part = view.of(model.get_parameter(view.name))
                part.copy_(part.double() - part.double().mean(axis, keepdim=True))
    drop_ties(model, manifest["untied"])
