"""A dump: a folder with the last steps of a run, and with what it takes to run one of them again.

| file | what it holds |
|---|---|
| `dump.json` | step, reason, versions, layers, batch indices, how the model is built, a checksum of each file |
| `history.npz` | every statistic of the last steps, and the loss |
| `step.pt` | batch, masks, random states and the monitor's state from before the step |
| `weights.pt` | the model's weights from before the step |
| `detail.npz` | the whole catalogue in the steps after it; it comes later |

The folder appears when it is complete, so that a full disk or a kill leaves none or a whole one.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stabnorm.errors import StabNormError
from stabnorm.monitor._folders import create_file
from stabnorm.monitor._record_files import pack_arrays, unpack_arrays
from stabnorm.monitor._record_format import dumps

VERSION = 1
HEADER, HISTORY, DETAIL, STEP, WEIGHTS = "dump.json", "history.npz", "detail.npz", "step.pt", "weights.pt"

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Dump:
    """What a dump holds.

    Attributes:
        folder: where it lies.
        header: what `dump.json` says.
        history: the last steps, "@steps" and one array for each series; companions' as "companion/series".
        step: batches, masks, random states, modes and the monitor's state; {} if the dump has none.
        weights: the model's state dict; {} if the dump has none.
    """

    folder: Path
    header: Mapping[str, Any]
    history: Arrays
    step: Mapping[str, Any]
    weights: Mapping[str, Any]


def write_dump(
    folder: Path, header: Mapping[str, Any], history: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Write a dump, whole or not at all.

    Args:
        folder: of the dump; if it is there already, a number is added to its name.
        header: what `dump.json` says, besides version and checksums.
        history: names -> arrays.
        tensors: file name -> what `torch.save` writes there.

    Returns:
        The folder.

    Raises:
        OSError: the disk is full, or nobody may write there.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        (draft / HISTORY).write_bytes(pack_arrays(history))
        for name, content in tensors.items():
            torch.save(content, draft / name)
        checksums = {path.name: checksum(path) for path in draft.iterdir()}
        full = {"version": VERSION, **header, "files": checksums}
        (draft / HEADER).write_text(dumps(full), encoding="utf-8")
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return _renamed(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _renamed(draft: Path, folder: Path) -> Path:
    for number in range(1, 1000):
        target = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if not target.exists():
            os.rename(draft, target)
            return target
    raise FileExistsError(f"there are a thousand dumps like {folder}")


def add_detail(folder: Path, detail: Mapping[str, Any]) -> None:
    """Add the steps after it to a dump that is there."""
    create_file(folder / DETAIL, pack_arrays(detail))


def read_dump(folder: str | os.PathLike[str], *, trust: bool = False) -> Dump:
    """Read a dump.

    Args:
        folder: the dump's.
        trust: whether a batch may hold objects of any class, which run code when they are read. Default: False, only
            tensors and plain containers.

    Raises:
        FileNotFoundError: there is no dump.
        StabNormError: it is damaged, of a newer version, or its batch holds other objects and is not trusted.
    """
    folder = Path(folder)
    if not (folder / HEADER).exists():
        raise FileNotFoundError(f"{folder} is no dump: it has no {HEADER}. Give a folder of the run's `dumps/`")
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        version, files = int(header["version"]), dict(header["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise StabNormError(f"{folder / HEADER} is damaged ({error})") from error
    if version > VERSION:
        raise StabNormError(f"{folder} is of a newer version of stabnorm. Update it: pip install --upgrade stabnorm")
    for name, wanted in files.items():
        path = folder / name
        if not path.exists() or checksum(path) != wanted:
            raise StabNormError(f"{path} is {'damaged' if path.exists() else 'missing'}, so the dump cannot be read")
    with unpack_arrays((folder / HISTORY).read_bytes()) as arrays:
        history = {name: np.asarray(arrays[name]) for name in arrays.files}
    step = _load(folder / STEP, trust) if STEP in files else {}
    return Dump(folder, header, history, step, _load(folder / WEIGHTS, trust) if WEIGHTS in files else {})


def checksum(path: Path) -> str:
    """Return the CRC-32 of a file, as eight hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            value = zlib.crc32(part, value)
    return f"{value:08x}"


def _load(path: Path, trust: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        if trust:
            raise
        raise StabNormError(
            f"{path} holds objects that are no tensors or plain containers, and reading them runs code. If the dump is "
            f"yours, read it with trust=True (--trust on the command line). {type(error).__name__}: {error}"
        ) from error
