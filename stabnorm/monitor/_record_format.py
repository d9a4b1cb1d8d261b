"""How a record is spelled: its version, JSON that every parser reads, and TensorBoard's event files."""

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stabnorm.monitor._event_files import events_of

VERSION = 1
PLUGIN_NAME = "stabnorm"


def check_version(header: Mapping[str, Any], source: Path) -> None:
    """Refuse what a newer stabnorm has written.

    Raises:
        ValueError: `header["version"]` is above `VERSION`.
    """
    if header["version"] > VERSION:
        raise ValueError(
            f"{source} is a record of version {header['version']}, and this stabnorm knows versions up to {VERSION}: "
            "upgrade it (pip install -U stabnorm), or write to another directory"
        )


def dumps(data: Any) -> str:
    """Return strict JSON: NaN and the infinities become strings, which `float` reads back.

    Example:
        >>> dumps({"value": float("nan"), "worst": (np.float32("inf"), 3)})
        '{"value": "NaN", "worst": ["Infinity", 3]}'
    """
    return json.dumps(_plain(data), allow_nan=False)


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, np.ndarray | np.generic):
        return _plain(data.tolist())
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data


def tensor_summary(tag: str, tensor: Any, content: Mapping[str, Any] | None) -> Any:
    """Return the TensorBoard summary of one tensor.

    Args:
        tag: the full tag.
        tensor: an array, or the bytes of a string.
        content: how the tag describes itself. Only its first value can: TensorBoard ignores what comes later.
    """
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary
    from tensorboard.util.tensor_util import make_tensor_proto

    value = Summary.Value(tag=tag, tensor=make_tensor_proto(tensor))
    if content is not None:
        value.metadata.plugin_data.plugin_name = PLUGIN_NAME
        value.metadata.plugin_data.content = dumps({"version": VERSION, **content}).encode()
        value.metadata.data_class = DATA_CLASS_TENSOR  # without it TensorBoard does not list the tag
    return Summary(value=[value])


def tensors(directory: Path) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """Yield (step, summary value, content of its tag) for every tensor of ours in a run's event files, as written.

    Our own reader, because TensorBoard's takes 12 s for 100 MB, and this one takes one second. It also keeps both of a
    step written twice. What is damaged is skipped, with one warning for each file. A value cut short by a kill is the
    end of its file.

    Raises:
        ValueError: the record is of a newer version.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    contents: dict[str, dict[str, Any]] = {}
    undescribed: dict[str, list[tuple[int, Any]]] = {}  # values whose tag's description has not been read yet
    for path in event_files(directory):
        damaged = 0
        try:
            file = path.read_bytes()
        except OSError as error:
            warnings.warn(f"{path} cannot be read, so its steps are left out: {error}", stacklevel=2)
            continue
        for body in events_of(file):
            try:
                event = None if body is None else Event.FromString(body)
            except DecodeError:
                event = None
            if event is None:
                damaged += 1
                continue
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == PLUGIN_NAME:
                    content = description_of(value.metadata.plugin_data.content, directory)
                    if content is None:
                        damaged += 1
                    else:
                        contents.setdefault(value.tag, content)
                if value.tag in contents:
                    waiting = undescribed.pop(value.tag, [])
                    yield from ((step, earlier, contents[value.tag]) for step, earlier in waiting)
                    yield event.step, value, contents[value.tag]
                elif value.tag.startswith(f"{PLUGIN_NAME}/") and value.HasField("tensor"):
                    undescribed.setdefault(value.tag, []).append((event.step, value))
        if damaged:
            pieces = f"{damaged} piece{'s'[: damaged > 1]}"
            warnings.warn(f"{path} is damaged in {pieces}; what they held is left out", stacklevel=2)
    if undescribed:
        names = ", ".join(sorted(undescribed))
        warnings.warn(f"{directory}: the descriptions of {names} are lost, so these are left out", stacklevel=2)


def event_files(directory: Path) -> list[Path]:
    """Return the event files of a run, in the order in which they were begun."""
    # A name holds the time in seconds, and a counter for the files of one second: as numbers, 9 before 10.
    files = (path for path in directory.glob("*tfevents*") if path.is_file())
    return sorted(files, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def description_of(content: bytes, directory: Path) -> dict[str, Any] | None:
    """Read how a tag describes itself; None if it is no description of ours.

    Raises:
        ValueError: it is of a newer version.
    """
    try:
        described = json.loads(content)
    except ValueError:
        return None
    if not isinstance(described, dict) or not isinstance(described.get("version"), int):
        return None
    check_version(described, directory)
    series, layers = described.get("series"), described.get("layers")
    is_series = isinstance(series, str) and isinstance(layers, list) and all(isinstance(name, str) for name in layers)
    return described if is_series or isinstance(described.get("event"), str) else None
