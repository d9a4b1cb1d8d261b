"""Where do the pinned versions install? Resolves constraints.txt from metadata for every promised Python and platform.

`make check-install` runs this. Nothing is downloaded but metadata, and nothing is installed. A cell of the table says
"ok", or "no" where the versions contradict each other or have no wheel; then the exit status is 1 and the resolver's
reason follows. A "?" says that the package registry did not answer. Where none answers at all, the script says so and
exits with 0.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux aarch64": "aarch64-manylinux_2_28",
    "macOS arm64": "aarch64-apple-darwin",
    "Windows": "x86_64-pc-windows-msvc",
}
MACOS = "14.0"  # the oldest that torch is built for
SECONDS = 300  # for one resolution, of which each takes a second where the registry answers quickly


def promised_pythons(project: dict[str, object]) -> list[str]:
    """Return the versions of Python that the classifiers of a `[project]` table name, such as "3.11"."""
    classifiers = project["classifiers"]
    assert isinstance(classifiers, list)
    matches = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text) for text in classifiers)
    return [match[1] for match in matches if match]


def resolve(*arguments: str, stdin: str | None = None) -> str | None:
    """Run `uv pip compile`, for wheels only, and return None, or the reason why there is no solution."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--only-binary", ":all:"]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": MACOS}
    ran = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, input=stdin, cwd=ROOT, env=environment, timeout=SECONDS
    )
    return ran.stderr.strip() if ran.returncode else None


def unreachable() -> str | None:
    """Return why no package registry answers, or None where one does."""
    return resolve("-", "--refresh", stdin="packaging\n")


def outcomes(pythons: list[str], constraints: Path) -> Iterator[tuple[str, str, str | None]]:
    """Yield (platform, Python, reason or None) for every promised pair, a platform after the other."""
    pairs = [(platform, python) for platform in PLATFORMS for python in pythons]

    def outcome(pair: tuple[str, str]) -> str | None:
        platform, python = pair
        options = ("--extra", "dev", "--python-version", python, "--python-platform", PLATFORMS[platform])
        return resolve("pyproject.toml", "--constraint", str(constraints), *options)

    with ThreadPoolExecutor(max_workers=4) as pool:  # a resolution mostly waits for the registry
        for pair, reason in zip(pairs, pool.map(outcome, pairs), strict=True):
            yield *pair, reason


def verdict(reason: str | None) -> str:
    """Return what a cell of the table says."""
    if reason is None:
        return "ok"
    return "no" if "No solution found" in reason else "?"


def main(constraints: Path = ROOT / "constraints.txt") -> int:
    """Print the table and return the exit status."""
    if reason := unreachable():
        print(f"check-install is skipped, because no package registry answers:\n{reason}")
        return 0
    pythons = promised_pythons(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    print(f"{'':14}" + "".join(f"{f'Python {python}':>13}" for python in pythons), flush=True)
    reasons: list[tuple[str, str]] = []
    for platform, python, reason in outcomes(pythons, constraints):
        start = f"{platform:14}" if python == pythons[0] else ""
        end = "\n" if python == pythons[-1] else ""
        print(f"{start}{verdict(reason):>13}", end=end, flush=True)
        if reason:
            reasons.append((verdict(reason), f"{platform}, Python {python}:\n{reason}"))
    print(*(text for _, text in reasons), sep="\n\n")
    return int(any(says == "no" for says, _ in reasons))


if __name__ == "__main__":
    sys.exit(main())
