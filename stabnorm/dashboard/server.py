"""Serve the page and its answers: one WSGI application for TensorBoard and for `stabnorm view`."""

import gzip
import inspect
import json
import threading
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl

from stabnorm.dashboard.answers import Answers, Unknown
from stabnorm.monitor._record_format import dumps

WEB = files("stabnorm.dashboard").joinpath("web")
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}

StartResponse = Callable[..., Any]


class Page:
    """The WSGI application.

    Args:
        answers: what is known of the runs.
        prefix: the part of the address before the page's own, as TensorBoard's ``/data/plugin/stabnorm``. Default: "".
    """

    def __init__(self, answers: Answers, prefix: str = "") -> None:
        self._answers, self._prefix = answers, prefix
        self._one_at_a_time = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        path = environ.get("PATH_INFO", "/")
        path = path[path.find(self._prefix) + len(self._prefix) :].strip("/") or "index.html"
        asked = dict(parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
        if environ.get("REQUEST_METHOD", "GET") != "GET":
            status, kind, body = "405 Method Not Allowed", "text/plain", b"this page only reads"
        elif path.startswith("data/"):
            status, kind, body = self._data(path.removeprefix("data/"), asked)
        else:
            status, kind, body = _static(path)
        headers = [
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-cache"),
            (
                "Content-Security-Policy",
                "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:",
            ),
        ]
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", "") and len(body) > 2000:
            body = gzip.compress(body, 1)
            headers.append(("Content-Encoding", "gzip"))
        headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return [body]

    def _data(self, question: str, asked: dict[str, str]) -> tuple[str, str, bytes]:
        with self._one_at_a_time:
            try:
                if question == "csv":
                    return "200 OK", "text/csv", self._answers.csv(**_arguments(self._answers.csv, asked)).encode()
                answer = self._answers.questions().get(question)
                if answer is None:
                    raise Unknown(f"there is no question {question!r}")
                if question == "overview":
                    self._answers.refresh()
                return "200 OK", "application/json", dumps(answer(**_arguments(answer, asked))).encode()
            except (Unknown, TypeError, ValueError) as error:
                status = "404 Not Found" if isinstance(error, Unknown) else "400 Bad Request"
                return status, "application/json", json.dumps({"error": str(error.args[0])}).encode()


def _arguments(answer: Callable[..., Any], asked: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of a question: text, or whole numbers where it takes numbers."""
    text = {name for name, p in inspect.signature(answer).parameters.items() if p.annotation is str}
    return {name: value if name in text else int(value) for name, value in asked.items()}


def _static(path: str) -> tuple[str, str, bytes]:
    name = path.rpartition("/")[2]
    file = WEB.joinpath(name)
    kind = _TYPES.get(f".{name.rpartition('.')[2]}")
    if name != path or kind is None or not file.is_file():
        return "404 Not Found", "text/plain", b"there is no such file"
    return "200 OK", kind, file.read_bytes()
