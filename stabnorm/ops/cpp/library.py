"""The C++ library for CPUs: it comes with a wheel, or is built on the machine at first use and kept; and it is loaded.

Functions get addresses of memory. The arguments of a function are read from its declaration in the sources, so that a
call that does not fit is refused.

A library that was built is kept in the cache folder. Its name is a hash of its sources, its compiler and the
instructions of the machine, so another machine with the same home folder builds its own. A library that is damaged, or
that another user may have written, is built again, see `stabnorm.ops.cache`. `stabnorm.ops.cpp.build` compiles.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stabnorm._log import logger
from stabnorm.ops import tested
from stabnorm.ops.cache import cache_folder, is_kept, keep, made, remove_old_drafts
from stabnorm.ops.cpp import build
from stabnorm.ops.cpp.build import FLAGS, FOLDER, NotBuilt

# The first flags that the compiler accepts are used. Apple's compiler and others for ARM know -mcpu=native only.
MACHINE: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
# On Linux the library finds the threads of torch's own OpenMP runtime, see vectors.h. Elsewhere OpenMP is linked under
# the name of torch's copy, so that both share their threads. Without it, one thread runs.
TORCH_LIBRARIES = str(Path(torch.__file__).parent / "lib")
OPENMP = ("-Xpreprocessor", "-fopenmp", f"-L{TORCH_LIBRARIES}", f"-Wl,-rpath,{TORCH_LIBRARIES}", "-lomp")
THREADS: tuple[tuple[str, ...], ...] = ((),) if platform.system() == "Linux" else (OPENMP, ())
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PREFIX = "stabnorm_"

_T = TypeVar("_T")

_C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "void": None}
_DECLARATION = re.compile(rf"^(?:extern \"C\" )?(int64_t|void) {PREFIX}(\w+)\(([^)]*)\)", re.MULTILINE)


# --- calls ---


def call(name: str, *arguments: Tensor | float | int | None) -> int:
    """Call the C function ``stabnorm_<name>``; pass contiguous tensors, or their strides.

    Raises:
        TypeError: the arguments are not those of the function's declaration.
    """
    run = function(name)
    if len(arguments) != len(run.argtypes):  # C would read arguments that were not passed
        raise TypeError(f"{PREFIX}{name} takes {len(run.argtypes)} arguments, got {len(arguments)}")
    passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return run(*passed)  # type: ignore[no-any-return]


def function(name: str) -> Any:
    """Return the C function ``stabnorm_<name>`` itself, for a caller that has prepared its arguments."""
    return getattr(_library(), PREFIX + name)


def shape_of(rows: Tensor) -> tuple[int, int, int]:
    """Return type, R and C, which many functions take."""
    return TYPES[rows.dtype], rows.shape[0], rows.shape[1]


def empty_like(rows: Tensor) -> Tensor:
    """Return contiguous memory of the same shape."""
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def vector(t: Tensor) -> Tensor:
    """Return ``t [C]``, contiguous and in float32."""
    return t.detach().float().contiguous()


def maybe_vector(t: Tensor | None) -> Tensor | None:
    """Return the same; None for None."""
    return None if t is None else vector(t)


def maybe_whole(valid: Tensor | None) -> Tensor | None:
    """Return a contiguous mask; None for None."""
    return None if valid is None else valid.contiguous()


def like(rows: Tensor, dy: Tensor) -> Tensor:
    """Return ``dy``, contiguous and in the rows' dtype."""
    return dy.to(rows.dtype).contiguous()


# --- the library ---


def why_not() -> str | None:
    """Return why there is no library; None if it is built and loaded."""
    try:
        _library()
    except NotBuilt as error:
        return str(error)
    return None


_failure: str | None = None


def _library() -> ctypes.CDLL:
    global _failure
    if _failure is not None:  # there is one attempt and one warning
        raise NotBuilt(_failure)
    try:
        return _load()
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError, NotBuilt) as error:
        _failure = str(error)
        logger.warning("the C++ backend for CPUs cannot run, so ATen's backend runs instead: %s", _failure)
        raise NotBuilt(_failure) from error


def can_be_had() -> bool:
    """Whether the library came with the wheel, or there is a compiler to build it with."""
    return _in_wheel() is not None or build.has_compiler()


def path() -> Path:
    """The library's file. It is built now unless that was done before, or it came with the wheel."""
    return _tested() or _in_wheel() or _built()


@functools.cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(path()))
    for name, (result, arguments) in signatures().items():
        function = getattr(library, PREFIX + name)
        function.restype, function.argtypes = result, arguments
    return library


def _tested() -> Path | None:
    """The library that was built and has passed its self-test on this machine, which needs no compiler any more."""
    entry = tested.entry_for(torch.device("cpu"))
    path = None if entry is None or "library" not in entry else cache_folder() / Path(entry["library"]).name
    return path if path is not None and is_kept(path) else None


def _in_wheel() -> Path | None:
    """The fastest library of the wheel whose instructions this CPU has; None where the package has none for it."""
    features = set(tested.features_of_cpu().split())
    return next((level.file for level in build.levels() if level.needs <= features and level.file.exists()), None)


def signatures() -> dict[str, tuple[type | None, tuple[type, ...]]]:
    """Return types of the result and the arguments of every function, by its name, from the sources."""
    texts = [path.read_text() for path in build.sources()]
    return {
        name: (_C_TYPES[result], tuple(_c_type(argument) for argument in arguments.split(",")))
        for text in texts
        for result, name, arguments in _DECLARATION.findall(text)
    }


def _c_type(argument: str) -> type:
    kind = ctypes.c_void_p if "*" in argument else _C_TYPES[argument.split()[0]]
    assert kind is not None
    return kind


# --- the build ---


def _built() -> Path:
    """Return the library's file; build it if it does not exist."""
    compiler = build.compiler()
    ask = ("-dM", "-E", "-x", "c++", os.devnull)
    machine = _first(MACHINE, lambda flags: build.run(compiler, *flags, *ask))
    # All macros that the compiler defines, among them its version and the instructions of this machine.
    defined = build.run(compiler, *machine, *ask)
    texts = [path.read_bytes() for path in (*build.sources(), *sorted(FOLDER.glob("*.h")))]
    parts = [defined.encode(), " ".join((*FLAGS, *machine)).encode(), *texts]
    path = made(cache_folder()) / f"cpu-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not is_kept(path):
        remove_old_drafts(path.parent, "cpu-*.draft-*")
        draft = path.with_suffix(f".draft-{os.getpid()}")
        logger.info("building the C++ backend for CPUs in %s", path.parent)
        try:
            arguments = (*FLAGS, *machine, *map(str, build.sources()), "-o", str(draft))
            threads = _first(THREADS, lambda flags: build.run(compiler, *flags, *arguments))
            if threads == () != THREADS[0]:
                logger.info("the C++ backend runs on one thread: %s has no OpenMP", compiler[0])
            keep(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    return path


def _first(options: Sequence[_T], attempt: Callable[[_T], object]) -> _T:
    """Return the first option with which an attempt succeeds; raise the error of the last one."""
    for option in options[:-1]:
        with contextlib.suppress(NotBuilt):
            attempt(option)
            return option
    attempt(options[-1])
    return options[-1]
