"""Compiled code from the cache runs as the user, so it is used only where no one else can have written it."""

import os
import time
from pathlib import Path

import pytest

from stabnorm.ops import cache
from stabnorm.ops.cpp import build, library

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the rights of Windows are others")
root_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, and a compiler that notes what it builds."""
    files: list[Path] = []

    def compile_(compiler: list[str], *arguments: str) -> str:
        if "-shared" in arguments:
            files.append(Path(arguments[-1]))
            files[-1].write_bytes(b"a library" * 1000)
        return "what it defines"

    monkeypatch.setenv("STABNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "run", compile_)
    return files


def test_the_folder_is_for_the_user_alone_whatever_the_umask(built: list[Path], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = library._built()
    finally:
        os.umask(before)
    assert path.parent == tmp_path / "cache"
    assert [oct(file.stat().st_mode & 0o777) for file in (path.parent, path)] == ["0o700", "0o700"]
    assert all(cache.is_private(file) for file in path.parent.iterdir())
    assert library._built() == path
    assert len(built) == 1


@pytest.mark.parametrize("damage", ["cut short", "one byte", "no digest", "of a group", "of all", "a link"])
def test_a_library_that_is_damaged_or_open_to_others_is_built_again(
    damage: str, built: list[Path], tmp_path: Path
) -> None:
    path = library._built()
    whole = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(whole[:2000])
    elif damage == "one byte":
        path.write_bytes(b"A" + whole[1:])
    elif damage == "no digest":
        path.with_suffix(".sha256").unlink()
    elif damage == "a link":
        planted = tmp_path / "planted"
        path.rename(planted)
        path.symlink_to(planted)
    else:
        path.chmod(0o720 if damage == "of a group" else 0o702)
    assert library._built() == path
    assert len(built) == 2
    assert cache.is_kept(path)
    assert path.read_bytes() == whole


@root_only
@pytest.mark.parametrize("which", [".so", ".sha256"])
def test_a_library_of_another_user_is_built_again(which: str, built: list[Path]) -> None:
    path = library._built()
    os.chown(path.with_suffix(which), 65534, -1)
    assert library._built() == path
    assert len(built) == 2
    assert path.stat().st_uid == 0


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o770])
def test_in_a_shared_folder_each_user_has_a_private_one(mode: int, built: list[Path], tmp_path: Path) -> None:
    shared = tmp_path / "cache"
    shared.mkdir()
    shared.chmod(mode)
    path = library._built()
    assert path.parent == shared / f"user-{os.geteuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert shared.stat().st_mode & 0o7777 == mode


@root_only
def test_a_folder_of_another_user_under_our_name_is_refused(built: list[Path], tmp_path: Path) -> None:
    shared = tmp_path / "cache"
    shared.mkdir()
    shared.chmod(0o1777)
    taken = shared / f"user-{os.geteuid()}"
    taken.mkdir()
    os.chown(taken, 65534, -1)
    with pytest.raises(PermissionError, match=r"other users may write to .* Set STABNORM_CACHE"):
        library._built()
    assert not built


def test_a_folder_that_is_a_link_of_the_users_own_works(built: list[Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    first = library._built()
    assert library._built() == first
    assert len(built) == 1


def test_drafts_of_killed_builds_go_with_the_next_build_and_others_stay(built: list[Path], tmp_path: Path) -> None:
    folder = cache.made(tmp_path / "cache")
    old, young = folder / "cpu-0123.draft-1", folder / "cpu-0123.draft-2"
    for draft in (old, young):
        draft.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * cache.OLD_DRAFT_SECONDS,) * 2)
    library._built()
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("form", ["{}", "{} -m64", "'{}' -m64"])
def test_a_compiler_with_a_space_in_its_path_is_found(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "my tools" / "g++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", form.format(compiler))
    assert build.compiler() == [str(compiler), *(["-m64"] if "-m64" in form else [])]


def test_a_record_of_tested_devices_that_others_may_write_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stabnorm.ops import tested

    monkeypatch.setenv("STABNORM_CACHE", str(tmp_path / "cache"))
    path = cache.made(cache.cache_folder()) / tested.SHIPPED.name
    path.write_text('[{"device": "any", "passed": ["moments_of_rows"]}]', encoding="utf-8")
    path.chmod(0o644)
    assert len(tested._of_user()) == 1
    path.chmod(0o666)
    assert tested._of_user() == []
