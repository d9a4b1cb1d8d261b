"""TensorBoard's tab "Stability". Loads no torch, which may be missing where TensorBoard runs.

One plug-in that cannot be imported stops TensorBoard for everybody, so this file imports only the standard library and
TensorBoard itself; the rest follows when the tab is opened.
"""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from tensorboard.plugins import base_plugin

PLUGIN_NAME = "stabnorm"
_PAUSE = 60.0  # seconds between two walks through the folders in search of a first record

logger = logging.getLogger("stabnorm")


class StabilityPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """Shows the runs below TensorBoard's log folders. It reads the files itself, because TensorBoard keeps samples."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: Any) -> None:
        self._roots = _roots(context)
        self._active, self._look_again = False, 0.0

    def get_plugin_apps(self) -> dict[str, Any]:
        """Return one application for all addresses of the tab."""
        from stabnorm.dashboard.answers import Answers
        from stabnorm.dashboard.server import Page

        return {"/*": Page(Answers(self._roots), prefix=f"/plugin/{PLUGIN_NAME}/")}

    def is_active(self) -> bool:
        """Whether a record in files of our own lies there; of records in event files TensorBoard knows by itself."""
        if not self._active and time.monotonic() >= self._look_again:  # TensorBoard asks often
            with contextlib.suppress(OSError):
                self._active = any(next(root.rglob("record.json"), None) for root in self._roots.values())
            self._look_again = time.monotonic() + _PAUSE
        return self._active

    def frontend_metadata(self) -> Any:
        """Name the tab and its module."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Stability")


class StabilityLoader(base_plugin.TBLoader):  # type: ignore[misc]  # TensorBoard has no types
    """The entry point: makes the plug-in, and never lets an error of ours stop TensorBoard."""

    def load(self, context: Any) -> StabilityPlugin | None:
        """Return the plug-in, or None if it cannot be made."""
        try:
            return StabilityPlugin(context)
        except Exception:
            logger.exception("the tab 'Stability' is left out")
            return None


def _roots(context: Any) -> dict[str, Path]:
    """Return TensorBoard's log folders of this machine, by the name that stands before their runs."""
    flags = context.flags
    specification = getattr(flags, "logdir_spec", "") or ""
    if not specification:
        folder = context.logdir or getattr(flags, "logdir", "")
        return {"": Path(folder).expanduser()} if folder else {}
    named = (part.rpartition(":") for part in specification.split(","))
    return {name: Path(folder).expanduser() for name, _, folder in named}
