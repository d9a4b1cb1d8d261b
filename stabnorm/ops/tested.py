"""On which devices the Triton kernels' own tests have passed: the record, and the question.

A kernel can be right on one GPU and wrong on the next, or with another compiler. So `auto` takes one only where its
tests passed with the same device, capability, versions of torch and Triton, and sources. `python -m
stabnorm.ops.selftest` runs them and keeps the outcome in the user's cache; so does `pytest -m gpu`. Records that ship
with the package stand in `tested_devices.json` beside this file.
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

FOLDER = Path(__file__).parent
SHIPPED = FOLDER / "tested_devices.json"
on_change: list[Callable[[], None]] = []  # called when a record was written


def cache_folder() -> Path:
    """Where what was built and recorded on this machine is kept: $STABNORM_CACHE, else the user's cache folder."""
    chosen = os.environ.get("STABNORM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(home) / "stabnorm"


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
    """What a record must agree in: device, capability, versions, and the kernels' sources."""
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
    """Why a kernel is not trusted on a CUDA device; None: its tests have passed there."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    mine = fingerprint(index)
    passed = _passed().get(tuple(mine.values()), frozenset())
    if op in passed:
        return None
    return f"no test record for {mine['device']} with these versions: run `python -m stabnorm.ops.selftest`"


def record(index: int | None, ops: Iterable[str]) -> Path:
    """Write down that the kernels of these ops passed on a device, in the user's cache; returns the file."""
    path = cache_folder() / SHIPPED.name
    mine = fingerprint(index)
    others = [entry for entry in _read(path) if any(entry.get(part) != mine[part] for part in mine)]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps([*others, {**mine, "passed": sorted(ops)}], indent=1) + "\n", encoding="utf-8")
    draft.replace(path)  # two processes that test at once leave one whole file
    _passed.cache_clear()
    for call in on_change:
        call()
    return path


@functools.cache
def _passed() -> dict[tuple[str, ...], frozenset[str]]:
    found: dict[tuple[str, ...], frozenset[str]] = {}
    parts = ("device", "capability", "torch", "triton", "kernels")
    for entry in (*_read(SHIPPED), *_read(cache_folder() / SHIPPED.name)):  # the user's own outweighs ours
        found[tuple(str(entry.get(part)) for part in parts)] = frozenset(entry.get("passed", ()))
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    """The records in a file; none where it is missing or spoilt, for then the tests just run again."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
