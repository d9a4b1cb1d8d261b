"""`AsyncCopy`: an asynchronous copy of tensors from the device to the host."""

import torch
from torch import Tensor


class AsyncCopy:
    """Starts to copy tensors to the host; `wait` returns them.

    From a GPU the copy is asynchronous; on the host it is done at once. The tensors may be overwritten afterwards,
    because the copy has the values from the time when it was started.

    >>> copy = AsyncCopy(torch.ones(2), torch.zeros(3))
    >>> copy.wait()
    (tensor([1., 1.]), tensor([0., 0., 0.]))
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self._copies = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            )
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._copies = tuple(tensor.cpu().clone() for tensor in tensors)

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the copy, and return the tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
