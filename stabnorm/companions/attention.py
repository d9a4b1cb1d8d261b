"""`AttentionCompanion`: measure how concentrated each attention head is, and how large its logits are.

Attention collapses before a run diverges: logits grow, the softmax saturates, and its entropy falls to zero. Fused
attention never writes its logits anywhere, so they are computed again here, from the very queries and keys that the
model passes on, for some queries of each sequence. How these are seen: `stabnorm.companions._attention_calls`.
"""

import itertools
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
from stabnorm.companions.companion import Companion, HookedWatch, Place, selected, wide
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
        heads: how many heads every attention has. Default: the module's own num_heads, num_attention_heads, n_heads,
            n_head, nhead or heads, or its config's; where there is none, the heads of the queries ``[batch, heads,
            tokens, width]`` that its first forward hands to `scaled_dot_product_attention`.
        include: a regular expression, or a list of them, that a module's name must match. Default: all.
        exclude: the same for modules to leave out. Default: none.

    Raises:
        ValueError: `queries` or `heads` below 1; from `watch`: no attention found.

    An attention that does not say how many heads it has gets its rows at the end of the step of its first forward, and
    is NaN in the steps before. A compiled graph is traced again once then, and that step is NaN, too: nothing may be
    allocated in a graph. A warning names an attention whose queries do not show the heads either.

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
            advice="its attention has collapsed to one key per query: look at its largest logit, apply "
            "stabnorm.remedies.sigma_reparametrize, or lower the learning rate",
        ),
        Statistic(
            "attention_logit_max", formula="max |q k| scale over the visible keys", unit="logit",
            source="arXiv 2309.14322: above 1e4 all runs diverged; QK-Clip, arXiv 2507.20534: bound 100",
            compute=lambda sums, _: torch.where(sums.queries > 0, sums.logit, torch.nan), threshold=100.0, alarm=1e4,
            # Below 1 the weights of all keys are alike. A head that begins to look at certain keys passes 4.
            floor=0.15, negligible=1.0, harmless=4.0, drifts=True,
            advice="its attention logits grow, and its softmax saturates: apply "
            "stabnorm.remedies.sigma_reparametrize, or lower the learning rate",
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
        attentions = [(plain_name(name), module) for name, module in find_attentions(model)]
        wanted = selected([name for name, _ in attentions], self.include, self.exclude)
        chosen = [pair for pair, yes in zip(attentions, wanted, strict=True) if yes]
        if not chosen:
            of_these = f" under include={self.include!r}, exclude={self.exclude!r}" if attentions else ""
            raise ValueError(
                f"no attention found in {type(model).__name__}{of_these}: a module counts that is an "
                f"nn.MultiheadAttention, calls {_FUNCTION}, or has Attention in its class's name and says how many "
                "heads it has. Leave the companion 'attention' out for this model"
            )
        said = [(name, module, self.heads or said_heads(module)) for name, module in chosen]
        return AttentionWatch(model, said, self)


class AttentionWatch(HookedWatch[AttentionSums]):
    """Hooks on the attentions of a model; see `AttentionCompanion`."""

    def __init__(
        self, model: nn.Module, attentions: Sequence[tuple[str, nn.Module, int | None]], settings: AttentionCompanion
    ) -> None:
        super().__init__(AttentionSums, ())
        self.model, self.queries = model, settings.queries
        self._attentions = [(name, module) for name, module, _ in attentions]
        self._heads: list[int | None] = []
        self._viewers: list[_Attention] = []
        self._lay_out([heads for _, _, heads in attentions])

    def attach(self) -> None:
        """Register two hooks on each attention, and replace the functions that they call."""
        calls.attach(self, {kind for _, module in self._attentions for kind in type(module).__mro__})
        for (name, module), heads, rows in zip(self._attentions, self._heads, self._slices(), strict=True):
            place = _Attention(self, name, module, heads, rows)
            self._places.append(place)
            self._viewers.append(place)
            self._handles.append(Watching(module, Watcher(_Enter(place), _Leave(place), at_error=True)))
        self.discard()

    def detach(self) -> None:
        """Remove the hooks, and restore the functions."""
        calls.detach(self)
        self._viewers.clear()
        super().detach()

    def discard(self) -> None:
        """Set the sums to zero; the heads that a forward has shown stay known."""
        self._lay_out_shown()
        super().discard()

    def take(self) -> AttentionSums:
        """Give an attention whose heads were seen for the first time its rows, and merge the sums of all devices."""
        self._lay_out_shown()
        return super().take()

    def expect(self, rows: Sequence[str]) -> None:
        """Take the heads that are not known yet from the rows of a saved run."""
        known = set(rows)
        heads = [
            said or next(i for i in itertools.count() if _row(name, i) not in known) or None
            for said, (name, _) in zip(self._heads, self._attentions, strict=True)
        ]
        for viewer, number in zip(self._viewers, heads, strict=False):  # no viewers while the hooks are off
            if viewer.heads is None and number is not None:
                viewer.begin(number, viewer.into.queries.device)
        self._lay_out(heads)

    def _lay_out_shown(self) -> None:
        if self._viewers:
            self._lay_out([viewer.heads for viewer in self._viewers])

    def _lay_out(self, heads: Sequence[int | None]) -> None:
        """Give all attentions with known heads their rows, in the order of the model, and keep their sums."""
        if list(heads) == self._heads:
            return
        self._heads = list(heads)
        counted = zip(self._attentions, self._heads, strict=True)
        self.rows = tuple(_row(name, i) for (name, _), number in counted for i in range(number or 0))
        self._sums.clear()
        for viewer, rows in zip(self._viewers, self._slices(), strict=False):
            viewer.move_to_rows(rows)

    def _slices(self) -> Iterator[slice]:
        ends = list(itertools.accumulate((number or 0 for number in self._heads), initial=0))
        return itertools.starmap(slice, itertools.pairwise(ends))

    def complaint(self, values: Tensor) -> str | None:
        """Name the modules whose attention was not seen, and those whose heads are not known."""
        sentences = []
        names = self.without(values, 0)
        if names:
            modules = list(dict.fromkeys(name.rpartition("head")[0].rstrip(".") or "the model" for name in names))
            sentences.append(
                f"no attention was seen in {', '.join(modules)}. Did it run in training mode? Only what calls "
                f"torch.nn.functional.{_FUNCTION} or softmax is seen; and if the model was compiled and run before the "
                "monitor was attached, call torch.compiler.reset() after attaching. If all its logits were NaN, look "
                "at the first alert"
            )
        unknown = [
            f"{printable(name) or 'the model'} ({type(module).__name__})"
            for (name, module), number in zip(self._attentions, self._heads, strict=True)
            if number is None
        ]
        if unknown:
            sentences.append(
                f"cannot tell how many heads these attentions have, so they are not watched: {', '.join(unknown)}. "
                f"They have no attribute {', '.join(_HEADS)}, and no forward in training mode has handed queries "
                f"[batch, heads, tokens, width] to {_FUNCTION}. Set num_heads on the module, or give "
                "AttentionCompanion(heads=...), or leave them out with exclude="
            )
        return ". ".join(sentences) or None


class _Attention(Place[AttentionSums]):
    """A watched attention, whose calls are added to its rows."""

    def __init__(self, watch: AttentionWatch, name: str, module: nn.Module, heads: int | None, rows: slice) -> None:
        super().__init__(watch, module, rows, watch.model)
        self.watch, self.name, self.module = watch, name, module
        self.heads = heads  # None until a forward shows them
        self.multi_head = isinstance(module, nn.MultiheadAttention)
        self.refused = False

    def begin(self, heads: int, device: torch.device) -> None:
        """Add to sums of its own until the watch gives these heads their rows."""
        self.heads = heads
        with torch.inference_mode(False):  # a later forward of the step may train
            shape = (len(AttentionSums._fields), heads)
            self.into = AttentionSums(*torch.zeros(shape, dtype=wide(device), device=device))

    def move_to_rows(self, rows: slice) -> None:
        """Take these rows of the watch, and carry over what was gathered."""
        gathered, self._rows = self.into, rows
        self.move(gathered.queries.device)
        if gathered.queries.shape == self.into.queries.shape:  # a graph shows heads, but gathers nothing of them
            self.into.add_(gathered)

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
        if self._understood(query, attn_mask) and self._ready(query):
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

    def _ready(self, query: Tensor) -> bool:
        """Learn the heads from the first queries, and say whether there are sums to add to."""
        if self.heads is None and torch.compiler.is_compiling():
            self.heads = int(query.shape[-3])  # nothing more: a graph allocates no sums that outlive it
        elif self.heads is None:
            self.begin(query.shape[-3], query.device)
        return self.into.queries.shape[0] == self.heads

    def _add(self, op: Any, x: Tensor, *args: Any) -> None:
        if self.into.queries.device != x.device:
            if self._rows.stop - self._rows.start == self.heads:
                self.move(x.device)
            else:  # it has no rows yet
                self.into = AttentionSums(*(part.to(x.device) for part in self.into))
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
        elif self.heads is None and x.ndim != 4:
            why_not = (
                f"it has no attribute {_HEADS[0]}, and its queries {tuple(x.shape)} are not [batch, heads, tokens, "
                "width], so its heads are unknown: AttentionCompanion(heads=...)"
            )
        elif self.heads is not None and (x.ndim < 3 or x.shape[-3] != self.heads):
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


def _row(attention: str, head: int) -> str:
    return f"{attention}.head{head}" if attention else f"head{head}"


def find_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are attentions by what they call, or by name if they say how many heads they have."""
    by_name: list[tuple[str, nn.Module]] = []
    sure: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or _calls(type(module)):
            sure.add(id(module))
            by_name.append((name, module))
        elif _looks_like_attention(module) and said_heads(module) is not None:
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


def said_heads(module: nn.Module) -> int | None:
    """Return how many heads an attention, or its config, says that it has; None where they say nothing."""
    for owner in (module, getattr(module, "config", None)):
        for name in _HEADS:
            heads = getattr(owner, name, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
                return heads
    return None
