"""The page's answers: right, in strict JSON, and nothing but the page's own files is served."""

import base64
import json
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import numpy as np
import pytest

from stabnorm.dashboard.answers import Answers
from stabnorm.dashboard.server import WEB, Page
from tests.dashboard.records import LAYERS, alert, calm, file_record, growing


@pytest.fixture
def page(tmp_path: Path) -> Page:
    file_record(tmp_path / "grown", growing(), events=[alert(315, LAYERS[1])])
    file_record(tmp_path / "calm", calm())
    answers = Answers({"": tmp_path})
    answers.refresh()
    return Page(answers)


def get(page: Page, address: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    path, _, query = address.partition("?")
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "SCRIPT_NAME": "", "SERVER_NAME": "x",
        "SERVER_PORT": "80", "wsgi.version": (1, 0), "wsgi.input": _Empty(), "wsgi.errors": _Empty(),
        "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False, "wsgi.url_scheme": "http",
    }  # fmt: skip
    got: dict[str, Any] = {}

    def start_response(status: str, headers: list[tuple[str, str]], error: Any = None) -> None:
        got.update(status=int(status[:3]), headers=dict(headers))

    answer = validator(page)(environ, start_response)  # type: ignore[arg-type]  # nobody calls what it returns
    body = b"".join(answer)
    answer.close()  # type: ignore[attr-defined]  # the validator's own
    return got["status"], got["headers"], body


class _Empty:
    def read(self, *size: int) -> bytes:
        return b""

    def readline(self, *size: int) -> bytes:
        return b""

    def readlines(self, *size: int) -> list[bytes]:
        return []

    def __iter__(self) -> Any:
        return iter(())

    def write(self, text: str) -> None: ...
    def writelines(self, lines: Any) -> None: ...
    def flush(self) -> None: ...  # fmt: skip


def answer(page: Page, address: str) -> Any:
    status, _, body = get(page, address)
    assert status == 200, body
    return json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])


def test_the_worst_run_comes_first_with_its_verdict(page: Page) -> None:
    runs = answer(page, "/data/overview")["runs"]
    assert [(run["name"], run["state"]) for run in runs] == [("grown", "unstable"), ("calm", "healthy")]
    assert runs[0]["onsets"][0]["step"] == 315


def test_a_map_holds_the_records_own_numbers(page: Page) -> None:
    shown = answer(page, "/data/map?run=grown&statistic=token_std_mean&first=300&last=349&columns=200")
    assert shown["edges"] == list(range(300, 351))
    np.testing.assert_allclose(unpacked(shown["value"]), growing()[300:350], rtol=1e-6)
    assert shown["armed"] == [256] * 9


def test_a_layers_card_has_every_statistic_at_the_step(page: Page) -> None:
    card = answer(page, "/data/layer?run=grown&layer=norm&statistic=amax&step=320&columns=100")
    table = {row["statistic"]: row["value"] for row in card["table"]}
    assert table["token_std_mean"] == pytest.approx(growing()[320, -1], rel=1e-6)
    assert table["amax"] == pytest.approx(3 * growing()[320, -1], rel=1e-6)
    assert list(card["others"]) == ["calm"]


def test_one_range_holds_all_runs(page: Page) -> None:
    reply = answer(page, "/data/range?statistic=token_std_mean")
    assert reply["high"] == pytest.approx(growing().max(), rel=1e-6)
    assert reply["low"] == pytest.approx(min(calm().min(), growing().min()), rel=1e-6)


def test_a_table_of_every_step_can_be_saved(page: Page) -> None:
    _, headers, body = get(page, "/data/csv?run=calm&statistic=amax&first=10&last=12")
    assert headers["Content-Type"].startswith("text/csv")
    lines = body.decode().split()
    assert lines[0] == ",".join(["step", *LAYERS])
    assert [line.split(",")[0] for line in lines[1:]] == ["10", "11", "12"]


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/data/map?run=other&statistic=amax", 404),
        ("/data/map?run=calm&statistic=other", 404),
        ("/data/layer?run=calm&layer=other&statistic=amax", 404),
        ("/data/map?run=calm", 400),
        ("/data/map?run=calm&statistic=amax&columns=many", 400),
        ("/data/map?run=calm&statistic=amax&unknown=1", 400),
        ("/data/refresh", 404),
        ("/../server.py", 404),
        ("/..%2fserver.py", 404),
        ("/__init__.py", 404),
        ("/sub/index.js", 404),
    ],
)
def test_a_question_without_an_answer_is_refused_in_words(page: Page, address: str, status: int) -> None:
    got, _, body = get(page, address)
    assert got == status
    assert body


def test_nothing_can_be_written(page: Page) -> None:
    assert get(page, "/data/overview", "POST")[0] == 405


@pytest.mark.parametrize("name", sorted(path.name for path in WEB.iterdir()))
def test_every_file_of_the_page_is_served_and_short(page: Page, name: str) -> None:
    status, headers, body = get(page, f"/{name}")
    assert status == 200
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert body.count(b"\n") < 400
    assert b"http://" not in body  # nothing is loaded from another host
    assert b"https://" not in body
    assert b"innerHTML" not in body  # names of layers are text


def test_runs_that_begin_later_are_found(page: Page, tmp_path: Path) -> None:
    file_record(tmp_path / "later", calm(60))
    assert {run["name"] for run in answer(page, "/data/overview")["runs"]} == {"grown", "calm", "later"}
