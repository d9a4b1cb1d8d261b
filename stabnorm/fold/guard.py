"""After a fold nothing normalises an extreme input any more: bounds from calibration data, and a report beyond them."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stabnorm._models.batches import Forward, moved, run_batch
from stabnorm._models.calls import tensor_input_of
from stabnorm._models.devices import device_of
from stabnorm._models.fast_path import without_fused_layers
from stabnorm._models.hooks import take_off
from stabnorm.errors import StabNormError
from stabnorm.fold.folded import FoldedNorm, FrozenAffine

Action = Literal["warn", "raise"]


class FoldGuard:
    """Watches what the folded norms of a model read; made by `guard_folds`.

    Args:
        model: with `FoldedNorm` or `FrozenAffine` in it.
        guard: "warn" or "raise".
        margin: how many times a bound may be exceeded.

    Raises:
        ValueError: there is none of these in it.
    """

    def __init__(self, model: nn.Module, guard: Action, margin: float) -> None:
        sites = {n: m for n, m in model.named_modules() if isinstance(m, FoldedNorm | FrozenAffine)}
        if not sites:
            raise ValueError("the model has no folded norm to guard. Pass fold_norms(...).model")
        self.guard, self.margin = guard, margin
        self._names = list(sites)
        self._bounds = torch.zeros(len(sites))
        self._largest = torch.zeros(len(sites))  # in this forward, or over the calibration data
        self._left: Tensor | None = None  # what a forward left to be judged
        self._copied: torch.cuda.Event | None = None
        self._calibrating = True
        self._handles = [
            m.register_forward_pre_hook(self._reading(i), with_kwargs=True) for i, m in enumerate(sites.values())
        ]
        self._handles.append(model.register_forward_pre_hook(self._before))
        self._handles.append(model.register_forward_hook(self._after))

    @property
    def bounds(self) -> dict[str, float]:
        """The largest absolute value that each site read on the calibration data."""
        return dict(zip(self._names, self._bounds.tolist(), strict=True))

    def remove(self) -> None:
        """Take the hooks off again; do so before exporting or compiling."""
        take_off(self._handles)
        self._judge()

    def __enter__(self) -> "FoldGuard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _reading(self, index: int) -> Any:
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
        self._judge()  # what the forward before left: its copy has long arrived
        self._left = self._largest.to("cpu", non_blocking=True)
        if self._largest.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._judge()

    def _judge(self) -> None:
        left, self._left = self._left, None
        if left is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        ratio = left / self._bounds.clamp(min=torch.finfo(torch.float32).tiny)
        outside = (~(ratio <= self.margin)).nonzero().flatten().tolist()
        if not outside:
            return
        worst = max(outside, key=lambda index: float(ratio[index].nan_to_num(torch.inf)))
        text = (
            f"{len(outside)} of {len(self._names)} folded norms read values beyond {self.margin:g} times those of the "
            f"calibration data, '{self._names[worst]}' {float(left[worst]):.3g}, not {float(self._bounds[worst]):.3g}. "
            "Nothing normalises them any more: distrust this output"
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
                f"the calibration data give no finite bound for '{unseen[0]}' and {len(unseen) - 1} more. Pass inputs "
                "that reach every folded norm, and no NaN"
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

    LayerNorm divides an extreme token by its own size; a folded model does not, and the output may be anything (a
    GPT-2 XL without norms, of those of arXiv:2507.02559, reached a loss of 130 on raw text, where it was 1.1 in the
    median). For each folded norm the largest absolute value it reads on the calibration data becomes a bound. A forward
    in which one is exceeded is reported, on a GPU with the next forward or `remove()`, so that nothing waits for the
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
        A handle: its `bounds`, `remove()`; also a context manager.

    Raises:
        ValueError: `guard` is unknown, the model has no folded norm, or the data give no bound for one.

    >>> from stabnorm import fold_norms
    >>> from stabnorm.nn import RepBN
    >>> folded = fold_norms(nn.Sequential(RepBN(4), nn.Linear(4, 2)).eval(), torch.randn(8, 4)).model
    >>> with guard_folds(folded, [torch.ones(8, 4)], "raise"):
    ...     folded(torch.full((1, 4), 50.0))
    Traceback (most recent call last):
    stabnorm.errors.StabNormError: 1 of 1 folded norms read values beyond 2 times those of the calibration data...
    """
    if guard not in get_args(Action):
        raise ValueError(f"guard={guard!r} is unknown. Choose one of {', '.join(map(repr, get_args(Action)))}")
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
