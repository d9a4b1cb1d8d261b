"""How a record is spelled: its version, JSON that every parser reads, and TensorBoard's event files."""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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

    Our own reader, because TensorBoard's checks every byte in Python: 12 s for 100 MB, and not a tenth of a second. It
    also keeps both of a step written twice. A value cut short by a kill is the end of its file.

    Raises:
        ValueError: the record is of a newer version.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    contents: dict[str, dict[str, Any]] = {}
    # A name holds the time in seconds, and a counter for the files of one second: as numbers, 9 before 10.
    for path in sorted(directory.glob("*tfevents*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)]):
        with path.open("rb") as file:
            while len(head := file.read(12)) == 12:  # length, checksum
                (length,) = struct.unpack("<Q", head[:8])
                body = file.read(length + 4)  # event, checksum
                if len(body) < length + 4:
                    break
                event = Event.FromString(body[:-4])
                for value in event.summary.value:
                    plugin = value.metadata.plugin_data
                    if plugin.plugin_name == PLUGIN_NAME and value.tag not in contents:
                        contents[value.tag] = json.loads(plugin.content)
                        check_version(contents[value.tag], directory)
                    if value.tag in contents:
                        yield event.step, value, contents[value.tag]
