"""The state that stays on the device from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabnorm.monitor.past import Layout, Past
from stabnorm.norms import NormLayer


@dataclass(frozen=True)
class DeviceState:
    """The layout of the layers, and their past, on the device."""

    device: torch.device
    layout: Layout
    past: Past

    @staticmethod
    def of(
        norms: Sequence[NormLayer],
        width: int,
        device: torch.device,
        past_class: type[Past] = Past,
    ) -> "DeviceState":
        """Create an empty state for these layers."""
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        sizes = torch.tensor([norm.num_features for norm in norms], device="cpu")
        uniform = all(norm.num_features == width for norm in norms)
        layout = Layout(
            exists=None if uniform else (torch.arange(width, device="cpu") < sizes[:, None]).to(device),
            channels=sizes.to(device, dtype),
            eps=torch.tensor([norm.eps for norm in norms], dtype=dtype, device=device),
            per_channel=torch.tensor([norm.kind == "batch" for norm in norms], device=device),
            own_buffers=torch.tensor([norm.running_mean is not None for norm in norms], device=device),
        )
        past = past_class(len(norms), width, device, dtype)
        return DeviceState(device, layout, past)


def running_buffers(norms: Sequence[tuple[int, NormLayer]], past: Past) -> Tensor:
    """Return running means and variances, ``[2, L, C]``, NaN for layers without any; ``[2, 1, 1]`` if none has some."""
    shape = past.mean.shape if norms else (1, 1)
    own = torch.full((2, *shape), torch.nan, device=past.mean.device, dtype=past.mean.dtype)
    for index, norm in norms:
        for part, buffer in enumerate((norm.running_mean, norm.running_var)):
            if buffer is not None:
                own[part, index, : norm.num_features] = buffer.detach()
    return own
