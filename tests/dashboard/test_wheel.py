"""The wheel carries the tab: where torch is missing, TensorBoard lists it and serves its modules."""

import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest

from stabnorm.dashboard.server import WEB
from tests.dashboard.records import calm, event_record
from tests.wheels import build_wheel

_HEAVY = ("torch", "functorch", "pytorch_lightning", "lightning", "triton", "stabnorm", "__editable__", "_stabnorm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("pure"))


@pytest.mark.slow
def test_every_file_of_the_page_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"stabnorm/dashboard/web/{path.name}" for path in WEB.iterdir()} <= names
    assert "stabnorm/dashboard/definitions.json" in names


@pytest.mark.slow
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['tensorboard', '--logdir', "
        f"{str(tmp_path / 'runs')!r}, '--port', '{port}']; import tensorboard.main as main; main.run_main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = (tmp_path / "log").open("w+", encoding="utf-8")
    with (
        log,
        subprocess.Popen([sys.executable, "-I", "-S", "-c", start], env=environment, stderr=log, stdout=log) as server,
    ):
        try:
            address = f"http://127.0.0.1:{port}/data"
            for _ in range(300):
                try:
                    listing = json.load(urlopen(f"{address}/plugins_listing"))
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
                    time.sleep(0.1)
            assert listing["stabnorm"]["tab_name"] == "Stability"
            module = listing["stabnorm"]["loading_mechanism"]["module_path"]
            assert b"export async function render" in urlopen(f"{address.removesuffix('/data')}{module}").read()
            overview = json.load(urlopen(f"{address}/plugin/stabnorm/data/overview"))
            assert [run["name"] for run in overview["runs"]] == ["calm"]
        finally:
            server.terminate()
    have_torch = f"import sys; sys.path.insert(0, {str(site)!r}); import torch"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", have_torch], capture_output=True).returncode != 0
