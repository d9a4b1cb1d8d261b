"""`make wheel`: a wheel for this platform that carries the C++ library, if STABNORM_WHEEL is "library".

Without it the wheel is the same on every platform, and the library is built on the user's machine. All the rest is in
pyproject.toml.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from stabnorm.ops.cpp import build  # noqa: E402 (it imports no torch)

# What any Linux has where `pip` takes a manylinux wheel, in every version. So its tag depends on glibc's version only.
OLDEST_GLIBC = (2, 17)  # the oldest one with a tag of this form
LIBRARIES = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "ld-linux-")
OTHER_VERSIONS = {"GLIBCXX_3.4", "CXXABI_1.3"}


class WithLibrary(Distribution):
    """Is installed where libraries are."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel fits one platform."""
        return True


class BuildWithLibrary(build_py):
    """Adds the libraries to the package."""

    def run(self) -> None:
        """Build the package, then the libraries into it."""
        super().run()
        build.build_levels(Path(self.build_lib) / build.IN_WHEEL.relative_to(ROOT))


class WheelWithLibrary(bdist_wheel):
    """Names the platform and no version of Python, because the library is loaded through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of the oldest system on which every library can be loaded."""
        folder = Path(self.get_finalized_command("build_py").build_lib) / build.IN_WHEEL.relative_to(ROOT)
        return "py3", "none", platform_tag(sorted(folder.glob("*.so")))


def platform_tag(libraries: list[Path]) -> str:
    """Return ``manylinux_2_X_<machine>`` by PEP 600: glibc 2.X has every version of a symbol that the libraries need.

    Raises:
        SystemExit: a library needs what not every such system has.
    """
    if not libraries:
        sys.exit("the wheel has no library")
    glibc = OLDEST_GLIBC
    for library in libraries:
        command = ["objdump", "-p", str(library)]
        headers = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"^\s*NEEDED\s+(\S+)", headers, re.MULTILINE)
        versions = re.findall(r"^\s*0x\w+ 0x\w+ \d+ (\S+)", headers.partition("Version References:")[2], re.MULTILINE)
        of_glibc = {version for version in versions if re.fullmatch(r"GLIBC_[\d.]+", version)}
        unknown = {name for name in needed if not name.startswith(LIBRARIES)} | {*versions} - of_glibc - OTHER_VERSIONS
        if unknown:
            sys.exit(f"{library.name} needs {', '.join(sorted(unknown))}, which not every Linux has")
        glibc = max(glibc, *(tuple(map(int, version.removeprefix("GLIBC_").split("."))) for version in of_glibc))
    return f"manylinux_{glibc[0]}_{glibc[1]}_{platform.machine()}"


if os.environ.get("STABNORM_WHEEL") == "library":
    if not platform.libc_ver()[0].startswith("glibc"):
        sys.exit("a wheel with the library is built on a Linux with glibc")
    setup(distclass=WithLibrary, cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelWithLibrary})
else:
    setup()
