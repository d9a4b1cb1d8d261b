"""One `Callback` base that every installed Lightning accepts.

`lightning.pytorch.Callback` and `pytorch_lightning.Callback` are different classes to Python, and a Trainer of one
namespace rejects a callback of the other, or calls only some of its hooks. A class that derives from both works in
each.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback


def _installed_callbacks() -> tuple[type, ...]:
    bases: list[type] = []
    error: ImportError | None = None
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if importlib.util.find_spec(name.split(".")[0]) is None:
            continue
        try:
            bases.append(importlib.import_module(name).Callback)
        except ImportError as failed:  # `lightning` may be installed without its PyTorch part
            error = failed
    if not bases:
        raise ImportError("stabnorm.callbacks needs Lightning: `pip install pytorch-lightning`") from error
    return tuple(dict.fromkeys(bases))


if not TYPE_CHECKING:
    Callback = type("Callback", _installed_callbacks(), {"__module__": __name__, "__doc__": "Base of our callbacks."})
