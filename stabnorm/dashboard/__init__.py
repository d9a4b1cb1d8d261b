"""Draws what the monitor measured. Imports numpy, Pillow and tensorboard, never torch, which may be missing there.

`heatmap` and `headline` are functions of the modules of the same names.
"""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.dashboard.images import log_image as log_image
    from stabnorm.dashboard.table import format_table as format_table
    from stabnorm.dashboard.table import layers_worth_a_look as layers_worth_a_look
    from stabnorm.dashboard.table import markdown_table as markdown_table

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.dashboard.images": ["log_image"],
        "stabnorm.dashboard.table": ["format_table", "layers_worth_a_look", "markdown_table"],
    },
)
