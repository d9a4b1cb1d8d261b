"""The wheel carries the tab: where torch is missing, TensorBoard lists it and serves its modules."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest

from stabnorm.dashboard.server import WEB
from tests.dashboard.records import calm, event_record
from tests.dashboard.servers import serving
from tests.wheels import build_wheel

_HEAVY = ("torch", "functorch", "pytorch_lightning", "lightning", "triton", "stabnorm", "__editable__", "_stabnorm")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one build


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("pure"))


def test_every_file_of_the_page_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"stabnorm/dashboard/web/{path.name}" for path in WEB.iterdir()} <= names
    assert "stabnorm/dashboard/definitions.json" in names


def test_without_torch_tensorboard_lists_the_tab_and_serves_it(wheel: Path, tmp_path: Path) -> None:
    event_record(tmp_path / "runs" / "calm", calm(60))
    site = tmp_path / "site"  # the packages of this environment, but none that the tab must not need
    site.mkdir()
    for folder in map(Path, filter(None, sys.path)):
        if folder.name in ("site-packages", "dist-packages"):
            for entry in folder.iterdir():
                if not entry.name.startswith(_HEAVY) and entry.suffix != ".pth" and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)
    zipfile.ZipFile(wheel).extractall(site)
    start = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[1:1] = ['--logdir', {str(tmp_path / 'runs')!r}]; "
        "import tensorboard.main as main; main.run_main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with serving([sys.executable, "-I", "-S", "-c", start], tmp_path / "log", environment) as address:
        listing = json.load(urlopen(f"{address}/data/plugins_listing"))
        assert listing["stabnorm"]["tab_name"] == "Stability"
        module = listing["stabnorm"]["loading_mechanism"]["module_path"]
        assert b"export async function render" in urlopen(f"{address}{module}").read()
        overview = json.load(urlopen(f"{address}/data/plugin/stabnorm/data/overview"))
        assert [run["name"] for run in overview["runs"]] == ["calm"]
    have_torch = f"import sys; sys.path.insert(0, {str(site)!r}); import torch"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", have_torch], capture_output=True).returncode != 0
