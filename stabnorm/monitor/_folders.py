"""Which folder of this machine an address means, which names its files may have, and how a file is written whole."""

import contextlib
import os
import re
import secrets
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from stabnorm._checks import wrong_type

FOLDER = "stabnorm_logs"  # no folder of ours may be called like the package: Python would import it instead

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters at least: ``C:`` is a drive; Lightning drops a slash
_NUMBERED = re.compile(r"(version|run)_\d+")
_REFUSED = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # by the file systems of Windows


def local_folder(address: str | os.PathLike[str]) -> Path:
    """Give the folder that a path or a ``file://`` address means.

    Raises:
        ValueError: the address is of another kind, such as ``s3://``, so that it means no folder of this machine.

    >>> local_folder("file:///tmp/my%20runs").as_posix()
    '/tmp/my runs'
    """
    if not isinstance(address, str | os.PathLike):
        raise wrong_type("directory or path", address, "a folder, as a string or a Path")
    text = os.fspath(address)
    if not _SCHEME.match(text):
        return Path(text)
    parts = urlsplit(text)
    if parts.scheme != "file":
        raise ValueError(f"{text!r} is not a folder of this machine, and a record is read and written only there")
    return Path(url2pathname(parts.path))


def record_folder(folder: Path) -> Path:
    """Give the folder that holds the files of a record: one of ours in a run's folder, or the folder itself."""
    for name in (FOLDER, "stabnorm"):  # the second one is what the folder was called at first
        if (folder / name / "record.json").exists():
            return folder / name
    return folder


def beside(record: Path) -> Path:
    """Give the folder of the run whose record lies in a folder: the one above, if that is a folder of ours.

    >>> beside(Path("version_0/stabnorm_logs")).as_posix(), beside(Path("mine")).as_posix()
    ('version_0', 'mine')
    """
    return record.parent if record.name == FOLDER else record


def run_name(folder: Path) -> str:
    """Give the name of a run's folder, with that of the folder above where a logger has only numbered it.

    >>> run_name(Path("/runs/mine")), run_name(Path("/runs/unstable/version_0"))
    ('mine', 'unstable/version_0')
    """
    return "/".join(folder.parts[-2:]) if _NUMBERED.fullmatch(folder.name) else folder.name


def file_name(text: str) -> str:
    """Give a text as a file name that every file system takes.

    >>> file_name("stability/a:b*")
    'stability_a_b_'
    """
    return _REFUSED.sub("_", text)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole: whatever happens, the file has its old content or all of the new one."""
    draft = _draft(path, content)
    try:
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def create_file(path: Path, content: bytes) -> None:
    """Write a new file whole: it appears when it is complete and on the disk.

    Raises:
        FileExistsError: there is a file of this name, which another process may have written a moment ago.
    """
    draft = _draft(path, content)
    try:
        os.link(draft, path)  # fails where the name is taken, unlike a renaming
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # the file system has no links: take the name first
        path.open("xb").close()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts(folder: Path, pattern: str) -> None:
    """Remove what killed processes have left of the files of these names."""
    for draft in folder.glob(f"{pattern}.tmp"):
        with contextlib.suppress(OSError):  # somebody else has removed it
            draft.unlink()


def _draft(path: Path, content: bytes) -> Path:
    draft = path.with_name(f"{path.stem}-{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave the name without the content
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    return draft
