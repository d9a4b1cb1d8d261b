"""`OutputCompanion`: measure whether the output logits drift away, the second divergence of arXiv 2309.14322."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stabnorm._checks import check_all, check_count, check_model, nearest
from stabnorm._log import logger
from stabnorm._models.hooks import Hook
from stabnorm._models.masks import mask_for
from stabnorm._models.watched import Watcher, Watching
from stabnorm._models.wrappers import plain_name, unwrapped
from stabnorm._registration import returns_nothing
from stabnorm.companions.companion import Companion, HookedWatch, Place, merged, sampled, wide
from stabnorm.ops.dispatch import op
from stabnorm.ops.moments import is_counted
from stabnorm.statistic import Statistic


class OutputSums(NamedTuple):
    """Sums over the logits of a step, ``[layers]`` each.

    Attributes:
        tokens: number of tokens.
        mean: sum over tokens of the mean over classes.
        log_z: sum of ln sum_j exp(logit_j).
        square: sum of its square.
        magnitude: the largest magnitude of a logit.
    """

    tokens: Tensor
    mean: Tensor
    log_z: Tensor
    square: Tensor
    magnitude: Tensor

    def merge(self, other: "OutputSums") -> "OutputSums":
        """Merge the sums of two micro-batches, devices or ranks: sums are added, and the larger magnitude is kept."""
        return merged(self, other, "magnitude")


def sums_of_logits(logits: Tensor, valid: Tensor | None = None, at_most: int | None = None) -> OutputSums:
    """Sum up logits ``[batch..., tokens, classes]``, or ``[tokens, classes]`` of which all tokens are used.

    Args:
        logits: logits of the output layer.
        valid: bool, which tokens count, of the logits' shape without classes.
        at_most: number of tokens of each sequence to use, evenly spaced. Default: all.
    """
    if logits.ndim > 2:
        positions = sampled(logits.shape[-2], at_most)
        logits = logits[..., positions, :]
        valid = None if valid is None else valid[..., positions]
    logits = logits.float()
    dtype = wide(logits.device)
    log_z = logits.logsumexp(-1)

    def total(values: Tensor) -> Tensor:
        return (values if valid is None else torch.where(valid, values, 0)).sum(dtype=dtype)

    magnitude = logits.abs().amax(-1)
    if valid is not None:
        magnitude = torch.where(valid, magnitude, 0)
    counted = total(torch.ones_like(log_z))
    return OutputSums(counted, total(logits.mean(-1)), total(log_z), total(log_z.square()), magnitude.amax().to(dtype))


@op(mutates=("sums",), fake=returns_nothing)
def accumulate_output_(logits: Tensor, valid: Tensor | None, at_most: int | None, sums: OutputSums) -> None:
    """Add logits to the sums, in place; a recomputed forward adds nothing."""
    if not is_counted() or logits.numel() == 0:
        return
    with torch.autocast(logits.device.type, enabled=False):
        after = sums.merge(sums_of_logits(logits, valid, at_most))
    for part, new in zip(sums, after, strict=True):
        part.copy_(new)


_LOG_Z = "z-loss of PaLM, arXiv 2204.02311; arXiv 2309.14322"


def _mean(total: Tensor, sums: OutputSums) -> Tensor:
    return torch.where(sums.tokens > 0, total / sums.tokens, torch.nan)


@dataclass(frozen=True)
class OutputCompanion(Companion):
    """Measures the growth of the output logits.

    Args:
        layer: name of the output layer, or a list of them. Default: what the model's `get_output_embeddings()` returns,
            else its last `nn.Linear`.
        tokens: number of tokens of each sequence to use, evenly spaced and with the last one; None uses all.
            Logits ``[tokens, classes]`` are looked at whole. Default: 16.

    Raises:
        ValueError: `tokens` below 1; from `watch`: no such layer.

    >>> import stabnorm
    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 10))
    >>> with stabnorm.StabilityMonitor(model, companions=["output"]) as monitor:
    ...     _ = model(torch.randn(3, 4))
    ...     monitor.step()
    >>> monitor.companions["output"].rows
    ('1',)
    """

    layer: str | Sequence[str] | None = None
    tokens: int | None = 16

    name: ClassVar[str] = "output"
    cost: ClassVar[str] = "four reads of the sampled logits"
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(
            "output_logit_mean", formula="mean over tokens and classes of the logits", unit="logit",
            source="arXiv 2309.14322", bad="falls without end", compute=lambda sums, _: _mean(sums.mean, sums),
        ),
        Statistic(
            "output_logit_max", formula="max |logit|", unit="logit", source="arXiv 2309.14322",
            bad="grows without end",
            compute=lambda sums, _: torch.where(sums.tokens > 0, sums.magnitude, torch.nan),
        ),
        Statistic(
            "output_log_z", formula="mean over tokens of ln Z, Z = sum_j exp(logit_j)", unit="nat", source=_LOG_Z,
            bad="its size grows", compute=lambda sums, _: _mean(sums.log_z, sums),
        ),
        Statistic(
            "output_z_loss", formula="mean over tokens of (ln Z)^2", unit="nat^2", source=_LOG_Z, bad="grows",
            compute=lambda sums, _: _mean(sums.square, sums),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.tokens is not None:
            check_count("tokens", self.tokens, hint=", or None for all")
        if self.layer is not None and not isinstance(self.layer, str):
            check_all("layer", self.layer, str, "a layer's name, or a list of names")
            if not self.layer:
                raise ValueError("layer=[] names no layer. Give at least one name, or leave it out")

    def watch(self, model: nn.Module) -> "OutputWatch":
        """Find the output layer."""
        check_model("model", model)
        model = unwrapped(model)
        modules = {plain_name(name): module for name, module in model.named_modules()}
        if self.layer is not None:
            names = [self.layer] if isinstance(self.layer, str) else list(self.layer)
            for name in names:
                if name not in modules:
                    hint = nearest(name, modules)
                    raise ValueError(
                        f"layer={name!r}: there is no such module in {type(model).__name__}. Give a name as in "
                        f"named_modules(){hint}"
                    )
        else:
            names = _last(model, modules)
        if not names:
            raise ValueError(
                f"no output layer found in {type(model).__name__}: it has no nn.Linear. Name it, as in "
                "OutputCompanion(layer='head'), or leave the companion 'output' out"
            )
        return OutputWatch(model, [(name, modules[name]) for name in names], self.tokens)


def _last(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    asked: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(asked, nn.Module):
        return [name for name, module in modules.items() if module is asked]
    return [name for name, module in modules.items() if isinstance(module, nn.Linear)][-1:]


class OutputWatch(HookedWatch[OutputSums]):
    """Hooks on output layers; see `OutputCompanion`."""

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, nn.Module]], tokens: int | None) -> None:
        super().__init__(OutputSums, [name for name, _ in layers])
        self.model, self.tokens = model, tokens
        self._layers = tuple(layers)

    def attach(self) -> None:
        """Register one hook on each layer."""
        for row, (name, module) in enumerate(self._layers):
            # Rows of one element, not of none: Dynamo takes a number that stands alone for one it might specialise on.
            place = Place(self, module, slice(row, row + 1), self.model)
            self._places.append(place)
            self._handles.append(Watching(module, Watcher(after=_OutputHook(self, place, name))))
        self.discard()

    def complaint(self, values: Tensor) -> str | None:
        """Name the layers that were not called."""
        names = self.without(values, 0)
        if not names:
            return None
        return (
            f"{', '.join(names)} did not run in training mode, or gave nothing but NaN. A loss that takes the layer's "
            "weight instead of calling it is not seen; another layer is named by OutputCompanion(layer=...)"
        )


class _OutputHook(Hook):
    """Forward hook of an output layer."""

    def __init__(self, watch: OutputWatch, place: Place[OutputSums], name: str) -> None:
        self.watch, self.place, self.name = watch, place, name
        self.refused = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.watch.counts(self.watch.model, module):
            return
        why_not = _not_understood(output)
        if why_not is not None:
            if not torch.compiler.is_compiling() and not self.refused:
                logger.warning("output layer %s is not counted: %s", self.name, why_not)
                self.refused = True
            return
        if self.place.into.tokens.device != output.device:
            self.place.move(output.device)
        valid = mask_for(output.shape[:-1], self.name)
        with torch.no_grad():
            arguments = (output.detach(), valid, self.watch.tokens, self.place.into)
            if torch.compiler.is_compiling():
                accumulate_output_(*arguments)
                return
            start = time.perf_counter()
            accumulate_output_(*arguments)
            self.watch.seconds += time.perf_counter() - start


def _not_understood(output: Any) -> str | None:
    if not isinstance(output, Tensor) or output.is_nested or not output.is_floating_point() or output.ndim < 1:
        return f"its output is a {type(output).__name__}, not a tensor of logits"
    if output.device.type == "meta":
        return "its output is on the meta device"
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "it runs inside a torch.func transform"
    return None
