"""`AttentionCompanion`: measure how concentrated each attention head is, and how large its logits are.

Attention collapses before a run diverges: logits grow, the softmax saturates, and its entropy falls to zero. Fused
attention never writes its logits anywhere, so they are computed again here, from the very queries and keys that the
model passes on, for some queries of each sequence. How these are seen: `stabnorm.companions._attention_calls`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stabnorm._checks import check_count, check_model
from stabnorm._log import logger, printable
from stabnorm._models.hooks import Hook
from stabnorm._models.masks import mask_for
from stabnorm._models.names import NameFilter
from stabnorm._models.watched import Watcher, Watching
from stabnorm._models.wrappers import plain_name, unwrapped
from stabnorm.companions import _attention_calls as calls
from stabnorm.companions._attention_sums import (
    AttentionSums,
    accumulate_attention_,
    accumulate_attention_logits_,
)
from stabnorm.companions.companion import Companion, HookedWatch, Place, selected
from stabnorm.statistic import Statistic

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_FUNCTION = "scaled_dot_product_attention"
_COLLAPSE = "entropy collapse, arXiv 2303.06296"


def _mean(total: Tensor, sums: AttentionSums) -> Tensor:
    return torch.where(sums.queries > 0, total / sums.queries, torch.nan)


@dataclass(frozen=True)
class AttentionCompanion(Companion):
    """Entropy and largest logit of every attention head.

    Watched are the modules that call `torch.nn.functional.scaled_dot_product_attention`, `nn.MultiheadAttention` in
    both of its ways, and attentions that write their logits out and call `torch.nn.functional.softmax`. FlexAttention,
    flash_attn and a softmax called as a method are not seen; a warning names such modules.

    Args:
        queries: number of queries of each sequence to use, evenly spaced and with the last one; None uses all.
            The largest logit is that of these queries. Default: 16.
        heads: how many heads an attention has, where it does not say so itself. Default: the module's own num_heads,
            num_attention_heads, n_heads, n_head, nhead or heads, or its config's.
        include: a regular expression, or a list of them, that a module's name must match. Default: all.
        exclude: the same for modules to leave out. Default: none.

    Raises:
        ValueError: `queries` or `heads` below 1; from `watch`: no attention found, or one with unknown heads.

    A key that a mask hides does not count. Queries count unless `stabnorm.valid_tokens` says that they are padding.

    >>> import stabnorm
    >>> model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> with stabnorm.StabilityMonitor(model, companions=[AttentionCompanion(queries=None)]) as monitor:
    ...     _ = model(torch.randn(3, 5, 8))
    ...     monitor.step()
    >>> monitor.companions["attention"].rows
    ('self_attn.head0', 'self_attn.head1')
    >>> monitor.companions["attention"].history()["attention_entropy_share"].shape
    torch.Size([1, 2])
    """

    queries: int | None = 16
    heads: int | None = None
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    name: ClassVar[str] = "attention"
    cost: ClassVar[str] = "q k^T of the sampled queries, and their softmax"
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(
            "attention_entropy", formula="mean over queries of -sum_j a_j ln a_j, a the attention weights", unit="nat",
            source=_COLLAPSE, bad="falls towards 0", compute=lambda sums, _: _mean(sums.entropy, sums),
        ),
        Statistic(
            "attention_entropy_share",
            formula="mean over queries of entropy / ln(number of visible keys): 1 even, 0 one key",
            source=_COLLAPSE + "; bound ours", compute=lambda sums, _: _mean(sums.entropy_share, sums), least=0.01,
            advice="its attention has collapsed to one key per query: look at its largest logit, and lower the "
            "learning rate",
        ),
        Statistic(
            "attention_logit_max", formula="max |q k| scale over the visible keys", unit="logit",
            source="arXiv 2309.14322: above 1e4 all runs diverged; QK-Clip, arXiv 2507.20534: bound 100",
            compute=lambda sums, _: torch.where(sums.queries > 0, sums.logit, torch.nan), threshold=100.0, alarm=1e4,
            advice="its attention logits grow, and its softmax saturates: normalise queries and keys, clip them, or "
            "lower the learning rate",
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        NameFilter(self.include, self.exclude)  # complain now
        for name in ("queries", "heads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), hint=", or None")

    def watch(self, model: nn.Module) -> "AttentionWatch":
        """Find the attention modules."""
        check_model("model", model)
        model = unwrapped(model)
        attentions = [(plain_name(name), module) for name, module in _attentions(model)]
        wanted = selected([name for name, _ in attentions], self.include, self.exclude)
        chosen = [pair for pair, yes in zip(attentions, wanted, strict=True) if yes]
        if not chosen:
            of_these = f" under include={self.include!r}, exclude={self.exclude!r}" if attentions else ""
            raise ValueError(
                f"no attention found in {type(model).__name__}{of_these}: a module counts that is an "
                f"nn.MultiheadAttention, calls {_FUNCTION}, or has Attention in its class's name and says how many "
                "heads it has. Leave the companion 'attention' out for this model"
            )
        return AttentionWatch(model, [(name, module, self._heads_of(name, module)) for name, module in chosen], self)

    def _heads_of(self, name: str, module: nn.Module) -> int:
        heads = self.heads or _said_heads(module)
        if heads is None:
            raise ValueError(
                f"cannot tell how many heads {printable(name) or 'the model'} ({type(module).__name__}) has: it has no "
                f"attribute {', '.join(_HEADS)}. Say it with AttentionCompanion(heads=...), or exclude it with exclude="
            )
        return heads


class AttentionWatch(HookedWatch[AttentionSums]):
    """Hooks on the attentions of a model; see `AttentionCompanion`."""

    def __init__(
        self, model: nn.Module, attentions: Sequence[tuple[str, nn.Module, int]], settings: AttentionCompanion
    ) -> None:
        rows = [f"{name}.head{i}" if name else f"head{i}" for name, _, n in attentions for i in range(n)]
        super().__init__(AttentionSums, rows)
        self.model, self.queries = model, settings.queries
        self._attentions = tuple(attentions)

    def attach(self) -> None:
        """Register two hooks on each attention, and replace the functions that they call."""
        calls.attach(self, {kind for _, module, _ in self._attentions for kind in type(module).__mro__})
        first = 0
        for name, module, heads in self._attentions:
            place = _Attention(self, name, module, slice(first, first + heads))
            first += heads
            self._places.append(place)
            self._handles.append(Watching(module, Watcher(_Enter(place), _Leave(place), at_error=True)))
        self.discard()

    def detach(self) -> None:
        """Remove the hooks, and restore the functions."""
        calls.detach(self)
        super().detach()

    def complaint(self, values: Tensor) -> str | None:
        """Name the modules whose attention was not seen."""
        names = self.without(values, 0)
        if not names:
            return None
        modules = list(dict.fromkeys(name.rpartition("head")[0].rstrip(".") or "the model" for name in names))
        return (
            f"no attention was seen in {', '.join(modules)}. Did it run in training mode? Only what calls "
            f"torch.nn.functional.{_FUNCTION} or softmax is seen; and if the model was compiled and run before the "
            "monitor was attached, call torch.compiler.reset() after attaching"
        )


class _Attention(Place[AttentionSums]):
    """A watched attention, whose calls are added to its rows."""

    def __init__(self, watch: AttentionWatch, name: str, module: nn.Module, rows: slice) -> None:
        super().__init__(watch, module, rows, watch.model)
        self.watch, self.name, self.module = watch, name, module
        self.heads = rows.stop - rows.start
        self.multi_head = isinstance(module, nn.MultiheadAttention)
        self.refused = False

    def see_call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Add a call of `scaled_dot_product_attention`."""
        if self.heads == 1 and isinstance(query, Tensor) and query.ndim == 3:  # [batch, tokens, features]
            query, key = query.unsqueeze(-3), key.unsqueeze(-3)
            if attn_mask is not None and attn_mask.ndim == 3:
                attn_mask = attn_mask.unsqueeze(-3)
        if self._understood(query, attn_mask):
            self._add(
                accumulate_attention_, query, query.detach(), key.detach(),
                None if attn_mask is None else attn_mask.detach(), self._valid(query), scale, is_causal, enable_gqa,
            )  # fmt: skip

    def see_softmax(
        self, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> None:
        """Add the logits of an attention that computes them itself; ignore a softmax over anything else."""
        if dim is None or dim % input.ndim != input.ndim - 1:
            return
        if self.multi_head and input.ndim == 3:  # [batch x heads, queries, keys]
            input = input.unflatten(0, (-1, self.heads))
        if input.ndim >= 4 and input.shape[-3] == self.heads and self._understood(input, None):
            self._add(accumulate_attention_logits_, input, input.detach(), self._valid(input))

    def _add(self, op: Any, x: Tensor, *args: Any) -> None:
        if self.into.queries.device != x.device:
            self.move(x.device)
        with torch.no_grad():
            if torch.compiler.is_compiling():
                op(*args, self.watch.queries, self.into)
                return
            start = time.perf_counter()
            op(*args, self.watch.queries, self.into)
            self.watch.seconds += time.perf_counter() - start

    def _valid(self, x: Tensor) -> Tensor | None:
        return mask_for(x.shape[:-3] + x.shape[-2:-1], self.name)

    def _understood(self, x: Any, mask: Any) -> bool:
        why_not = None
        if not isinstance(x, Tensor) or x.is_nested or x.device.type == "meta":
            why_not = "its queries are nested or on the meta device"
        elif x.ndim < 3 or x.shape[-3] != self.heads:
            heads = x.shape[-3] if x.ndim > 2 else "no"
            why_not = f"its queries have {heads} heads where {self.heads} were expected: AttentionCompanion(heads=...)"
        elif mask is not None and type(mask) is not Tensor and not isinstance(mask, nn.Parameter):
            why_not = f"its mask is a {type(mask).__name__}"
        elif not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
            why_not = "it runs inside a torch.func transform"
        if why_not is not None and not torch.compiler.is_compiling() and not self.refused:
            logger.warning("attention %s is not counted: %s", self.name, why_not)
            self.refused = True
        return why_not is None


class _Enter(Hook):
    """Forward pre-hook of an attention."""

    def __init__(self, place: _Attention) -> None:
        self.place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.place.watch.counts(self.place.watch.model, module):
            calls.enter(self.place)


class _Leave(Hook):
    """Forward hook of an attention, which also runs after an exception."""

    def __init__(self, place: _Attention) -> None:
        self.place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.leave(self.place)


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are attentions by what they call, or by name if they say how many heads they have."""
    by_name: list[tuple[str, nn.Module]] = []
    sure: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or _calls(type(module)):
            sure.add(id(module))
            by_name.append((name, module))
        elif _looks_like_attention(module) and _said_heads(module) is not None:
            by_name.append((name, module))
    ids = {id(module) for _, module in by_name}
    for name, module in by_name:
        inside = (id(child) in ids for child in module.modules() if child is not module)
        if id(module) in sure or not any(inside):  # what only holds an attention is none
            yield name, module


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _calls(kind: type) -> bool:
    """Whether a method of the class, or of one it derives from, names the function."""
    methods = (
        method for base in kind.__mro__ if not base.__module__.startswith("torch.nn.") for method in vars(base).values()
    )
    return any(_names(code) for method in methods if isinstance(code := getattr(method, "__code__", None), CodeType))


def _names(code: CodeType) -> bool:
    return _FUNCTION in code.co_names or any(_names(part) for part in code.co_consts if isinstance(part, CodeType))


def _said_heads(module: nn.Module) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in _HEADS:
            heads = getattr(owner, name, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
                return heads
    return None
