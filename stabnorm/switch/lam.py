"""Functions that pass lam, the number of steps and the loss scale to the norms of a converted model.

They work in any training loop. `ProgressiveSwitch` calls them, and so does the callback for Lightning.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from stabnorm._checks import check_count, check_flag, check_model, check_number, check_scalar, list_of, wrong_type
from stabnorm._models.wrappers import plain_name
from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.nn._progressive import ProgressiveNorm


def progressive_norms(model: nn.Module) -> dict[str, ProgressiveNorm]:
    """Find the layers that have a lam, by the names that `find_norms` gives them, in module order; a shared one once.

    >>> from stabnorm.nn import PRepBN
    >>> list(progressive_norms(nn.Sequential(nn.Linear(4, 8), PRepBN(8))))
    ['1']
    """
    check_model("model", model)
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, ProgressiveNorm)}


def running_norms(model: nn.Module) -> dict[str, ChannelNorm]:
    """Find this package's norms with running statistics, by name; also those inside progressive norms."""
    check_model("model", model)
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, ChannelNorm)}


def write_lam(norms: Iterable[ProgressiveNorm], lam: Sequence[float], *, settled: bool = False) -> None:
    """Give each layer its lam, in place. Once the schedule is final, layers with lam = 0 skip their LayerNorm.

    Call it between the optimizer step and the next forward. Nothing is read from the device, and a compiled model is
    compiled again only once, at the end.

    Args:
        norms: what `progressive_norms` found.
        lam: one number for each of them.
        settled: whether no lam will change any more; without it the schedule is final when every lam is 0.
            Default: False.

    >>> from stabnorm.nn import PRepBN
    >>> norm = PRepBN(8)
    >>> write_lam([norm], [0.25])
    >>> norm.lam, norm.leave_out_norm
    (tensor(0.2500), False)
    """
    norms = list_of("norms", norms, ProgressiveNorm)
    check_flag("settled", settled)
    if not isinstance(lam, Sequence) or isinstance(lam, str):
        raise wrong_type("lam", lam, "a list of numbers, one for each norm")
    if len(lam) != len(norms):
        raise ValueError(f"lam holds {len(lam)} numbers, and there are {len(norms)} norms. Give one for each norm")
    for value in lam:
        check_number("lam", value, least=0, most=1)
    # The flag changes in all layers at once: Dynamo compiles a function for eight sets of flags and then gives up.
    settled = settled or not any(lam)
    for norm, value in zip(norms, lam, strict=True):
        norm.lam.fill_(value)
        norm.leave_out_norm = settled and value == 0


def write_step(norms: Iterable[ChannelNorm], step: int) -> None:
    """Tell norms how many optimizer steps were done; they stop counting their own training forwards.

    With gradient accumulation, or several forwards a step, the two numbers differ, and warm-ups are in steps.

    >>> import torch
    >>> from stabnorm.nn import UnifiedNorm
    >>> norm = UnifiedNorm(8)
    >>> write_step([norm], 100)
    >>> _ = norm(torch.randn(4, 8))
    >>> norm.step
    tensor(100)
    """
    check_count("step", step, 0)
    for norm in list_of("norms", norms, ChannelNorm):
        norm.counts_steps = False
        if (counter := norm._buffers.get("step")) is not None:  # the published variants count for themselves
            counter.fill_(step)


def write_loss_scale(norms: Iterable[ChannelNorm], scale: Tensor | float) -> None:
    """Tell norms with running gradient statistics what the loss is multiplied by; call it before the backward.

    Args:
        norms: what `running_norms` found.
        scale: ``scaler.get_scale()``, or the scaler's own tensor, which is copied on the device.
    """
    check_scalar("scale", scale, above=0)
    listed = list_of("norms", norms, ChannelNorm)
    buffers = [buffer for norm in listed if (buffer := norm._buffers.get("loss_scale")) is not None]
    for buffer in buffers:
        if isinstance(scale, Tensor):
            buffer.copy_(scale.reshape(()), non_blocking=True)
        else:
            buffer.fill_(scale)
