"""How the C++ library is compiled, for this machine or for a wheel.

The sources beside this file include nothing of torch. So the compiler takes only seconds, and no version of torch, of
Python or of a build system has to match. Nothing here imports torch either, because `setup.py` compiles the library for
a wheel where there is none.

A wheel carries one library for each level of instructions in `LEVELS`. `stabnorm.ops.cpp.library` loads the first one
whose instructions the CPU has.
"""

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
IN_WHEEL = FOLDER / "levels"  # where a wheel has its libraries
FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-exceptions", "-fPIC",
    "-w", "-shared",
)  # fmt: skip
BUILD_SECONDS = 300


class NotBuilt(Exception):
    """There is no library, and the message says why."""


# --- levels ---


@dataclass(frozen=True)
class Level:
    """Instructions that many CPUs have.

    Args:
        name: what compilers call it, and the name of the library's file.
        needs: the features that Linux lists in /proc/cpuinfo for a CPU that has them.
    """

    name: str
    needs: frozenset[str]

    @property
    def file(self) -> Path:
        """The library of this level, which only a wheel has."""
        return IN_WHEEL / f"{self.name}.so"


_V2 = frozenset({"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
LEVELS = {  # by platform.machine(); the fastest first
    "x86_64": (Level("x86-64-v4", _V4), Level("x86-64-v3", _V3), Level("x86-64-v2", _V2)),
    "aarch64": (Level("armv8-a", frozenset({"asimd", "fp"})),),
}


def levels() -> tuple[Level, ...]:
    """Return the levels of this kind of machine; none where no wheel carries a library."""
    return LEVELS.get(platform.machine(), ()) if platform.system() == "Linux" else ()


def build_levels(folder: Path) -> list[Path]:
    """Compile the libraries of a wheel into a folder, and return them; $CXXFLAGS are added.

    Raises:
        NotBuilt: there is no compiler, or the sources cannot be compiled for this kind of machine.
    """
    if not levels():
        raise NotBuilt(f"a wheel carries the library on Linux for {' and '.join(LEVELS)}, not on {platform.platform()}")
    folder.mkdir(parents=True, exist_ok=True)
    command, more, files = compiler(), shlex.split(os.environ.get("CXXFLAGS", "")), []
    for level in levels():
        file = folder / level.file.name
        run(command, *FLAGS, f"-march={level.name}", "-s", *map(str, sources()), *more, "-o", str(file))
        files.append(file)
    return files


# --- the compiler ---


def sources() -> list[Path]:
    """Return the files that are compiled."""
    return sorted(FOLDER.glob("*.cpp"))


def compiler() -> list[str]:
    """Return the compiler's command: $CXX, a path or a command with arguments; else the first compiler on the PATH.

    Raises:
        NotBuilt: there is none.
    """
    chosen = os.environ.get("CXX")
    if chosen:
        words = chosen.split(" ")
        for end in range(len(words), 0, -1):  # a path may have spaces, and arguments may follow it
            if shutil.which(command := " ".join(words[:end])):
                return [command, *shlex.split(" ".join(words[end:]))]
        return shlex.split(chosen)
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return [path]
    raise NotBuilt("no C++ compiler found. Install g++ or clang++, or set CXX")


def has_compiler() -> bool:
    """Whether there is a compiler to build the library with."""
    try:
        return bool(compiler())
    except NotBuilt:
        return False


def run(command: Sequence[str], *arguments: str) -> str:
    """Run the compiler and return what it prints.

    Raises:
        NotBuilt: it failed.
    """
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=BUILD_SECONDS)
    if ran.returncode:
        raise NotBuilt(f"{command[0]} failed: {ran.stderr.strip()[:500] or f'exit status {ran.returncode}'}")
    return ran.stdout
