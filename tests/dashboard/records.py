"""Records for the tests of the dashboard: made by hand, so that every number is known."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stabnorm.monitor.record import Block, FileRecord, RecordWriter, TensorBoardRecord

LAYERS = (*(f"blocks.{i // 2}.norm{i % 2 + 1}" for i in range(8)), "norm")
Values = npt.NDArray[Any]


def calm(steps: int = 400, layers: int = len(LAYERS), seed: int = 0) -> Values:
    """The scale of each layer's input, which varies by two percent."""
    noise = np.random.default_rng(seed).standard_normal((steps, layers))
    scales: Values = np.linspace(1, 4, layers) * np.exp(0.02 * noise)
    return scales


def growing(steps: int = 400, since: int = 300, first_layer: int = 0, rate: float = 0.02) -> Values:
    """Calm until a step, from which on the layers from ``first_layer`` on grow."""
    scale = calm(steps)
    scale[since:, first_layer:] *= np.exp(rate * np.arange(steps - since))[:, None]
    return scale


def alert(
    step: int, layer: str, statistic: str = "token_std_mean", value: float = 2.0
) -> tuple[str, int, dict[str, Any]]:
    """An alert as the monitor writes it."""
    data = {"step": step, "layer": layer, "statistic": statistic, "value": value, "threshold": 1.5, "reason": "because"}
    return "alert", step, data


def write(
    writer: RecordWriter,
    scale: Values,
    *,
    loss: Values | None = None,
    layers: tuple[str, ...] = LAYERS,
    first: int = 0,
    block: int = 50,
    events: Iterable[tuple[str, int, Mapping[str, Any]]] = (),
    more: Mapping[str, Values] | None = None,
) -> None:
    """Write a record of ``token_std_mean`` and what goes with it, in blocks."""
    losses = np.linspace(2, 1, len(scale)) if loss is None else loss
    series = {
        "token_std_mean": scale,
        "amax": 3 * scale,
        "tokens": np.full(scale.shape, 64.0),
        "loss": losses,
        **(more or {}),
    }
    for begin in range(0, len(scale), block):
        part = {name: values[begin : begin + block] for name, values in series.items()}
        writer.write_block(Block(first + begin, layers, part))  # type: ignore[arg-type]  # it makes them float32
    for kind, step, data in events:
        writer.write_event(kind, step, data)


def file_record(folder: Path, scale: Values, **options: Any) -> Path:
    """Write files of our own."""
    record = FileRecord(folder)
    write(record, scale, **options)
    record.close()
    return folder


def event_record(folder: Path, scale: Values, **options: Any) -> Path:
    """Write TensorBoard's event file."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        write(TensorBoardRecord(writer), scale, **options)
    return folder
