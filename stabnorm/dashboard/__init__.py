"""Shows what the monitor measured. Imports numpy, Pillow and tensorboard, never torch, which may be missing there.

`heatmap`, `headline` and `relative_map` are functions of the modules of the same names. The page lies in `web`; it asks
`answers`, which reads `runs`. It is served by `tensorboard` and `view`, and written by `report`.
"""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.dashboard.images import log_image as log_image
    from stabnorm.dashboard.report import html_report as html_report
    from stabnorm.dashboard.report import markdown_report as markdown_report
    from stabnorm.dashboard.report import write_report as write_report
    from stabnorm.dashboard.runs import open_run as open_run
    from stabnorm.dashboard.table import format_table as format_table
    from stabnorm.dashboard.table import layers_worth_a_look as layers_worth_a_look
    from stabnorm.dashboard.table import markdown_table as markdown_table

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.dashboard.images": ["log_image"],
        "stabnorm.dashboard.report": ["html_report", "markdown_report", "write_report"],
        "stabnorm.dashboard.runs": ["open_run"],
        "stabnorm.dashboard.table": ["format_table", "layers_worth_a_look", "markdown_table"],
    },
)
