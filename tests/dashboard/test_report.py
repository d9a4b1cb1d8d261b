"""A report is the page in one file, and as Markdown it is what a pull request can hold."""

import re
from pathlib import Path

import numpy as np
import pytest

from stabnorm.cli import main
from stabnorm.dashboard.answers import Answers
from stabnorm.dashboard.report import code, html_report, markdown_report, one_script, plain, write_report
from tests.dashboard.browser import Browser, needs_browser
from tests.dashboard.records import LAYERS, alert, calm, event_record, file_record, growing

HOSTILE = (
    "<script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "quote'\"`back``ticks",
    "line\nbreak|bar\r\x1b[31mred",
    "[link](javascript:alert(1)) **bold** _under_",
    "x" * 300,
    "слой.норма",
    "層.正規化",
    "\u202eright to left",
    "</script><b>",
    "=SUM(A1)",
)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose layers have the names that somebody means harm with; all of them move, and one raises an alert."""
    scale = growing(first_layer=0)[:, : len(HOSTILE)]
    scale = np.concatenate([scale, scale[:, : len(HOSTILE) - scale.shape[1]]], axis=1)
    events = [alert(310 + i, name) for i, name in enumerate(HOSTILE)]
    return file_record(tmp_path / "<b>run", scale, layers=HOSTILE, events=events).parent


def answers_of(folder: Path) -> Answers:
    answers = Answers({"": folder})
    answers.refresh()
    return answers


def test_the_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    file_record(tmp_path / "run", growing(), events=[alert(315, "norm")])
    text = html_report(answers_of(tmp_path))
    assert not re.search(r"(src|href)=", text.split("<script>")[0])
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text


def test_the_modules_become_one_script_that_exports_and_imports_nothing() -> None:
    script = one_script()
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    assert "</script" not in script
    assert script.index("const dom_js") < script.index("const index_js")


@needs_browser
@pytest.mark.slow
def test_the_report_opens_from_a_file_and_zooms(tmp_path: Path) -> None:
    file_record(tmp_path / "grown", growing(), events=[alert(315, LAYERS[2])])
    file_record(tmp_path / "calm", calm())
    path = write_report(tmp_path, None)
    with Browser() as browser:
        browser.go(path.as_uri())
        browser.wait_for("document.body.dataset.drawn")
        assert "unstable" in browser.run("document.querySelector('.verdict').innerText")
        assert "At step 315" in browser.run("document.getElementById('layer').innerText")
        browser.run("document.querySelectorAll('.verdict')[1].click()")
        browser.wait_for("document.querySelectorAll('.verdict')[1].classList.contains('chosen')")
        browser.go(f"{path.as_uri()}#run=grown&first=300&last=340&colour=sigmas")
        browser.run("location.reload()")
        browser.wait_for("document.body && document.body.dataset.drawn")
        label = browser.wait_for("document.getElementById('map').getAttribute('aria-label')")
        assert "300" in label
        assert not browser.errors
        assert {request.split(":")[0] for request in browser.requests} <= {"file", "data", "blob", "about"}


@needs_browser
@pytest.mark.slow
def test_hostile_names_are_text_in_the_page(hostile: Path) -> None:
    path = write_report(hostile, hostile / "report.html")
    with Browser() as browser:
        browser.go(path.as_uri())
        browser.wait_for("document.body.dataset.drawn")
        for index in range(len(HOSTILE)):
            drawn = browser.run("document.body.dataset.drawn")
            browser.run(f"document.querySelectorAll('.alert')[{min(index, 0)}].click()")
            browser.key("ArrowDown")
            browser.wait_for(f"document.body.dataset.drawn > {drawn}")
        assert browser.run("document.title") == "Stability: <b>run"
        assert browser.run("document.querySelectorAll('main img, main b, main script, main a').length") == (
            2 * browser.run("document.querySelectorAll('.advice').length")
        ), "the only bold words are those of the advice"
        assert not browser.errors
        assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_hostile_names_are_text_in_markdown(hostile: Path) -> None:
    text = markdown_report(answers_of(hostile).runs())
    assert "\x1b" not in text
    assert "\u202e" not in text
    for name in HOSTILE[:2]:  # outside code, every angle bracket is escaped
        assert code(name, cell=True) in text
        without_code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
        assert not re.search(r"(?<!\\)<", without_code)
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {5}, "no name adds a cell or ends a line"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_as_code_keeps_its_letters(name: str) -> None:
    shown = code(name)
    assert "\n" not in shown
    fence = re.match("`+", shown)
    assert fence is not None
    assert fence[0] not in shown[len(fence[0]) : -len(fence[0])]
    assert not re.search(r"(?<!\\)[<>*|]", plain(name))


def test_a_calm_run_and_a_killed_one_are_reported(tmp_path: Path) -> None:
    folder = event_record(tmp_path / "killed", calm(300))
    (path,) = folder.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-40])
    text = markdown_report(answers_of(tmp_path).runs())
    assert "killed" in text
    assert "250" in text


def test_steps_that_are_not_finite_reach_the_report(tmp_path: Path) -> None:
    scale = growing()
    scale[350:], scale[340, 2] = np.nan, np.inf
    events = [alert(350, LAYERS[0], "nonfinite", float("nan"))]
    file_record(tmp_path, scale, events=events)
    answers = answers_of(tmp_path)
    assert "NaN or infinity" in markdown_report(answers.runs())
    assert len(html_report(answers)) > 10_000


def test_many_layers_make_no_huge_report(tmp_path: Path) -> None:
    names = tuple(f"block.{i}.norm" for i in range(300))
    more = {f"own_{i}": calm(200, 300) for i in range(10)}
    file_record(tmp_path, calm(200, 300), layers=names, more=more)
    assert len(html_report(answers_of(tmp_path))) < 25e6


@pytest.mark.parametrize(("options", "name"), [([], "report.html"), (["--format", "md"], "report.md")])
def test_the_command_writes_beside_the_record(options: list[str], name: str, tmp_path: Path) -> None:
    file_record(tmp_path / "run", calm(60))
    assert main(["report", str(tmp_path / "run"), *options]) == 0
    assert (tmp_path / "run" / name).stat().st_size > 100


def test_the_outputs_name_tells_the_format(tmp_path: Path) -> None:
    file_record(tmp_path / "run", calm(60))
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "mine.md")]) == 0
    assert (tmp_path / "mine.md").read_text(encoding="utf-8").startswith("# Stability")


@pytest.mark.parametrize("command", [["report", "nowhere"], ["view", "nowhere"]])
def test_a_folder_without_a_record_is_an_error_in_words(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], str(tmp_path / command[1])]) == 1
    assert "folder" in capsys.readouterr().err


def test_writing_the_report_again_gives_the_same_file(tmp_path: Path) -> None:
    record = file_record(tmp_path / "run", calm(60))
    first = write_report(record, None).read_bytes()
    assert write_report(record, None).read_bytes() == first
