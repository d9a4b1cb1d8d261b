"""The record of the devices on which the self-test of the Triton kernels and of the C++ library has passed.

A kernel can be right on one device, and wrong on another or with another compiler. So `auto` uses a kernel only if its
self-test passed with the same device, versions and sources. `stabnorm.ops.admission` runs the self-test by itself,
once, and writes the result into the user's cache. `python -m stabnorm.ops.selftest` and `pytest -m gpu` do it, too.
The file `tested_devices.json` has the records that come with the package.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from stabnorm.ops.cache import cache_folder, is_private, made

FOLDER = Path(__file__).parent
SHIPPED = FOLDER / "tested_devices.json"
PARTS = ("device", "capability", "torch", "triton", "kernels")  # what must be the same
on_change: list[Callable[[], None]] = []  # called after a record was written


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _hash_of(folder: str) -> str:
    kinds = (".py", ".cpp", ".h", ".so")  # a library that came with the wheel has records of its own
    sources = sorted(path for path in (FOLDER / folder).rglob("*") if path.suffix in kinds)
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def features_of_cpu() -> str:
    """Return the names of the CPU's instructions, as Linux lists them; elsewhere, the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    listed = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return listed.partition(":")[2]


@functools.cache
def fingerprint(device: torch.device) -> dict[str, str]:
    """Return what must be the same in a record: the device, the versions, and the sources of the kernels."""
    if device.type == "cpu":
        return {
            "device": f"cpu {platform.system()} {platform.machine()}",
            "capability": hashlib.sha256(features_of_cpu().encode()).hexdigest()[:16],
            "torch": torch.__version__,
            "triton": "",
            "kernels": _hash_of("cpp"),
        }
    capability = torch.cuda.get_device_capability(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": f"{capability[0]}.{capability[1]}",
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "kernels": _hash_of("triton"),
    }


def entry_for(device: torch.device) -> dict[str, Any] | None:
    """Return the record of a device, whose kernels may have failed; None if they were never tested there."""
    return _entries().get(tuple(fingerprint(device).values()))


def why_untested(op: str, device: torch.device) -> str | None:
    """Return why a kernel may not run on a device; None if its self-test has passed there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    entry = entry_for(device)
    if entry is None:
        name = fingerprint(device)["device"]
        return f"was not tested on {name} with these versions: `python -m stabnorm.ops.selftest` does it"
    if op in entry.get("passed", ()):
        return None
    return entry.get("why") or "failed its self-test here: `python -m stabnorm.ops.selftest` shows how"


def record(device: torch.device, ops: Iterable[str], **facts: str) -> Path:
    """Record in the user's cache which ops' kernels passed on a device, and return the file.

    Args:
        device: where they were tested.
        ops: those that passed.
        **facts: what else to note: the C++ library's file as `library`; as `why` the reason why there are no kernels.
    """
    path = made(cache_folder()) / SHIPPED.name
    own = fingerprint(device)
    others = [entry for entry in _read(path) if any(entry.get(part) != own[part] for part in own)]
    draft = path.with_suffix(f".{os.getpid()}")
    text = json.dumps([*others, {**own, **facts, "passed": sorted(ops)}], indent=1)
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)  # atomic, because two processes may test at the same time
    read_again()
    for call in on_change:
        call()
    return path


def read_again() -> None:
    """Forget what was read, because another process may have written since."""
    _entries.cache_clear()


@functools.cache
def _entries() -> dict[tuple[str, ...], dict[str, Any]]:
    entries = (*_read(SHIPPED), *_of_user())  # the user's record wins
    return {tuple(str(entry.get(part)) for part in PARTS): entry for entry in entries}


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
