"""The plug-in finds TensorBoard's folders, and nothing that goes wrong in it stops TensorBoard."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stabnorm.dashboard.tensorboard import StabilityLoader, StabilityPlugin
from tests.dashboard.records import calm, file_record


def context(logdir: object = "", specification: str = "") -> Any:
    return SimpleNamespace(logdir=logdir, flags=SimpleNamespace(logdir=logdir, logdir_spec=specification))


def runs_of(plugin: StabilityPlugin) -> list[str]:
    page = plugin.get_plugin_apps()["/*"]
    page._answers.refresh()
    return sorted(run.name for run in page._answers.runs())


def test_the_folders_are_those_of_the_command_line(tmp_path: Path) -> None:
    file_record(tmp_path / "a" / "one", calm(60))
    file_record(tmp_path / "b" / "two", calm(60))
    assert runs_of(StabilityPlugin(context(str(tmp_path)))) == ["a/one", "b/two"]
    named = StabilityPlugin(context("", f"first:{tmp_path / 'a'},second:{tmp_path / 'b'}"))
    assert runs_of(named) == ["first/one", "second/two"]


def test_a_record_in_files_of_our_own_makes_the_tab_active(tmp_path: Path) -> None:
    plugin = StabilityPlugin(context(str(tmp_path)))
    assert not plugin.is_active()
    file_record(tmp_path / "one", calm(60))
    assert StabilityPlugin(context(str(tmp_path))).is_active()


@pytest.mark.parametrize("broken", [None, SimpleNamespace(), context(3)])
def test_a_plugin_that_cannot_be_made_is_left_out(broken: Any) -> None:
    assert StabilityLoader().load(broken) is None


def test_the_entry_point_loads_neither_torch_nor_pillow() -> None:
    code = "import sys, stabnorm.dashboard.tensorboard; print([m for m in ('torch', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
