"""The user's cache folder, for compiled kernels and records: what another user could have written is never used.

A library from the cache runs with all rights of the user, so the folder and every file must belong to the user, and no
one else may write to them. In a shared folder each user has a private folder. A digest beside a file says whether it is
whole.
"""

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path

OLD_DRAFT_SECONDS = 3600  # no build lasts so long: its process was killed


def cache_folder() -> Path:
    """Return the folder for builds and records of this machine: $STABNORM_CACHE, else the user's cache folder.

    If other users may write to it, it is a folder of the user's own in there. It need not exist, see `made`.
    """
    chosen = os.environ.get("STABNORM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(chosen) if chosen else Path(home) / "stabnorm"
    if not folder.exists() or is_private(folder):
        return folder
    return folder / f"user-{os.geteuid()}"


def made(folder: Path) -> Path:
    """Make a folder that only the user may read and write, unless there is one, and return it.

    Raises:
        PermissionError: there is one, and other users may write to it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(
            f"other users may write to {folder}. Set STABNORM_CACHE to a folder that only you may write to"
        )
    return folder


def is_private(path: Path) -> bool:
    """Whether a file or folder belongs to the user, and no one else may write to it; a link is neither."""
    if not hasattr(os, "geteuid"):  # Windows, whose rights are not these
        return True
    status = path.lstat()
    others = stat.S_IWGRP | stat.S_IWOTH
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & others


def keep(draft: Path, path: Path) -> None:
    """Put a finished file in its place at once, with its digest beside it, for the user alone."""
    draft.chmod(0o700)
    digest = draft.with_suffix(f"{draft.suffix}-digest")
    digest.write_text(_digest_of(draft), encoding="ascii")
    digest.chmod(0o600)
    digest.replace(_beside(path))
    draft.replace(path)  # last: two processes that build at once leave one whole file


def is_kept(path: Path) -> bool:
    """Whether a file is there, whole, and the user's own."""
    beside = _beside(path)
    try:
        return is_private(path) and is_private(beside) and beside.read_text(encoding="ascii") == _digest_of(path)
    except (OSError, ValueError):
        return False


def remove_old_drafts(folder: Path, pattern: str) -> None:
    """Remove the drafts that killed processes have left."""
    for draft in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime > OLD_DRAFT_SECONDS:
                draft.unlink()


def _beside(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
