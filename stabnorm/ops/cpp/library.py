"""The C++ bodies for CPUs: built on the machine when first asked for, kept, and loaded.

The sources in `cpp/` know nothing of torch: the compiler gets them alone and takes seconds, and no version of torch, of
Python or of a build system has to match. Memory goes in as addresses. OpenMP is linked by the name that torch's own
copy has, so that both share one set of threads.

A library is kept in the cache folder under a name that tells its sources, its compiler and the instructions that the
machine has; another machine with the same home builds its own.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from stabnorm.ops.tested import cache_folder

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BUILD_SECONDS = 300

logger = logging.getLogger("stabnorm")

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ROWS = (_INT, _SIZE, _SIZE)  # type, R, C
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "moments": (
        _SIZE,
        (_POINTER, *_ROWS, _POINTER, _INT, _INT, _INT, _FLOAT, _INT, _POINTER, _SIZE, _POINTER),
    ),
    "observed": (
        _SIZE,
        (_POINTER, *_ROWS, _POINTER, _INT, _FLOAT, _INT, _INT, _POINTER, _SIZE, *[_POINTER] * 6),
    ),
    "norm_gradient": (None, (_POINTER, _POINTER, *_ROWS, _INT, *[_POINTER] * 3, _INT, _POINTER, _POINTER)),
    "affine_square": (_SIZE, (_POINTER, *_ROWS, *[_POINTER] * 3, _INT, _POINTER, _POINTER)),
    "gradient_sums": (None, (_POINTER, _POINTER, *_ROWS, *[_POINTER] * 3, _INT, _POINTER, _POINTER)),
    "batch_moments": (_SIZE, (_POINTER, *_ROWS, _POINTER, _INT, _INT, _POINTER, _POINTER)),
    "affine": (None, (_POINTER, *_ROWS, _POINTER, _POINTER, _INT, _POINTER)),
    "sums": (None, (_POINTER, _POINTER, *_ROWS, _POINTER, _POINTER, _INT, _POINTER)),
    "gradient": (None, (_POINTER, _POINTER, *_ROWS, *[_POINTER] * 5, _INT, _POINTER)),
    "blend": (None, (_POINTER, *_ROWS, _FLOAT, *[_POINTER] * 3, _INT, *[_POINTER] * 3)),
    "blend_sums": (None, (_POINTER, _POINTER, *_ROWS, *[_POINTER] * 4, _INT, _POINTER)),
    "blend_gradient": (None, (_POINTER, _POINTER, *_ROWS, *[_POINTER] * 8, _INT, _POINTER)),
    "scale_groups": (None, (_POINTER, *_ROWS, _SIZE, _FLOAT, _INT, _POINTER, _POINTER)),
    "scale_groups_gradient": (None, (_POINTER, _POINTER, *_ROWS, _SIZE, _POINTER, _INT, _POINTER)),
}


def call(name: str, *arguments: Tensor | float | int | None) -> int:
    """The C function ``stabnorm_<name>``; tensors must be contiguous, or their strides be given."""
    passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    function = getattr(_library(), f"stabnorm_{name}")
    return function(*passed)  # type: ignore[no-any-return]


def why_not() -> str | None:
    """Why there is no library; None: it is built and loaded."""
    try:
        _library()
    except _NotBuilt as error:
        return str(error)
    return None


class _NotBuilt(Exception):
    pass


_failure: str | None = None


def _library() -> ctypes.CDLL:
    global _failure
    if _failure is not None:  # one attempt, one warning
        raise _NotBuilt(_failure)
    try:
        return _load()
    except (OSError, AttributeError, subprocess.SubprocessError, _NotBuilt) as error:
        _failure = str(error)
        logger.warning("the C++ bodies for CPUs are not there, ATen's run instead: %s", _failure)
        raise _NotBuilt(_failure) from error


@functools.cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"stabnorm_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def _built() -> Path:
    """The library's file, made now unless it was made before."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise _NotBuilt("no C++ compiler found. Install g++ or clang++, or set CXX")
    sources = sorted(FOLDER.glob("*.cpp"))
    texts = [path.read_bytes() for path in sorted((*sources, *FOLDER.glob("*.h")))]
    # Everything the compiler would define, its version and the instructions of this machine among it.
    machine = _run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    parts = [machine.encode(), " ".join(FLAGS).encode(), *texts]
    path = cache_folder() / f"cpu-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        logger.info("building the C++ bodies for CPUs in %s", path.parent)
        try:
            _run(compiler, *FLAGS, "-shared", "-fPIC", "-w", *map(str, sources), "-o", str(draft))
            draft.replace(path)  # two processes that build at once leave one whole file
        finally:
            draft.unlink(missing_ok=True)
    return path


def _run(compiler: str, *arguments: str) -> str:
    ran = subprocess.run([*compiler.split(), *arguments], capture_output=True, text=True, timeout=BUILD_SECONDS)
    if ran.returncode:
        raise _NotBuilt(f"{compiler} failed: {ran.stderr.strip()[:500] or f'exit status {ran.returncode}'}")
    return ran.stdout
