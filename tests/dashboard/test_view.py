"""`stabnorm view` serves runs of any logger on this machine, live."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from stabnorm.cli import main
from stabnorm.dashboard.view import serve
from tests.dashboard.browser import Browser, needs_browser
from tests.dashboard.records import LAYERS, alert, calm, file_record, growing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    file_record(tmp_path / "run", growing(), events=[alert(315, LAYERS[1])])
    with serve(tmp_path, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_command_says_where_and_serves_without_torch(tmp_path: Path) -> None:
    file_record(tmp_path / "run", calm(60))
    code = (
        "import sys; sys.modules['torch'] = None; from stabnorm.cli import main; "
        f"main(['view', {str(tmp_path)!r}, '--port', '0'])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
            assert found is not None
            overview = json.load(urlopen(f"{found[0]}data/overview"))
            assert [run["name"] for run in overview["runs"]] == ["run"]
        finally:
            server.terminate()


def test_a_port_that_is_taken_is_an_error_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["view", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 1
    assert "--port" in capsys.readouterr().err


@needs_browser
@pytest.mark.slow
def test_the_page_follows_a_run_that_still_trains(address: str, tmp_path: Path) -> None:
    with Browser() as browser:
        browser.go(address)
        browser.wait_for("document.body.dataset.drawn")
        assert "unstable" in browser.run("document.querySelector('.verdict').innerText")
        file_record(tmp_path / "later", calm(60))
        browser.wait_for("document.querySelectorAll('.verdict').length === 2", 20)
        assert not browser.errors


@needs_browser
@pytest.mark.slow
def test_many_layers_are_shown_by_block_and_open_at_a_click(address: str, tmp_path: Path) -> None:
    names = tuple(f"encoder.layers.{i // 4}.norm{i % 4}" for i in range(100))
    file_record(tmp_path / "deep", calm(300, 100), layers=names)
    with Browser() as browser:
        browser.go(f"{address}/#run=deep")
        browser.wait_for("document.body.dataset.drawn")
        label = browser.run("document.getElementById('map').getAttribute('aria-label')")
        assert "25 rows" in label
        box = browser.run("(b => [b.x, b.y])(document.getElementById('map').getBoundingClientRect())")
        browser.drag((box[0] + 10, box[1] + 5), (box[0] + 10, box[1] + 5))
        browser.wait_for("document.getElementById('map').getAttribute('aria-label').includes('28 rows')")
        browser.run(
            "(filter => { filter.value = 'layers.7.'; filter.dispatchEvent(new Event('input')); })"
            "(document.getElementById('filter'))"
        )
        browser.wait_for("document.getElementById('map').getAttribute('aria-label').includes('4 rows')")
        assert not browser.errors
