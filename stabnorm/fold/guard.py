"""`guard_folds`: reports inputs beyond the calibration data, because after a fold nothing normalises them."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stabnorm._checks import (
    check_choice,
    check_function,
    check_has_numbers,
    check_loader,
    check_model,
    check_number,
)
from stabnorm._models.batches import Forward, moved, run_batch
from stabnorm._models.calls import tensor_input_of
from stabnorm._models.devices import device_of
from stabnorm._models.fast_path import without_fused_layers
from stabnorm._models.hooks import take_off
from stabnorm.errors import StabNormError
from stabnorm.fold.folded import FoldedNorm, FrozenAffine

Action = Literal["warn", "raise"]


class FoldGuard:
    """Watches the inputs of a model's folded norms; made by `guard_folds`.

    Args:
        model: with `FoldedNorm` or `FrozenAffine` in it.
        guard: "warn" or "raise".
        margin: how many times a bound may be exceeded.

    Raises:
        TypeError: an argument has another type.
        ValueError: the model has neither, `guard` is unknown, or `margin` is not above 0.
    """

    @torch.inference_mode(False)  # its tensors change in forwards outside of that mode
    def __init__(self, model: nn.Module, guard: Action, margin: float) -> None:
        check_model("model", model)
        check_has_numbers(model, "to guard")
        check_choice("guard", guard, get_args(Action))
        check_number("margin", margin, above=0)
        sites = {n: m for n, m in model.named_modules() if isinstance(m, FoldedNorm | FrozenAffine)}
        if not sites:
            raise ValueError("the model has no folded norm to guard. Pass fold_norms(...).model")
        self.guard, self.margin = guard, margin
        self._names = list(sites)
        self._bounds = torch.zeros(len(sites), dtype=torch.float32, device="cpu")
        self._largest = torch.zeros_like(self._bounds)  # in this forward, or over the calibration data
        self._unjudged: Tensor | None = None  # the largest values of a forward, on their way to the host
        self._copied: torch.cuda.Event | None = None
        self._calibrating = True
        self._handles = [
            m.register_forward_pre_hook(self._reading(i), with_kwargs=True) for i, m in enumerate(sites.values())
        ]
        self._handles.append(model.register_forward_pre_hook(self._before))
        self._handles.append(model.register_forward_hook(self._after))

    @property
    def bounds(self) -> dict[str, float]:
        """The largest absolute value that each folded norm read on the calibration data."""
        return dict(zip(self._names, self._bounds.tolist(), strict=True))

    def remove(self) -> None:
        """Take the hooks off. Do so before exporting or compiling the model."""
        take_off(self._handles)
        self._judge()

    def __enter__(self) -> "FoldGuard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _reading(self, index: int) -> Any:
        @torch.inference_mode(False)  # the next forward may run in another mode
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = tensor_input_of(args, kwargs).detach()
            if not x.numel():
                return
            largest = x.abs().amax().float()  # NaN stays NaN
            self._largest = self._largest.to(largest.device)
            self._largest[index] = torch.maximum(self._largest[index], largest)

        return hook

    def _before(self, module: nn.Module, args: Any) -> None:
        if not self._calibrating:
            self._largest.zero_()

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._calibrating:
            return
        self._judge()  # the forward before: its copy has long arrived
        self._unjudged = self._largest.to("cpu", non_blocking=True)
        if self._largest.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._judge()

    def _judge(self) -> None:
        largest, self._unjudged = self._unjudged, None
        if largest is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        ratio = largest / self._bounds.clamp(min=torch.finfo(torch.float32).tiny)
        outside = (~(ratio <= self.margin)).nonzero().flatten().tolist()
        if not outside:
            return
        worst = max(outside, key=lambda index: float(ratio[index].nan_to_num(torch.inf)))
        text = (
            f"{len(outside)} of {len(self._names)} folded norms read values beyond {self.margin:g} times those of the "
            f"calibration data: '{self._names[worst]}' read {float(largest[worst]):.3g}, and its bound is "
            f"{float(self._bounds[worst]):.3g}. Nothing normalises them any more: distrust this output"
        )
        if self.guard == "raise":
            raise StabNormError(text)
        warnings.warn(text, stacklevel=2)

    def _calibrated(self) -> None:
        self._bounds = self._largest.cpu().clone()
        self._calibrating = False
        unseen = [name for name, bound in self.bounds.items() if not 0 < bound < float("inf")]
        if unseen:
            self.remove()
            raise ValueError(
                f"the calibration data of the loader give no finite bound for '{unseen[0]}' and {len(unseen) - 1} "
                "more. Pass inputs that reach every folded norm, and no NaN"
            )


def guard_folds(
    model: nn.Module,
    loader: Iterable[Any],
    guard: Action = "warn",
    *,
    margin: float = 2.0,
    forward: Forward | None = None,
) -> FoldGuard:
    """Report inputs on which a folded model leaves what it was calibrated on.

    LayerNorm divides an extreme token by its own size. A folded model does not, and its output may be anything: a GPT-2
    XL without norms (arXiv:2507.02559) reached a loss of 130 on raw text, where the median was 1.1. The largest
    absolute value that each folded norm reads on the calibration data becomes its bound. A forward that exceeds a bound
    is reported; on a GPU the report comes with the next forward or with `remove()`, so that no forward waits for the
    device.

    Args:
        model: folded, in eval mode.
        loader: a DataLoader or an iterable of batches of calibration data. A tensor is the model's input, a tuple or
            list is ``(input, targets, ...)``, a mapping holds keyword arguments.
        guard: "warn": a UserWarning; "raise": a StabNormError. Default: "warn".
        margin: how many times the bound may be exceeded. Default: 2.
        forward: how a batch is run, ``forward(model, batch)``, with the batch on the model's device. Default: as the
            format of `loader` says.

    Returns:
        A handle with `bounds` and `remove()`. It is also a context manager.

    Raises:
        TypeError: an argument has another type.
        ValueError: `guard` is unknown, `margin` is not above 0, the model has no folded norm, or the data give no
            finite bound for one.
        StabNormError: with guard="raise", in a forward, when a bound is exceeded.

    >>> from stabnorm import fold_norms
    >>> from stabnorm.nn import RepBN
    >>> folded = fold_norms(nn.Sequential(RepBN(4), nn.Linear(4, 2)).eval(), torch.randn(8, 4)).model
    >>> with guard_folds(folded, [torch.ones(8, 4)], "raise"):
    ...     folded(torch.full((1, 4), 50.0))
    Traceback (most recent call last):
    stabnorm.errors.StabNormError: 1 of 1 folded norms read values beyond 2 times those of the calibration data...
    """
    check_loader("loader", loader)
    if forward is not None:
        check_function("forward", forward, "model", "batch")
    handle = FoldGuard(model, guard, margin)
    try:
        with torch.inference_mode(False), torch.no_grad(), without_fused_layers():
            for batch in loader:
                (forward or run_batch)(model, moved(batch, device_of(model)))
    except BaseException:
        handle.remove()
        raise
    handle._calibrated()
    return handle
