"""Kernels are admitted by their self-test, which runs by itself: once for each device, with these versions and sources.

The self-test runs in a process of its own, so that it takes nothing from the training: no random number, no memory of
the training's process, no stream, and not its life either if a kernel crashes. `stabnorm.ops.tested` keeps the result.

* On a CPU the process builds the C++ library, unless it came with the wheel, and tests it in the background, some 20
  seconds at low priority. Until then ATen runs.
* On a GPU `StabilityMonitor.attach` waits for it, before the first step, because the kernels need the GPU's memory.

Of several processes that start together, one tests.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import stabnorm
from stabnorm._log import logger
from stabnorm.ops import tested
from stabnorm.ops.cache import cache_folder, made
from stabnorm.ops.cpp import library

STALE_SECONDS = 900.0  # a lock as old as this was left by a process that was killed
WAIT_SECONDS = 300.0  # for a GPU's kernels, which have to be compiled

_running: dict[torch.device, "subprocess.Popen[bytes] | None"] = {}  # None: nothing was started here
_leaving: list["subprocess.Popen[bytes]"] = []  # have removed their lock and are about to exit


def start(device: torch.device) -> None:
    """Start the self-test of a device in the background, unless its kernels were tested or are being tested."""
    if device in _running or tested.entry_for(device) is not None:
        return
    _running[device] = None
    if device.type == "cpu" and not library.can_be_had():
        logger.info("ATen runs on the CPU: stabnorm came without a C++ library for it, and there is no compiler here")
        return
    lock = _lock_of(device)
    try:
        if _is_taken(lock):
            return
        _running[device] = subprocess.Popen(
            [sys.executable, "-P", "-m", "stabnorm.ops.selftest", "--device", str(device), "--background", str(lock)],
            env=_environment(device),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it goes on where the training ends sooner, so that the next one finds its result
        )
    except OSError as error:
        with contextlib.suppress(OSError):
            lock.unlink()  # nothing runs that would
        logger.info("the self-test of the kernels for %s could not start: %s", device, error)
        return
    logger.info("the kernels for %s are tested now, once; until then slower ones run", device)


def wait(device: torch.device, seconds: float = WAIT_SECONDS) -> None:
    """Wait until the self-test of a device has ended, whichever process runs it; not if its kernels were tested."""
    if tested.entry_for(device) is not None:
        return  # a lock was then left by a process that was killed
    deadline, lock = time.monotonic() + seconds, _lock_of(device)
    if lock.exists():
        logger.warning("stabnorm tests its kernels on %s before the first step; that happens once", device)
    while time.monotonic() < deadline and lock.exists() and not _has_ended(device):
        time.sleep(0.2)
    tested.read_again()


def ended() -> bool:
    """Whether a self-test that this process started has ended since the last call."""
    # A Popen that is dropped before its process has exited raises a ResourceWarning, so it is kept until then.
    _leaving[:] = [process for process in _leaving if process.poll() is None]
    over = {device: process for device, process in _running.items() if process is not None and _has_ended(device)}
    for device, process in over.items():
        _leaving.append(process)
        _running[device] = None
    if over:
        tested.read_again()
    return bool(over)


def _has_ended(device: torch.device) -> bool:
    """Whether a self-test that was started here is over: it has removed its lock, or died."""
    process = _running.get(device)
    return process is not None and (process.poll() is not None or not _lock_of(device).exists())


def _lock_of(device: torch.device) -> Path:
    return cache_folder() / f"selftest-{str(device).replace(':', '-')}.lock"


def _is_taken(lock: Path) -> bool:
    """Take the lock; whether another process has it."""
    made(lock.parent)
    with contextlib.suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > STALE_SECONDS:
            lock.unlink()
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return True
    return False


def _environment(device: torch.device) -> dict[str, str]:
    """Return the variables of the process: it imports this package, and sees the devices that this process sees."""
    package = str(Path(stabnorm.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": path, "STABNORM_KERNELS": "aten"} | hidden
