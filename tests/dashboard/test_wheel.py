"""The wheel carries the tab: where torch is missing, TensorBoard lists it and serves its modules."""

import json
import os
import shutil
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

ROOT = Path(__file__).parents[2]
_HEAVY = ("torch", "functorch", "pytorch_lightning", "lightning", "triton", "stabnorm", "__editable__", "_stabnorm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, because building leaves folders behind."""
    pytest.importorskip("setuptools", "77")
    source = tmp_path_factory.mktemp("source")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "shared")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out, dirs_exist_ok=True)
    target = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(target),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if "No module named pip" in built.stderr:
        pytest.skip("there is no pip to build the wheel with")
    assert built.returncode == 0, built.stderr
    (path,) = target.glob("*.whl")
    return path


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
