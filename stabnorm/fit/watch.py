"""Run a model on a loader's batches, and record inputs and outputs of its norms.

The original and the converted model run on the same batch, one after the other, and are compared norm by norm. Both are
in eval mode, because the model is used in eval mode later.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._checks import check_function
from stabnorm._models.batches import Forward, moved, run_batch
from stabnorm._models.devices import device_of
from stabnorm._models.fast_path import without_fused_layers
from stabnorm._models.hooks import hooked
from stabnorm._models.masks import MaskOfBatch, check_mask, masks_of, valid_tokens
from stabnorm.errors import StabNormError
from stabnorm.fit.sums import Seen
from stabnorm.norms import NormLayer

MASK = "attention_mask"  # the name that every tokenizer uses


class Runner:
    """Runs a model on a batch, on the model's device and with the padding known to every norm.

    Args:
        forward: ``forward(model, batch)``. Default: a tensor is the model's input, a tuple or list is
            ``(input, targets, ...)``, a mapping holds keyword arguments.
        mask: which tokens are valid: a key, an attribute or an index of the batch, or a function of it.
            Default: "attention_mask" where the batch is a mapping that has it.
    """

    def __init__(self, forward: Forward | None = None, mask: MaskOfBatch = None) -> None:
        if forward is not None:
            check_function("forward", forward, "model", "batch")
        check_mask(mask)
        self.forward, self.mask = forward or run_batch, mask

    @contextmanager
    def prepared(self, model: nn.Module, batch: Any) -> Iterator[Any]:
        """Move the batch to the model's device; while the context is open, every norm knows its padding."""
        batch = moved(batch, device_of(model))
        known = self.mask if self.mask is not None or not isinstance(batch, Mapping) else MASK
        masks = masks_of(batch, known) if self.mask is not None or _holds(batch, known) else ()
        with valid_tokens(*masks), without_fused_layers(), torch.compiler.set_stance("force_eager"):
            yield batch

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's output on the batch."""
        with self.prepared(model, batch) as prepared:
            return self.forward(model, prepared)


def _holds(batch: Any, key: Any) -> bool:
    return isinstance(batch, Mapping) and key in batch


class _Enough(BaseException):
    """Raised when every watched norm has been called, to leave the rest of the forward out.

    It is no Exception, so that a model's own ``except Exception`` does not catch it.
    """


@contextmanager
def watched(layers: Iterable[NormLayer], enough: int | None = None) -> Iterator[dict[str, list[Seen]]]:
    """Record inputs and outputs of these norms, call by call, while the context is open.

    Args:
        layers: the norms; hooks are put on their modules.
        enough: the number of calls after which the forward is left by raising `_Enough`, which `seen_in` catches.
            Default: it is never left.
    """
    seen: dict[str, list[Seen]] = {}
    calls = itertools.count(1)

    def hook_of(layer: NormLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = layer.input_of(args, kwargs)
            valid = layer.valid(x)
            # Copies, because the model may change both in place later; a residual stream often is.
            read, written = (layer.rows(t.clone()) for t in (x, output))
            seen.setdefault(layer.name, []).append(Seen(read, written, None if valid is None else valid.reshape(-1)))
            if next(calls) == enough:
                raise _Enough

        return hook

    with hooked(layer.module.register_forward_hook(hook_of(layer), with_kwargs=True) for layer in layers):
        yield seen


@contextmanager
def drawn_towards(wanted: Mapping[str, Sequence[Seen]], layers: Iterable[NormLayer], share: float) -> Iterator[None]:
    """Replace the output y of these norms by ``y + share (y' - y)``, with y' from another model, while it is open.

    Gradients go through y only. Open this context inside `watched`, which then records y itself.

    Args:
        wanted: the calls of the norms of these names in the other model.
        layers: the norms; hooks are put on their modules.
        share: between 0, which changes nothing, and 1.
    """

    def hook_of(layer: NormLayer, calls: Iterator[Seen]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            call = next(calls, None)
            if call is None:
                raise StabNormError(
                    f"{layer.name} runs more often than in the original: the two models do not run alike on one batch"
                )
            original = layer.from_rows(call.written, output.shape)
            return torch.lerp(output, original.to(output.dtype), share)

        return hook

    with hooked(
        layer.module.register_forward_hook(hook_of(layer, iter(wanted[layer.name])))
        for layer in layers
        if share and layer.name in wanted
    ):
        yield


def seen_in(
    model: nn.Module, layers: Sequence[NormLayer], batch: Any, run: Runner, enough: int | None = None
) -> dict[str, list[Seen]]:
    """Run the model on a batch, without gradients, and return inputs and outputs of these norms.

    Args:
        model: the model that holds the norms.
        layers: the norms.
        batch: one of the loader's batches.
        run: how the model is run.
        enough: the number of calls after which the forward is left. Default: it runs to the end.
    """
    with torch.no_grad(), watched(layers, enough) as seen, suppress(_Enough):
        run(model, batch)
    return seen
