"""What no example reached, and what of it could meet a norm's channels all the same.

A forward hands what it holds to any of its modules: to another expert, another adapter, another domain's norm. So a
module that did not run could read whatever the forward around it held. Where its place is certain it takes the same
change as its siblings; elsewhere those channels stay as they are.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from stabnorm._models.ambient import plain_context
from stabnorm.fold._readers import Linear, Slot, View, renamed, views_in
from stabnorm.fold._trace import Obstacle, Trace, Use
from stabnorm.norms.torch_own import torch_own

_UNNAMED = (nn.ModuleList, nn.ParameterList)  # two siblings must agree, because a list may also be a chain
_NAMED = (nn.ModuleDict, nn.ParameterDict)


@plain_context()
def note_unreached(
    model: nn.Module, trace: Trace, frames: Mapping[str, Sequence[Tensor]], tied: Mapping[str, str]
) -> None:
    """Let unreached siblings of readers read the same, and write down what the other unreached parts could read.

    Args:
        model: What was traced.
        trace: The records, which are added to.
        frames: The tags that the forward of each called module held.
        tied: For each parameter that had a second owner, that owner's name for it.
    """
    reached = _reached(model, trace)
    reached |= _used_by_another_name(model, reached, tied)
    for name in _topmost(model, reached, {site.name for site in trace.sites}, frames.keys()):
        held = _held(name, frames)
        held = held[_fits(model, trace, name)[held]]
        if not len(held):
            continue
        twins = _twins(model, trace, name, reached)
        if twins is None:
            text = f"'{name}' could read it, and no example reaches that: pass one that does, or remove '{name}'"
        else:
            for first, *_ in twins.values():
                _add(trace, first)
            container = f"{name.rpartition('.')[0]}."
            held = held[_comes_from(trace, container)[held]]
            text = f"'{name}' could take its place, and no example reaches that: pass one that does"
        if len(held):
            trace.unreached.append(Obstacle(held, text))
    for linears in _by_parameter(trace):
        _complete(model, trace, linears)


def _reached(model: nn.Module, trace: Trace) -> set[str]:
    """Names of the modules and parameters that something was computed with, and of what holds them."""
    called = {trace.sites[call.site].name for call in trace.calls}
    names = called | trace.buffers | {use.view.name for use in trace.uses}
    for name, module in model.named_modules():
        if any(name.startswith(f"{site}.") for site in called):
            names.add(name)  # a norm's own parts and parameters are not followed
            names.update(f"{name}.{each}" for each, _ in module.named_parameters(recurse=False))
    names |= {f"{site}.{each}" for site in called for each, _ in model.get_submodule(site).named_parameters()}
    return {name[:end] for name in names for end in (*_dots(name), len(name))}


def _used_by_another_name(model: nn.Module, reached: set[str], tied: Mapping[str, str]) -> set[str]:
    """Names of parameters and embeddings that no forward reads, because another owner of theirs is read instead."""
    used = {name for name, other in tied.items() if other in reached}
    return used | {
        name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and f"{name}.weight" in used
    }


def _fits(model: nn.Module, trace: Trace, name: str) -> Tensor:
    """Whether this part could read each tag, or write in its place: an axis of a tensor of its fits, or it has none."""
    owner, _, attribute = name.rpartition(".")
    part = getattr(model.get_submodule(owner), attribute)
    parameters = list(part.parameters()) if isinstance(part, nn.Module) else [part]
    tensors = [*parameters, *part.buffers()] if isinstance(part, nn.Module) else parameters
    sizes = {size for t in tensors for size in t.shape if size > 1}
    any_width = not sizes and (bool(parameters) or not tensors)  # one number, or a norm without weights
    fits = torch.ones(trace.next_tag, dtype=torch.bool)
    for site, first in zip(trace.sites, trace.first_tags, strict=True):
        channels = site.num_features
        fits[first : first + channels] = any_width or any(size % channels == 0 for size in sizes)
    return fits


def _dots(name: str) -> Iterator[int]:
    return (index for index, letter in enumerate(name) if letter == ".")


def _topmost(model: nn.Module, reached: set[str], sites: set[str], called: Collection[str]) -> list[str]:
    """List the largest parts that were not reached: those with numbers of their own, and norms without."""
    parts = []
    for name, module in model.named_modules():
        counts = any(True for _ in module.parameters()) or name in sites
        if name not in called:
            counts |= any(True for _ in module.buffers()) or torch_own(name, module) is not None
        if name and name not in reached and counts:
            parts.append(name)
        elif not name or name in reached:
            own = (f"{name}.{each}".lstrip(".") for each, _ in module.named_parameters(recurse=False))
            parts += [each for each in own if each not in reached]
    return [part for part in parts if not any(part[:end] in parts for end in _dots(part))]


def _held(name: str, frames: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Give the tags that the forward held which would run this part."""
    while name:
        name = name.rpartition(".")[0]
        if name in frames:
            break
    tags = frames.get(name, ())
    return torch.unique(torch.cat(list(tags))) if tags else torch.empty(0, dtype=torch.long)


def _comes_from(trace: Trace, prefix: str) -> Tensor:
    """Whether each tag belongs to a norm or a linear layer under this prefix."""
    under = torch.zeros(trace.next_tag, dtype=torch.bool)
    for site, first in zip(trace.sites, trace.first_tags, strict=True):
        under[first : first + site.num_features] = site.name.startswith(prefix)
    for linear in trace.linears:
        for first in filter(None, (linear.outputs, linear.biased)):
            under[first : first + linear.size[0] * linear.size[2]] = f"{linear.path}.".startswith(prefix)
    return under


# --- siblings in a list or a dictionary ---


def _twins(model: nn.Module, trace: Trace, name: str, reached: set[str]) -> dict[str, list[Linear]] | None:
    """Give the linear operations of the siblings that read norms, by their place; None where they disagree."""
    container, _, _ = name.rpartition(".")
    holder = model.get_submodule(container)
    if not isinstance(holder, (*_UNNAMED, *_NAMED)):
        return None
    form = _form(model, name)
    keys = [key for key, _ in (*holder.named_children(), *holder.named_parameters(recurse=False))]
    siblings = [f"{container}.{key}" for key in keys]
    siblings = [each for each in siblings if each in reached and _form(model, each) == form]
    if len(siblings) < (2 if isinstance(holder, _UNNAMED) else 1):
        return None
    twins: dict[str, list[Linear]] = {}
    for sibling in siblings:
        inner = _comes_from(trace, f"{sibling}.")
        for linear in trace.linears:
            weight = linear.weight.name
            if not (weight == sibling or weight.startswith(f"{sibling}.")):
                continue
            tags = torch.cat([read.tags.flatten() for read in linear.reads])
            tags = tags[tags > 0]
            if bool(inner[tags].all()):
                continue  # it reads nothing, or norms of the sibling's own, whose twins stay
            if len(linear.reads) > 1 or bool(inner[tags].any()):
                return None
            place = f"{weight[len(sibling) :]} {linear.weight.offset}"
            twins.setdefault(place, []).append(_moved(linear, sibling, name))
    agree = all(each.reads[0].same(same[0].reads[0]) for same in twins.values() for each in same)
    return twins if agree else None


def _form(model: nn.Module, name: str) -> list[tuple[object, ...]]:
    """What a part must have in common with another one to be its sibling: class, and parameters' sizes and strides."""
    owner, _, attribute = name.rpartition(".")
    part = getattr(model.get_submodule(owner), attribute)
    parameters = part.named_parameters() if isinstance(part, nn.Module) else [("", part)]
    return [(type(part),), *((each, p.shape, p.stride()) for each, p in parameters)]


def _moved(linear: Linear, old: str, new: str) -> Linear:
    """Give a linear operation as it would be in a sibling."""

    def rename(name: str) -> str:
        return new + name[len(old) :] if name == old or name.startswith(f"{old}.") else name

    return replace(
        linear,
        path=rename(linear.path),
        weight=replace(linear.weight, name=rename(linear.weight.name)),
        bias=renamed(linear.bias, rename),
        reads=list(linear.reads),
    )


def _add(trace: Trace, linear: Linear) -> None:
    count = linear.size[0] * linear.size[2]
    linear.outputs = trace.new_tags(count)
    linear.biased = linear.biased and trace.new_tags(count)
    trace.linears.append(linear)
    for view in (linear.weight, *views_in(linear.bias)):
        trace.uses.append(Use(view, len(trace.linears) - 1, f"{linear.op} in '{linear.path}'"))


# --- slices of one parameter ---


def _by_parameter(trace: Trace) -> list[list[Linear]]:
    """Group the linear operations that read norms by the parameter that their weights are slices of."""
    groups: dict[str, list[Linear]] = {}
    for linear in trace.linears:
        groups.setdefault(linear.weight.name, []).append(linear)
    return [each for each in groups.values() if any(bool((read.tags > 0).any()) for n in each for read in n.reads)]


def _complete(model: nn.Module, trace: Trace, linears: list[Linear]) -> None:
    """Let the slices of a parameter that no example reached read what the others read; else write an obstacle."""
    name = linears[0].weight.name
    parameter = model.get_parameter(name)
    if sum(torch.Size(linear.weight.size).numel() for linear in linears) >= parameter.numel():
        return
    seen = torch.zeros(parameter.untyped_storage().nbytes() // parameter.itemsize, dtype=torch.bool)
    flat = seen.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
    for linear in linears:
        linear.weight.of(flat).fill_(True)
    if bool(flat.all()):
        return
    missing = _slices(trace, linears, parameter) if len(linears) > 1 else None
    if missing is None:
        tags = torch.cat([read.tags.flatten() for linear in linears for read in linear.reads])
        text = f"a part of '{name}' could read it, and no example reaches that: pass one that does"
        trace.unreached.append(Obstacle(torch.unique(tags[tags > 0]), text))
        return
    for linear in missing:
        _add(trace, linear)


def _slices(trace: Trace, linears: list[Linear], parameter: Tensor) -> list[Linear] | None:
    """Give the linear operations of the slices along the first axis that did not run; None where it is not that."""
    first, step = linears[0], parameter.stride(0)
    at = []
    for linear in linears:
        index, rest = divmod(linear.weight.offset, step)
        same = linear.weight.size == first.weight.size and linear.weight.stride == first.weight.stride
        reads_same = len(linear.reads) == 1 and linear.reads[0].same(first.reads[0])
        if rest or not same or not reads_same or linear.problem or linear.weight.reach[1] >= (index + 1) * step:
            return None
        at.append(index)
    return [
        replace(
            first,
            weight=replace(first.weight, offset=index * step),
            bias=_shifted(first.bias, index - at[0], linears, at),
            reads=list(first.reads),
        )
        for index in range(len(parameter))
        if index not in at
    ]


def _shifted(bias: Slot, by: int, linears: Sequence[Linear], at: Sequence[int]) -> Slot:
    """Give the bias of another slice: as far from the first one's as two known ones are from each other."""
    second = linears[1].bias
    if not isinstance(bias, View) or not isinstance(second, View):
        return bias
    step = (second.offset - bias.offset) // (at[1] - at[0])
    return replace(bias, offset=bias.offset + by * step)
