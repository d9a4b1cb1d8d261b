"""Where the queries and keys of each attention head are in the weights of a model."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from stabnorm.companions.attention import find_attentions, said_heads
from stabnorm.errors import StabNormError
from stabnorm.nn.mixed_in import mixins_of
from stabnorm.remedies._weights import Weight, weight_of

_QUERIES = ("q_proj", "query", "to_q", "wq", "q_lin", "q", "query_proj")
_KEYS = ("k_proj", "key", "to_k", "wk", "k_lin", "k", "key_proj")


class Projection(NamedTuple):
    """The rows of a weight that give the queries or the keys of an attention.

    Attributes:
        weight: the weight that they are a part of.
        start: the first of the rows.
        width: how many rows.
        heads: how many heads they are.
    """

    weight: Weight
    start: int
    width: int
    heads: int


class Attention(NamedTuple):
    """One attention: its queries and its keys, which may be of fewer heads."""

    name: str
    module: nn.Module
    queries: Projection
    keys: Projection


def attentions_of(model: nn.Module) -> tuple[list[Attention], dict[str, str]]:
    """Return the attentions whose projections were found, and by name why the others were not."""
    known: list[Attention] = []
    unknown: dict[str, str] = {}
    for name, module in find_attentions(model):
        try:
            known.append(_attention(name, module))
        except StabNormError as error:
            unknown[name] = str(error)
    return known, unknown


def _attention(name: str, module: nn.Module) -> Attention:
    heads = said_heads(module)
    if heads is None:
        raise StabNormError("it does not say how many heads it has: set num_heads on the module")
    weights = dict(_weights_in(name, module))
    own = weights.get("")
    fused = own if own is not None else next((w for w in weights.values() if w.parts == 3), None)
    if fused is not None:
        if fused.module._parameters.get(fused.attribute) is None or fused.parts != 3:
            raise StabNormError("its queries, keys and values have weights of other sizes")
        width = _rows(fused) // 3
        parts = (Projection(fused, 0, width, heads), Projection(fused, width, width, heads))
    else:
        query, key = (next((weights[n] for n in names if n in weights), None) for names in (_QUERIES, _KEYS))
        if query is None or key is None:
            raise StabNormError(f"it has no linear layers named as {_QUERIES[0]} and {_KEYS[0]} are, and no qkv")
        size = _rows(query) // heads
        if size == 0 or _rows(query) % heads or _rows(key) % size:
            raise StabNormError(f"{heads} heads do not fit its {_rows(query)} queries and {_rows(key)} keys")
        parts = (
            Projection(query, 0, _rows(query), heads),
            Projection(key, 0, _rows(key), _rows(key) // size),
        )
    if parts[0].width % heads:
        raise StabNormError(f"{heads} heads do not fit its {parts[0].width} queries")
    return Attention(name, module, *parts)


def _weights_in(name: str, module: nn.Module) -> Iterator[tuple[str, Weight]]:
    for path, child in module.named_modules():
        weight = weight_of(f"{name}.{path}" if name and path else name or path, child)
        if weight is not None:
            yield path, weight


def _rows(weight: Weight) -> int:
    return weight.parameter.shape[1 if weight.transposed else 0]


def normalised_heads(attention: Attention) -> bool:
    """Whether its queries and keys are normalised, so that their scale does not count."""
    norms = ("q_norm", "k_norm", "query_norm", "q_layernorm", "norm_q")
    slots = (getattr(attention.module, name, None) for name in norms)
    projections = (attention.queries.weight.module, attention.keys.weight.module)
    return any(isinstance(slot, nn.Module) and not isinstance(slot, nn.Identity) for slot in slots) or any(
        mixin.__name__ == "NormedHeads" for module in projections for mixin in mixins_of(module)
    )
