"""`recalibrate_norms`: population statistics after training, from the batches of a loader."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabnorm._checks import (
    check_count,
    check_function,
    check_has_numbers,
    check_loader,
    check_model,
    check_number,
    check_scalar,
)
from stabnorm._models.batches import Forward, moved, run_batch
from stabnorm._models.calls import input_name, mask_of, tensor_input_of
from stabnorm._models.devices import device_of
from stabnorm._models.hooks import hooked
from stabnorm._models.masks import mask_for
from stabnorm._models.random_state import random_state_kept
from stabnorm._models.ranks import gather_over_ranks, ranks
from stabnorm.errors import StabNormError
from stabnorm.nn._base import EvalAffineNorm
from stabnorm.nn._channel_norm import ChannelNorm, running_values
from stabnorm.norms.rows import as_rows, tokens_of
from stabnorm.ops.rows import moments_of_rows


@dataclass(frozen=True)
class RecalibrationReport:
    """What `recalibrate_norms` did.

    Attributes:
        norms: the layers whose statistics were measured.
        left: the layers with running statistics that were not changed, and why.
        batches: the number of batches that each process ran.
        before: the metric with the old statistics; None without a metric.
        after: the metric with the new statistics; None without a metric.
        kept: whether the new statistics are in the model now.
    """

    norms: tuple[str, ...]
    left: Mapping[str, str]
    batches: int
    before: float | None
    after: float | None
    kept: bool


def recalibrate_norms(
    model: nn.Module,
    loader: Iterable[Any],
    n_batches: int,
    metric: Callable[[nn.Module], float] | None = None,
    *,
    kappa: float | None = None,
    momentum: float = 0.1,
    alpha: float = 1.0,
    forward: Forward | None = None,
) -> RecalibrationReport:
    r"""Replace the running statistics of each channel by the median, over batches, of the batches' own statistics.

    .. math:: \hat\mu_c = \mathrm{median}_b\, \mu_{b,c},\qquad \hat\sigma^2_c = \mathrm{median}_b\, \sigma^2_{b,c}

    It is a median because one burst in the loader would ruin a mean. With `kappa` it is the running average of AdaB2N
    instead, which begins at the statistics that there are and takes the batches in their order:

    .. math:: s_t = (1 - \eta_t)\, s_{t-1} + \eta_t\, s_{\mathrm{batch}},\qquad
              \eta_1 = m^\kappa,\quad \eta_t = \frac{\eta_{t-1}}{\eta_{t-1} + (1 - m)^\kappa}

    With ``kappa=0`` this is the plain mean of the batches, with ``kappa=1`` the moving average of torch's BatchNorm.
    With `alpha` below 1, a share of the old statistics stays, for data of another kind than the training's (alpha-BN):

    .. math:: s \leftarrow (1 - \alpha)\, s + \alpha\, \hat s

    Every norm gets the inputs that it would get in training, where all norms before it use the statistics of the
    batch. So all layers can be measured at once. The rest of the model is in eval mode, so that dropout is off, as it
    will be when the statistics are used. For torch's BatchNorm and for `RepBN`, also inside a `PRepBN`, the statistics
    are mean and unbiased variance; for `UnifiedNorm` and `PowerNorm` they are the mean square. A batch with a
    non-finite value, or without a valid token, does not count for the layer.

    Counters, filter windows, gradients, random state and the mode of each module do not change. After an exception the
    statistics have not changed either. With several processes, each one runs `n_batches`, and the median is over the
    batches of all. Padding does not count inside `stabnorm.valid_tokens`.

    Args:
        model: a trained model.
        loader: a DataLoader or an iterable of batches; training data without augmentation is best. A tensor is the
            model's input, a tuple or list is ``(input, targets, ...)``, and a mapping holds keyword arguments.
        n_batches: the number of batches to use; 50 are enough. If the loader has fewer, all of them are used.
        metric: a function that takes the model in eval mode and returns a number, **lower is better**, such as a loss
            on validation data. The new statistics stay only if it does not get worse. With several processes its mean
            decides. Default: None, they stay.
        kappa: from 0 to 1, see above. Default: None, the median.
        momentum: m, the weight of a new batch where `kappa` is above 0. Default: 0.1.
        alpha: the share of the new statistics, from 0 to 1. Default: 1.
        forward: how a batch is run, ``forward(model, batch)``, with the batch on the model's device. Default: according
            to the format of `loader`.

    Returns:
        What was measured, and whether it stays.

    Raises:
        TypeError: an argument has another type.
        ValueError: `n_batches` is below 1, a number is out of range, or the model has no norm with running statistics.
        StabNormError: the loader is empty, or no such norm ran, or a norm learns its number of channels from its first
            input and has had none.

    Source: AdaB2N (`kappa`), arXiv:2110.04065 (alpha-BN).

    >>> from stabnorm.nn import RepBN
    >>> model = nn.Sequential(nn.Linear(4, 8), RepBN(8)).eval()
    >>> report = recalibrate_norms(model, [torch.randn(16, 4) for _ in range(20)], 20)
    >>> report.norms, report.batches, report.kept
    (('1',), 20, True)
    """
    check_model("model", model)
    check_loader("loader", loader)
    check_count("n_batches", n_batches, hint=": 50 are plenty")
    if kappa is not None:
        check_number("kappa", kappa, least=0, most=1, hint=", or None for the median")
    check_number("momentum", momentum, above=0, most=1)
    check_number("alpha", alpha, least=0, most=1)
    if metric is not None:
        check_function("metric", metric, "model")
    if forward is not None:
        check_function("forward", forward, "model", "batch")
    check_has_numbers(model, "to recalibrate")
    targets, left = _running_norms(model)
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no norm with running statistics, so there is nothing to recalibrate: neither "
            "torch's BatchNorm nor a norm of stabnorm.nn; a LayerNorm keeps none"
        )
    for target in targets:
        for part in target.norm.modules():
            if isinstance(part, ChannelNorm):
                part.check_width()
    device = device_of(model)
    with _unchanged(model, device):
        before = _measured(metric, model, device)
        batches = _gather(model, targets, loader, n_batches, forward or run_batch, device)
    averages = {target.name: target.average(kappa, momentum) for target in targets}
    if not batches:
        raise StabNormError("the loader is empty, so nothing was measured. Give one with batches")
    if all(average is None for average in averages.values()):
        raise StabNormError(
            f"in {batches} batches no norm with running statistics saw a finite input; the first is {targets[0].name}. "
            "Check that the batches reach the model and what they hold"
        )
    left |= {name: "it saw no finite input" for name, average in averages.items() if average is None}
    old = [(buffer, buffer.clone()) for target in targets for buffer in target.buffers]
    kept = False
    try:
        for target in targets:
            target.write(averages[target.name], alpha)
        with _unchanged(model, device):
            after = _measured(metric, model, device)
        # A NaN before is worse than any number, and a NaN after is worse than anything.
        kept = before is None or after is None or after <= before or (math.isnan(before) and not math.isnan(after))
    finally:
        if not kept:
            for buffer, value in old:
                buffer.copy_(value)
    norms = tuple(name for name, average in averages.items() if average is not None)
    return RecalibrationReport(norms, left, batches, before, after, kept)


# --- the norms ---


class _Target:
    """A norm with running statistics: its buffers, and each batch's own statistics."""

    def __init__(self, name: str, norm: nn.Module, buffers: tuple[Tensor, ...]) -> None:
        self.name, self.norm, self.buffers = name, norm, buffers
        self.input_name = input_name(norm)
        self.seen: list[Tensor] = []  # [len(buffers), C] of each forward

    @torch.no_grad()
    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: note the batch's own statistics."""
        x = tensor_input_of(args, kwargs, self.input_name)
        norm = self.norm
        if isinstance(norm, EvalAffineNorm):
            self.seen.append(norm.batch_statistics(x, mask_of(args, kwargs)))
        else:
            self.seen.append(_of_batch_norm(x, self.name))

    def train(self) -> None:
        """Let the norm use the batch's statistics; whatever else it holds stays in eval mode."""
        for part in self.norm.modules():
            if part is self.norm or isinstance(part, EvalAffineNorm):
                part.training = True

    def average(self, kappa: float | None, momentum: float) -> Tensor | None:
        """Give ``[len(buffers), C]`` over the batches of all processes, float64; None where no batch was finite."""
        shape = (len(self.buffers), self.buffers[0].numel())
        device = self.buffers[0].device
        most = int(gather_over_ranks(torch.tensor(len(self.seen), device=device)).max())
        if not most:
            return None
        dtype = torch.promote_types(self.buffers[0].dtype, torch.float32)
        padded = torch.full((most, *shape), torch.nan, dtype=dtype, device=device)  # ranks may have other counts
        if self.seen:
            padded[: len(self.seen)] = torch.stack(self.seen)
        of_all_ranks = gather_over_ranks(padded).cpu().double().transpose(0, 1).flatten(0, 1)  # in the batches' order
        finite = of_all_ranks[~of_all_ranks.isnan().any(2).any(1)]
        if not len(finite):
            return None
        if kappa is None:
            return torch.from_numpy(np.median(finite.numpy(), axis=0))
        average = torch.stack([buffer.detach().cpu().double().flatten() for buffer in self.buffers])
        for values, weight in zip(finite, momenta(kappa, momentum), strict=False):
            average = average + weight * (values - average)
        return average

    def write(self, average: Tensor | None, alpha: float) -> None:
        """Write the averages into the buffers, with the weight `alpha`; None leaves them as they are."""
        if average is not None:
            for buffer, value in zip(self.buffers, average, strict=True):
                old = buffer.double().cpu()
                buffer.copy_(old + alpha * (value.view_as(old) - old))


def momenta(kappa: float, momentum: float) -> Iterator[float]:
    r"""Yield the weights of the new values in AdaB2N's running average, the first one first.

    .. math:: \eta_1 = m^\kappa,\qquad \eta_t = \frac{\eta_{t-1}}{\eta_{t-1} + (1 - m)^\kappa}

    >>> list(itertools.islice(momenta(0.0, 0.1), 3)), list(itertools.islice(momenta(1.0, 0.25), 2))
    ([1.0, 0.5, 0.3333333333333333], [0.25, 0.25])
    """
    weight = momentum**kappa
    while True:
        yield weight
        weight /= weight + (1 - momentum) ** kappa


def _of_batch_norm(x: Tensor, name: str) -> Tensor:
    """A batch's mean and variance as torch's BatchNorm takes them, but without padding."""
    channel_dim = 1 if x.ndim > 1 else 0
    valid = mask_for(tokens_of(x.shape, channel_dim), name)
    rows = as_rows(x, channel_dim)
    return running_values(moments_of_rows(rows, None if valid is None else valid.reshape(-1), center=True))


def _running_norms(model: nn.Module) -> tuple[list[_Target], dict[str, str]]:
    """Find the norms whose running statistics can be measured; of the others with such statistics, say why not."""
    targets: list[_Target] = []
    left: dict[str, str] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        buffers: tuple[Tensor | None, ...] = ()
        if isinstance(module, EvalAffineNorm):
            # A norm computes the norms in it without calling them, so the hook goes on the outer one.
            inside.update(id(part) for part in module.modules() if isinstance(part, EvalAffineNorm))
            try:
                buffers = module.running_statistics()
            except StabNormError as error:
                left[name] = str(error)
        elif isinstance(module, _BatchNorm):
            buffers = (module.running_mean, module.running_var)
        kept = tuple(buffer for buffer in buffers if buffer is not None)
        if kept:
            targets.append(_Target(name, module, kept))
    return targets, left


# --- running the model ---


def _gather(
    model: nn.Module,
    targets: list[_Target],
    loader: Iterable[Any],
    n_batches: int,
    forward: Forward,
    device: torch.device,
) -> int:
    """Run the batches with hooks on, and count them."""
    batches = 0
    for target in targets:
        target.train()
    hooks = (target.norm.register_forward_pre_hook(target.look, with_kwargs=True) for target in targets)
    # A graph that was compiled before has no hooks in it, so the model runs in eager mode.
    with hooked(hooks), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for batch in itertools.islice(loader, n_batches):
            forward(model, moved(batch, device))
            batches += 1
    return batches


def _measured(metric: Callable[[nn.Module], float] | None, model: nn.Module, device: torch.device) -> float | None:
    """Give the metric of the model in eval mode, the mean over processes."""
    if metric is None:
        return None
    model.eval()
    with torch.no_grad():
        given = metric(model)
    check_scalar("metric", given)
    value = float(given)
    if ranks() == 1:
        return value
    return float(gather_over_ranks(torch.tensor(value, dtype=torch.float64, device=device)).mean())


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model in eval mode; afterwards modes, buffers and random state are what they were, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with random_state_kept(device):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                buffer.copy_(value)
