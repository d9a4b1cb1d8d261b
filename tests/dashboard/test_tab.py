"""TensorBoard's tab in a real browser, on runs that the monitor really watched."""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.monitor.record import TensorBoardRecord, read_record
from tests.dashboard.browser import Browser, needs_browser
from tests.dashboard.servers import serving

ROOT = Path(__file__).parents[2]
FAULT_AT = 290
# The page lies in a frame of TensorBoard's, of the same origin.
PAGE = (
    "[...document.querySelectorAll('iframe')].map(frame => frame.contentDocument)"
    ".find(page => page && page.body && page.body.dataset.drawn)"
)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = x + self.linear(self.norm(x))
        return added


def train(folder: Path, steps: int, *, fault: bool) -> None:
    """Watch a small training; with a fault, one block's weights begin to grow."""
    from torch.utils.tensorboard import SummaryWriter

    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(16) for _ in range(5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    with SummaryWriter(str(folder)) as writer, StabilityMonitor(model, flush_every=10) as monitor:
        monitor.records = [TensorBoardRecord(writer)]
        for step in range(steps):
            loss = model(torch.randn(64, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
            if fault and step >= FAULT_AT:
                with torch.no_grad():
                    model[2].linear.weight.mul_(1.06)  # type: ignore[union-attr, operator]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "calm", 330, fault=False)
    train(folder / "grown", 330, fault=True)
    return folder


@pytest.fixture(scope="module")
def tensorboard(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard on this machine, which finds the tab through its entry point."""
    plugins = entry_points(group="tensorboard_plugins", name="stabnorm")
    path = [str(ROOT)]
    if not plugins:  # a checkout that was installed before there was a tab
        installed = tmp_path_factory.mktemp("installed")
        information = installed / "stabnorm_tab-0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: stabnorm-tab\nVersion: 0\n")
        (information / "entry_points.txt").write_text(
            "[tensorboard_plugins]\nstabnorm = stabnorm.dashboard.tensorboard:StabilityLoader\n"
        )
        path.append(str(installed))
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={runs}", "--reload_interval=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    with serving(command, tmp_path_factory.mktemp("log") / "log", environment) as address:
        yield address


class Tab:
    """The tab in a browser."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, state: str = "", *, dark: bool = False) -> None:
        self.browser.go("about:blank")
        self.browser.go(f"{self.address}/?darkMode={'true' if dark else 'false'}#stabnorm{state}")
        self.browser.wait_for(f"!!({PAGE})")

    def run(self, script: str) -> object:
        """Run a script in which `page` is the tab's document."""
        return self.browser.run(f"(page => {script})({PAGE})")

    def after(self, action: str) -> None:
        """Do something and wait until the page is drawn again."""
        before = self.run("page.body.dataset.drawn")
        self.run(action)
        self.browser.wait_for(f"(({PAGE}) || {{body: {{dataset: {{}}}}}}).body.dataset.drawn > {before}")

    def place(self, selector: str) -> tuple[float, float, float, float]:
        box = self.run(
            f"(() => {{ const frame = page.defaultView.frameElement.getBoundingClientRect();"
            f"const box = page.querySelector({selector!r}).getBoundingClientRect();"
            "return [frame.x + box.x, frame.y + box.y, box.width, box.height]; })()"
        )
        assert isinstance(box, list)
        return box[0], box[1], box[2], box[3]

    def row(self, index: int, rows: int = 5) -> float:
        """The middle of a row of the map, in pixels."""
        _, top, _, height = self.place("#map")
        return top + 2 + (index + 0.5) * (height - 22) / rows

    def hover(self) -> str:
        text = self.run("page.getElementById('hover').textContent")
        assert isinstance(text, str)
        return text


@pytest.fixture(scope="module")
def tab(tensorboard: str) -> Iterator[Tab]:
    with Browser() as browser:
        yield Tab(browser, tensorboard)


pytestmark = [needs_browser, pytest.mark.slow, pytest.mark.xdist_group("tab")]  # one TensorBoard


def test_the_tab_is_there_and_shows_the_worst_run_first(tab: Tab) -> None:
    tab.open()
    assert "Stability" in str(tab.browser.run("document.body.innerText")).title()
    names = tab.run("[...page.querySelectorAll('.verdict')].map(card => card.dataset.run)")
    assert names == ["grown", "calm"]
    assert "unstable" in str(tab.run("page.querySelector('.verdict').innerText"))
    assert not tab.browser.errors


def test_nothing_is_loaded_from_another_host(tab: Tab) -> None:
    tab.open()
    hosts = {request.split("/")[2] for request in tab.browser.requests if request.startswith("http")}
    assert hosts == {tab.address.removeprefix("http://")}


def test_a_growing_layer_has_other_colours_than_a_calm_one(tab: Tab) -> None:
    tab.open("&run=grown&statistic=token_std_mean")
    pixels = tab.run(
        "(() => { const map = page.getElementById('map'); const height = (map.height - 22) / 5;"
        "const pixel = row => map.getContext('2d')"
        ".getImageData(map.width - 40, 2 + Math.round((row + 0.8) * height), 1, 1).data;"
        "return [0, 3].map(row => [...pixel(row)]); })()"
    )
    assert isinstance(pixels, list)
    calm, grown = pixels
    assert grown[0] > grown[2] + 60, "red where it grew"
    assert abs(calm[0] - calm[2]) < 40, "no colour where nothing happened"


def test_hovering_gives_the_records_own_number(tab: Tab, runs: Path) -> None:
    tab.open("&run=grown&statistic=token_std_mean&first=280&last=329")
    left, _, width, _ = tab.place("#map")
    tab.browser.mouse("mouseMoved", left + width - 60, tab.row(3))
    text = tab.hover()
    layer, where, shown = text.split(" · ")[:3]
    record = read_record(runs / "grown")
    value = record.series["token_std_mean"][int(where.split()[1]), record.layers.index(layer)]
    assert layer == "3.norm"
    assert float(shown.split()[2].replace(",", "")) == pytest.approx(value, rel=5e-3)


def test_an_alert_leads_to_its_step_and_layer(tab: Tab, runs: Path) -> None:
    tab.open("&run=grown&layer=0.norm&step=5")
    onsets = [event for event in read_record(runs / "grown").events if event.kind == "onset"]
    first = [event for event in onsets if event.step == onsets[0].step][-1]  # it is written again as it grows
    tab.after("page.querySelector('.alert').click()")
    assert tab.run("page.querySelector('#layer h2').firstChild.textContent") == first.data["layer"]
    assert f"At step {first.step}" in str(tab.run("page.getElementById('layer').innerText"))
    address = str(tab.browser.run("location.hash"))
    assert f"step={first.step}" in address
    assert f"layer={first.data['layer']}" in address
    tab.open(address.removeprefix("#stabnorm"))  # the address leads there again
    assert f"At step {first.step}" in str(tab.run("page.getElementById('layer').innerText"))


def test_dragging_zooms_and_refines(tab: Tab) -> None:
    tab.open("&run=grown")
    left, _, width, _ = tab.place("#map")
    y = tab.row(3)
    drawn = tab.run("page.body.dataset.drawn")
    tab.browser.drag((left + 0.8 * width, y), (left + 0.9 * width, y))
    tab.browser.wait_for(f"({PAGE}).body.dataset.drawn > {drawn}")
    address = str(tab.browser.run("location.hash"))
    ends = dict(part.split("=") for part in address.split("&")[1:])
    assert 220 < int(ends["first"]) < int(ends["last"]) < 310
    assert int(ends["last"]) - int(ends["first"]) < 60
    tab.after("page.getElementById('whole').click()")
    assert "first=" not in str(tab.browser.run("location.hash"))


def test_the_keys_go_from_alert_to_alert(tab: Tab) -> None:
    tab.open("&run=grown&layer=0.norm&step=5")
    tab.run("page.body.focus()")
    tab.after("page.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'n', bubbles: true}))")
    assert "step=5&" not in f"{tab.browser.run('location.hash')}&"


def test_two_runs_share_one_scale(tab: Tab) -> None:
    ends = []
    for run in "calm", "grown":
        tab.open(f"&run={run}&colour=value&statistic=amax")
        ends.append(tab.run("page.querySelectorAll('.pictures .legend')[1].querySelector('.entry').textContent"))
    assert ends[0] == ends[1]


def test_the_dark_theme_follows_tensorboards(tab: Tab) -> None:
    shades = []
    for dark in False, True:
        tab.open(dark=dark)
        colour = str(tab.run("page.defaultView.getComputedStyle(page.body).backgroundColor"))
        shades.append(np.mean([int(part) for part in colour[4:-1].split(",")]))
    assert shades[0] > 200
    assert shades[1] < 60


def test_new_steps_appear_without_a_reload_of_the_page(tab: Tab, runs: Path) -> None:
    train(runs / "later", 60, fault=False)
    tab.open("&run=later")
    assert "60 of 256 steps" in str(tab.run("page.body.innerText"))
    train(runs / "newest", 20, fault=False)
    tab.browser.wait_for(f"({PAGE}).body.innerText.includes('newest')", 20)
    assert not tab.browser.errors


@pytest.mark.parametrize("width", [1280, 900])
def test_nothing_lies_beyond_the_edge(tab: Tab, width: int) -> None:
    tab.browser.send(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
    )  # fmt: skip
    tab.open()
    assert tab.run("page.documentElement.scrollWidth <= page.documentElement.clientWidth")
