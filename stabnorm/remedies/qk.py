"""`qk_norm` and `qk_clip`: bound the attention logits by a norm on queries and keys, or by shrinking their weights."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from stabnorm._checks import check_choice, check_number, nearest, wrong_type
from stabnorm._models.names import Patterns
from stabnorm.nn.added_norm import NormedHeads, NormKind, new_norm
from stabnorm.nn.mixed_in import ComputedWeights, mix_in
from stabnorm.remedies._heads import Attention, Projection, attentions_of, normalised_heads
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def qk_norm(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, *, norm: NormKind = "rms"
) -> RemedyReport:
    r"""Normalise queries and keys head by head, in place.

    .. math:: q \leftarrow \mathrm{norm}(q), \quad k \leftarrow \mathrm{norm}(k), \qquad
        |q \cdot k| / \sqrt{d} \le \sqrt{d}\, \max|g_q| \max|g_k|

    d is the width of a head. The logits stay bounded by the gains, whatever the weights do. The norms become children
    `head_norms` of the projections (q_proj and k_proj, or qkv), whose parameters keep their names. Rotary positions are
    applied after them, as in Qwen3 and OLMo 2.

    It changes the outputs: apply it to a model that is not trained yet, or train it on. `convert_norms` switches the
    norms, and `fold_norms` then folds them backward into the projections.

    Args:
        model: a model with attentions that say how many heads they have. `nn.MultiheadAttention` projects inside one
            function, so `sigma_reparametrize` is the remedy there.
        include: a regular expression, or several, searched for in an attention's name. Default: all attentions.
        exclude: the same, for attentions to leave alone; it wins over `include`. Default: none.
        norm: "rms" or "layer". Default: "rms".

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no attention, or `norm` is unknown.
        StabNormError: there is no attention to change, or the model is compiled, scripted or wrapped.

    Source: arXiv:2010.04245, Query-Key Normalization for Transformers; as a cure of growing logits 2309.14322.
    """
    check_choice("norm", norm, ("rms", "layer"))
    check_remedied(model)
    known, unknown = attentions_of(model)
    attentions = {attention.name: attention for attention in known}
    steps, left = [], {}
    for name in chosen("attentions", [*attentions, *unknown], include, exclude):
        attention = attentions.get(name)
        if attention is None:
            left[name] = unknown[name]
        elif isinstance(attention.module, nn.MultiheadAttention):
            left[name] = "nn.MultiheadAttention projects inside one function: use sigma_reparametrize"
        elif normalised_heads(attention):
            left[name] = "its queries and keys are normalised already"
        else:
            modules = tuple(
                {id(p.weight.module): p.weight.module for p in (attention.queries, attention.keys)}.values()
            )
            action = f"queries and keys of {attention.queries.heads} heads normalised ({norm})"
            steps.append(Step(name, action, partial(_normalise, attention, norm), modules))
    return carried_out("qk_norm", model, steps, left, "no")


def _normalise(attention: Attention, norm: NormKind) -> None:
    queries, keys = attention.queries, attention.keys
    if queries.weight.module is keys.weight.module:
        rest = queries.width  # the values
        sizes = ((queries.heads, queries.width, True), (keys.heads, keys.width, True), (1, rest, False))
        _add_norms(queries.weight.module, sizes, norm)
    else:
        for part in (queries, keys):
            _add_norms(part.weight.module, ((part.heads, part.width, True),), norm)


def _add_norms(module: nn.Module, sizes: tuple[tuple[int, int, bool], ...], norm: NormKind) -> None:
    norms = nn.ModuleList(new_norm(norm, width // heads, module) for heads, width, normed in sizes if normed)
    mix_in(NormedHeads, module)
    assert isinstance(module, NormedHeads)
    module.head_norms, module.head_sizes = norms, sizes


def qk_clip(model: nn.Module, logits: Mapping[str, float | Tensor], threshold: float = 100.0) -> RemedyReport:
    r"""Shrink the queries and keys of heads whose largest logit is above a threshold, in place (QK-Clip).

    .. math:: W_q \leftarrow \sqrt{\tau / s}\; W_q, \qquad W_k \leftarrow \sqrt{\tau / s}\; W_k \qquad
        \text{where } s > \tau

    s is the head's largest logit and :math:`\tau` the threshold. All logits of the head are multiplied by
    :math:`\tau / s`, and no other head changes. Biases are shrunk with the weights. Where several heads share their
    keys (grouped queries), the queries take the whole factor.

    Call it after an optimizer step with what the companion "attention" has measured. Only numbers change, so there is
    nothing to fold, and the optimizer's state stays as it is.

    Args:
        model: a model with attentions that say how many heads they have.
        logits: the largest logit of each head, by the names that the companion gives its rows, such as
            ``blocks.0.attn.head3``. Heads that are missing, not above the threshold or NaN do not change.
        threshold: the largest logit that is allowed. Default: 100.

    Returns:
        Which heads were shrunk, and by how much; none if no logit is above the threshold.

    Raises:
        TypeError: `logits` is no mapping.
        ValueError: a name is that of no head, or the threshold is not above 0.
        StabNormError: the queries and keys of a head to shrink are normalised or reparametrized, or shared.

    Source: arXiv:2507.20534, Kimi K2.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
    >>> print(qk_clip(layer, {"self_attn.head0": 400.0, "self_attn.head1": 20.0}))
    qk_clip: 1 changed; outputs are changed
      self_attn.head0  queries and keys multiplied by 0.5
    """
    check_number("threshold", threshold, above=0.0)
    if not isinstance(logits, Mapping):
        raise wrong_type("logits", logits, "a mapping from the names of heads to their largest logits")
    check_remedied(model)
    known, unknown = attentions_of(model)
    rows = {
        f"{attention.name}.head{head}".lstrip("."): (attention, head)
        for attention in known
        for head in range(attention.queries.heads)
    }
    steps, left = [], {}
    for name, logit in logits.items():
        if float(logit) > threshold and name in rows:
            attention, head = rows[name]
            why = _not_clippable(attention)
            if why:
                left[name] = why
                continue
            factor, shared = threshold / float(logit), attention.keys.heads != attention.queries.heads
            numbers = _tensors(attention.queries) + _tensors(attention.keys)
            what = "queries" if shared else "queries and keys"
            action = f"{what} multiplied by {factor if shared else factor**0.5:.4g}"
            steps.append(Step(name, action, partial(_shrink, attention, head, factor), (), numbers))
        elif name not in rows:
            why = unknown.get(name.rpartition(".head")[0])
            if why is None:
                raise ValueError(f"logits has {name!r}, which is no head of the model{nearest(name, rows)}")
            left[name] = why
    if not steps and not left:
        return RemedyReport("qk_clip", (), {}, "bits")
    return carried_out("qk_clip", model, steps, left, "no")


def _not_clippable(attention: Attention) -> str | None:
    if normalised_heads(attention):
        return "its queries and keys are normalised, so that their scale does not count: shrink the norms' gains"
    if any(isinstance(p.weight.module, ComputedWeights) for p in (attention.queries, attention.keys)):
        return "its weights are reparametrized: shrink their gains"
    return None


def _tensors(part: Projection) -> tuple[Tensor, ...]:
    bias = part.weight.module._parameters.get(_bias_name(part))
    return (part.weight.parameter,) if bias is None else (part.weight.parameter, bias)


def _bias_name(part: Projection) -> str:
    return part.weight.attribute.replace("weight", "bias")


@torch.no_grad()
def _shrink(attention: Attention, head: int, factor: float) -> None:
    shared = attention.keys.heads != attention.queries.heads
    for part in (attention.queries,) if shared else (attention.queries, attention.keys):
        size = part.width // part.heads
        rows = slice(part.start + head * size, part.start + (head + 1) * size)
        for tensor in _tensors(part):
            transposed = part.weight.transposed and tensor.ndim == 2
            (tensor[:, rows] if transposed else tensor[rows]).mul_(factor if shared else factor**0.5)
