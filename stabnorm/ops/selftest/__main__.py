"""`python -m stabnorm.ops.selftest` compares all backends, prints the result and records it.

Args: --device cpu|cuda|cuda:N ... Default: all devices. `stabnorm.ops.admission` adds --background LOCK. Then only
the backend that waits to be admitted is tested, at low priority, and the file LOCK is removed at the end.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from stabnorm.ops import tested
from stabnorm.ops.cpp import library
from stabnorm.ops.selftest import compare

ADMITTED = {"cpu": "cpp", "cuda": "triton"}  # the backend that its self-test admits, by the kind of device


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and record; return the number of backends that failed."""
    parser = argparse.ArgumentParser(prog="python -m stabnorm.ops.selftest", description=compare.__module__)
    everything = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    parser.add_argument("--device", nargs="+", default=everything)
    parser.add_argument("--background", type=Path, metavar="LOCK")
    options = parser.parse_args(arguments)
    if options.background is None:
        return sum(_test(torch.device(device)) for device in options.device)
    try:
        if hasattr(os, "nice"):  # Windows has no such thing
            os.nice(10)
        return sum(_test(torch.device(device), admitted_only=True) for device in options.device)
    finally:
        options.background.unlink(missing_ok=True)


def _test(device: torch.device, *, admitted_only: bool = False) -> int:
    admitted, failed, passed = ADMITTED.get(device.type), 0, []
    for op, backend, wrong in compare(device, only=admitted if admitted_only else None):
        print(f"{device}  {op.name:20}  {backend:9}  {wrong[0] if wrong else 'passed'}", flush=True)
        failed += bool(wrong)
        if backend == admitted and not wrong:
            passed.append(op.name)
    facts = {}
    if device.type == "cpu":
        why = library.why_not()
        facts = {"why": why} if why is not None else {"library": library.path().name}
    with contextlib.suppress(OSError):  # a cache that cannot be written: the next process tests again
        print(f"{device}: recorded in {tested.record(device, passed, **facts)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
