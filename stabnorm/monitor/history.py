"""`History`: what a track keeps of the steps that have arrived, within bounds."""

from collections import deque

import torch
from torch import Tensor

_CHUNK = 1 << 20  # bytes


class History:
    """The history of all steps that have arrived; of a very long run only the last steps.

    The steps lie in chunks of one size, so that adding one costs the same after a million steps as after the first.

    Args:
        rows: number of rows.
        columns: number of columns of each row.
        at_least: number of steps to keep regardless of size.
        most_bytes: size from which on the oldest steps are given up.

    >>> history = History(1, 2, at_least=1, most_bytes=1 << 20)
    >>> history.add(7, torch.zeros(3, 1, 2))
    >>> history.steps(), history.values().shape
    (tensor([7, 8, 9]), torch.Size([3, 1, 2]))
    """

    def __init__(self, rows: int, columns: int, at_least: int, most_bytes: int) -> None:
        self._shape = (rows, columns)
        step_bytes = max(4 * rows * columns, 1)
        self._most = max(at_least, most_bytes // step_bytes)
        self._size = max(1, min(self._most // 8, _CHUNK // step_bytes))  # steps of a chunk
        self._chunks: deque[tuple[Tensor, Tensor]] = deque()  # steps, and their rows
        self._filled = 0  # steps of the last chunk

    def add(self, first_step: int, rows: Tensor) -> None:
        """Add the next steps, ``[steps, rows, columns]``."""
        steps = torch.arange(first_step, first_step + len(rows), device="cpu")
        while len(rows):
            if not self._chunks or self._filled == self._size:
                values = torch.empty(self._size, *self._shape, dtype=torch.float32, device="cpu")
                self._chunks.append((torch.empty(self._size, dtype=torch.int64, device="cpu"), values))
                self._filled = 0
            fits = slice(self._filled, self._filled + len(rows))
            for kept, new in zip(self._chunks[-1], (steps, rows), strict=True):
                kept[fits] = new[: self._size - self._filled]
            taken = min(len(rows), self._size - self._filled)
            self._filled += taken
            steps, rows = steps[taken:], rows[taken:]
        while self._count - self._size >= self._most:
            self._chunks.popleft()

    @property
    def _count(self) -> int:
        return max(len(self._chunks) - 1, 0) * self._size + (self._filled if self._chunks else 0)

    def clear(self) -> None:
        """Remove all steps."""
        self._chunks.clear()
        self._filled = 0

    def values(self) -> Tensor:
        """All steps, ``[steps, rows, columns]``."""
        return self._all(1, torch.empty(0, *self._shape, dtype=torch.float32, device="cpu"))

    def steps(self) -> Tensor:
        """The optimizer step of each one, counted from 0."""
        return self._all(0, torch.empty(0, dtype=torch.int64, device="cpu"))

    def _all(self, part: int, nothing: Tensor) -> Tensor:
        whole = [chunk[part] for chunk in self._chunks]
        if whole:
            whole[-1] = whole[-1][: self._filled]
        return torch.cat([nothing, *whole])[-self._most :]
