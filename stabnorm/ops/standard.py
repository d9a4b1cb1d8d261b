"""What the backends of `stabnorm.monitor.standard` are told about the layers."""

from typing import NamedTuple

from torch import Tensor


class Layers(NamedTuple):
    """The fixed properties of layers, ``[L]`` each, see `stabnorm.monitor.past.Layout`."""

    widths: Tensor
    eps: Tensor
    per_channel: Tensor
    own_buffers: Tensor | None
