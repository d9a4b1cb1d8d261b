"""The layout of a row, which has all numbers of one norm (or head, matrix, ...) in one step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stabnorm.monitor.past import Moments

TOP_CHANNELS = 3
BESIDE_NORMS = {"tokens": 1, "nonfinite": 1, "top_channel_ids": TOP_CHANNELS, "top_channel_values": TOP_CHANNELS}


class RowLayout:
    """Names the columns of a row: one for each statistic, and then what is known beside them.

    Args:
        statistics: their names.
        beside: names of other parts of a row, and how many columns each one has. Default: nothing.

    >>> layout = RowLayout(["amax", "crest"], {"tokens": 1, "top_channel_ids": 3})
    >>> row = layout.pack(torch.tensor([5.0, 2.0]), {"tokens": torch.tensor(64), "top_channel_ids": torch.arange(3)})
    >>> layout.part(row, "tokens"), layout.part(row, "top_channel_ids"), layout.statistics_of(row)
    (tensor(64.), tensor([0., 1., 2.]), tensor([5., 2.]))
    """

    def __init__(self, statistics: Sequence[str], beside: Mapping[str, int] | None = None) -> None:
        self.statistics, self.beside = tuple(statistics), dict(beside or {})
        self._columns: dict[str, int | slice] = {name: column for column, name in enumerate(self.statistics)}
        self.width = len(self.statistics)
        for name, columns in self.beside.items():
            self._columns[name] = self.width if columns == 1 else slice(self.width, self.width + columns)
            self.width += columns

    @property
    def beside_columns(self) -> list[str]:
        """The name of every column after those of the statistics; parts of several columns are numbered."""
        return [f"{name} {column}" for name, columns in self.beside.items() for column in range(columns)]

    def pack(self, statistics: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """Rows ``[..., width]``, float32, of the statistics ``[..., statistics]`` and the other parts by name."""
        parts = [beside[name] if columns > 1 else beside[name][..., None] for name, columns in self.beside.items()]
        return torch.cat([part.to(torch.float32) for part in (statistics, *parts)], -1)

    def part(self, rows: Tensor, name: str) -> Tensor:
        """Return the part of rows ``[..., width]`` with a name: ``[...]``, or ``[..., columns]`` if it has several."""
        return rows[..., self._columns[name]]

    def statistics_of(self, rows: Tensor) -> Tensor:
        """Return all statistics, ``[..., statistics]``."""
        return rows[..., : len(self.statistics)]


def beside_statistics(now: Moments) -> dict[str, Tensor]:
    """What the monitor knows of each norm beside its statistics: `BESIDE_NORMS`."""
    absmax = now.absmax if now.layout.exists is None else now.absmax.masked_fill(~now.layout.exists, -torch.inf)
    top = absmax.topk(min(TOP_CHANNELS, absmax.shape[-1]))
    exists = now.ran[:, None] & ~torch.isneginf(top.values)
    missing = (0, TOP_CHANNELS - top.values.shape[-1])
    ids, values = (
        nn.functional.pad(torch.where(exists, part, torch.nan), missing, value=torch.nan)
        for part in (top.indices, top.values)
    )
    return {
        "tokens": now.count,
        "nonfinite": (~torch.isfinite(now.absmax)).sum(-1),  # of x: a variance may overflow where x does not
        "top_channel_ids": ids,
        "top_channel_values": values,
    }
