"""What the page shows of unusual runs, in a real browser: short ones, small and deep ones, long names, odd values."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stabnorm.dashboard.view import serve
from tests.dashboard.browser import Browser, needs_browser
from tests.dashboard.records import LAYERS, alert, calm, file_record, growing

pytestmark = [needs_browser, pytest.mark.slow, pytest.mark.xdist_group("first view")]

LONG = tuple(f"{'a_name_of_a_block_' * 16}.{i}.norm" for i in range(9))
DEEP = tuple(f"model.layers.{i // 2}.norm{i % 2}" for i in range(200))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    file_record(folder / "short", calm(10))
    file_record(folder / "small", calm(300, 1), layers=("norm",))
    file_record(folder / "deep", calm(300, 200), layers=DEEP)
    file_record(folder / "long", growing(first_layer=4), layers=LONG, events=[alert(312, LONG[4])])
    negative = np.random.default_rng(0).standard_normal((300, 9))
    file_record(folder / "negative", calm(300), more={"token_mean_mean": negative})
    due = np.arange(300) % 20 == 0
    spared = np.where(due[:, None], calm(300), np.nan)
    file_record(folder / "budget", calm(300), more={"affine_residual": spared, "measured_every": np.full(300, 20.0)})
    lost = np.where(np.arange(300) < 280, 1.0, np.nan)
    file_record(folder / "lost", calm(300), loss=lost, events=[alert(280, LAYERS[2], "nonfinite", np.nan)])
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[str]:
    with serve(runs, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(1280, 900) as browser:
        yield browser


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("run=short", ["too early", "show values"]),
        ("run=small", ["1 of 1 in depth", "every layer stayed in its usual range"]),
        ("run=deep", ["All names begin with model.layers."]),
        ("run=long", ["and 4 more layers left their usual range"]),
        ("run=negative&layer=norm&statistic=token_mean_mean", ["input mean"]),
        ("run=budget&layer=norm&statistic=affine_residual", ["measured once in 20 steps"]),
        ("run=lost", [f"NaN or infinity in {LAYERS[2]} at step 280", "the loss is NaN or infinite"]),
    ],
)
def test_an_unusual_run_is_shown_in_words_and_without_an_error(
    state: str, words: list[str], server: str, browser: Browser
) -> None:
    browser.go("about:blank")  # a change behind the # alone would load nothing
    browser.go(f"{server}#{state}")
    browser.wait_for("document.body.dataset.drawn")
    text = browser.run("document.body.innerText")
    assert [word for word in words if word not in text] == []
    assert browser.run("document.getElementById('message').hidden")
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_run_keeps_its_colour_whichever_run_is_looked_at(server: str, browser: Browser) -> None:
    colours = []
    for run in ("negative", "budget"):
        browser.go("about:blank")
        browser.go(f"{server}#run={run}")
        browser.wait_for("document.body.dataset.drawn")
        entries = "[...document.querySelectorAll('#layer .legend .entry')]"
        script = f"{entries}.map((entry) => [entry.innerText, entry.firstChild.style.background])"
        colours.append(dict(browser.run(script)))
    assert colours[0]
    assert colours[0] == colours[1]
