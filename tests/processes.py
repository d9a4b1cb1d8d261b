"""How a spawned process of a test ends."""

import os
from typing import NoReturn


def leave() -> NoReturn:
    """End this process here, well: to tear a gloo group down now and then aborts the process, or hangs it."""
    os._exit(0)
