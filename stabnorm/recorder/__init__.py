"""The flight recorder: what a run did last, written when something goes wrong, and run again afterwards."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.recorder.again import Replayed as Replayed
    from stabnorm.recorder.again import replay as replay
    from stabnorm.recorder.batch_rows import BatchRow as BatchRow
    from stabnorm.recorder.batch_rows import BatchRows as BatchRows
    from stabnorm.recorder.dump import Dump as Dump
    from stabnorm.recorder.dump import read_dump as read_dump
    from stabnorm.recorder.recorder import FlightRecorder as FlightRecorder

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.recorder.batch_rows": ["BatchRow", "BatchRows"],
        "stabnorm.recorder.dump": ["Dump", "read_dump"],
        "stabnorm.recorder.recorder": ["FlightRecorder"],
        "stabnorm.recorder.again": ["Replayed", "replay"],
    },
)
