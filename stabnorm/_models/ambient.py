"""Torch's settings that reach whatever runs: default dtype and device, autocast, gradients, inference, determinism."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_context() -> Iterator[None]:
    """Set them all to torch's own defaults, without gradients, and put them back afterwards.

    >>> torch.set_default_dtype(torch.float64)
    >>> with plain_context():
    ...     torch.ones(1).dtype
    torch.float32
    >>> torch.set_default_dtype(torch.float32)
    """
    dtype = torch.get_default_dtype()
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    )  # fmt: skip
    with ExitStack() as stack:
        # Only what differs is set, because the fold does this at every operation.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        if torch.empty(0).device.type != "cpu":  # torch 2.6's get_default_device() does not see `with torch.device()`
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
        if deterministic:
            torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            if dtype != torch.float32:
                torch.set_default_dtype(dtype)
            if deterministic:
                torch.use_deterministic_algorithms(True, warn_only=warn_only)
