"""`stabnorm view RUN`: a small server on this machine that shows runs live, without TensorBoard."""

import os
import socketserver
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from stabnorm.dashboard.answers import Answers
from stabnorm.dashboard.server import Page


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing about each request."""


def serve(folder: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 6007) -> WSGIServer:
    """Return a server of the runs below a folder; `serve_forever` runs it.

    Args:
        folder: the record of one run, or a folder above several.
        host: the address to listen at; the default answers only this machine.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    return make_server(host, port, Page(Answers({"": Path(folder)})), server_class=_Server, handler_class=_Quiet)
