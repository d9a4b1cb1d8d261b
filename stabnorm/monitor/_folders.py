"""Which folder of this machine an address means, and which names its files may have."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters at least: ``C:`` is a drive; Lightning drops a slash
_REFUSED = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # by the file systems of Windows


def local_folder(address: str | os.PathLike[str]) -> Path:
    """Give the folder that a path or a ``file://`` address means.

    Raises:
        ValueError: the address is of another kind, such as ``s3://``, so that it means no folder of this machine.

    >>> local_folder("file:///tmp/my%20runs").as_posix()
    '/tmp/my runs'
    """
    text = os.fspath(address)
    if not _SCHEME.match(text):
        return Path(text)
    parts = urlsplit(text)
    if parts.scheme != "file":
        raise ValueError(f"{text!r} is not a folder of this machine, and a record is read and written only there")
    return Path(url2pathname(parts.path))


def file_name(text: str) -> str:
    """Give a text as a file name that every file system takes.

    >>> file_name("stability/a:b*")
    'stability_a_b_'
    """
    return _REFUSED.sub("_", text)
