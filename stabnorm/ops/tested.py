"""The record of the devices on which the tests of the Triton kernels have passed.

A kernel can be right on one GPU, and wrong on another or with another compiler. So `auto` uses a kernel only if its
tests passed with the same device, capability, versions of torch and Triton, and sources.
`python -m stabnorm.ops.selftest` and `pytest -m gpu` run the tests and write the result into the user's cache. The file
`tested_devices.json` has the records that come with the package.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from stabnorm.ops.cache import cache_folder, is_private, made

FOLDER = Path(__file__).parent
SHIPPED = FOLDER / "tested_devices.json"
on_change: list[Callable[[], None]] = []  # called after a record was written


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels_hash() -> str:
    sources = sorted((FOLDER / "triton").glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]


@functools.cache
def fingerprint(index: int | None) -> dict[str, str]:
    """Return what must be the same in a record: device, capability, versions, and the sources of the kernels."""
    triton = importlib.import_module("triton")
    capability = torch.cuda.get_device_capability(index)
    return {
        "device": torch.cuda.get_device_name(index),
        "capability": f"{capability[0]}.{capability[1]}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": _kernels_hash(),
    }


def why_untested(op: str, index: int | None) -> str | None:
    """Return why a kernel may not run on a CUDA device; None if its tests have passed there."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    own = fingerprint(index)
    passed = _passed().get(tuple(own.values()), frozenset())
    if op in passed:
        return None
    return f"no test record for {own['device']} with these versions: run `python -m stabnorm.ops.selftest`"


def record(index: int | None, ops: Iterable[str]) -> Path:
    """Record in the user's cache that the kernels of these ops passed on a device, and return the file."""
    path = made(cache_folder()) / SHIPPED.name
    own = fingerprint(index)
    others = [entry for entry in _read(path) if any(entry.get(part) != own[part] for part in own)]
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps([*others, {**own, "passed": sorted(ops)}], indent=1) + "\n", encoding="utf-8")
    draft.replace(path)  # atomic, because two processes may test at the same time
    _passed.cache_clear()
    for call in on_change:
        call()
    return path


@functools.cache
def _passed() -> dict[tuple[str, ...], frozenset[str]]:
    passed: dict[tuple[str, ...], frozenset[str]] = {}
    parts = ("device", "capability", "torch", "triton", "kernels")
    for entry in (*_read(SHIPPED), *_of_user()):  # the user's record wins
        passed[tuple(str(entry.get(part)) for part in parts)] = frozenset(entry.get("passed", ()))
    return passed


def _of_user() -> list[dict[str, Any]]:
    path = cache_folder() / SHIPPED.name
    return _read(path) if path.exists() and is_private(path.parent) and is_private(path) else []


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the records in a file; none if it is missing or damaged, because then the tests simply run again."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
