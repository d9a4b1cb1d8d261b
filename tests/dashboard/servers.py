"""A TensorBoard for tests, on a port that the system gives it."""

import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS = 180  # a busy machine takes long to import TensorBoard


@contextmanager
def serving(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a command that starts a TensorBoard; give the address that it prints once it serves."""
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen([*command, "--port=0"], env=dict(environment), stdout=output, stderr=output) as server,
    ):
        try:
            yield _address(server, log)
        finally:
            server.terminate()


def _address(server: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        printed = log.read_text(encoding="utf-8")
        if said := re.search(r"http://[^/\s]+:\d+", printed):
            return said.group()
        assert server.poll() is None, printed
        time.sleep(0.1)
    raise TimeoutError(printed)
