"""Torch's encoder layers have a fused path for eval that reads their norms' parameters without calling the norms."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_fused_layers() -> Iterator[None]:
    """Let torch's encoder layers call their norms while the context is open."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
