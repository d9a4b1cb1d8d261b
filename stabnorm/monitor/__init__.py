"""The monitor: hooks observe norms, the catalogue's statistics are computed of them, alerts raised, a record written.

Nothing is imported until a name is used, so that a dashboard reads records where torch is missing.
"""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.monitor.alerts import Alert as Alert
    from stabnorm.monitor.alerts import Departure as Departure
    from stabnorm.monitor.detect import Detector as Detector
    from stabnorm.monitor.detect import RobustDetector as RobustDetector
    from stabnorm.monitor.monitor import StabilityMonitor as StabilityMonitor
    from stabnorm.monitor.onsets import Onset as Onset
    from stabnorm.monitor.record import FileRecord as FileRecord
    from stabnorm.monitor.record import Record as Record
    from stabnorm.monitor.record import RecordWriter as RecordWriter
    from stabnorm.monitor.record import TensorBoardRecord as TensorBoardRecord
    from stabnorm.monitor.record import read_record as read_record
    from stabnorm.monitor.statistics import Statistic as Statistic

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.monitor.alerts": ["Alert", "Departure"],
        "stabnorm.monitor.detect": ["Detector", "RobustDetector"],
        "stabnorm.monitor.monitor": ["StabilityMonitor"],
        "stabnorm.monitor.onsets": ["Onset"],
        "stabnorm.monitor.record": ["FileRecord", "Record", "RecordWriter", "TensorBoardRecord", "read_record"],
        "stabnorm.monitor.statistics": ["Statistic"],
    },
)
