"""A picture for any logger. Loggers are told apart by what they can do: their classes exist in two namespaces."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from stabnorm.monitor._folders import file_name


def shows_images(logger: Any) -> bool:
    """Whether `log_image` can hand a picture to this logger."""
    experiment = getattr(logger, "experiment", None)
    return hasattr(logger, "log_image") or hasattr(experiment, "add_image") or hasattr(experiment, "log_image")


def log_image(
    logger: Any,
    key: str,
    image: npt.NDArray[np.uint8],
    step: int,
    directory: str | os.PathLike[str],
) -> bool:
    """Hand a picture to a logger; where none takes it, write `<key>_<step>.png`.

    Args:
        logger: any Lightning logger, or None. TensorBoard, Weights & Biases, MLflow and Comet show pictures.
        key: what to call it; a "/" makes a group.
        image: uint8 [height, width, 3].
        step: the optimizer step.
        directory: where the file goes; made if it does not exist.

    Returns:
        Whether the logger took it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     taken = log_image(None, "stability/amax", np.zeros((2, 2, 3), np.uint8), 7, directory)
        ...     taken, os.listdir(directory)
        (False, ['stability_amax_00000007.png'])
    """
    experiment: Any = getattr(logger, "experiment", None)
    if type(experiment).__name__.endswith("DummyExperiment"):  # other ranks and fast_dev_run: nothing may be written
        return False
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key, [image], step=step)
    elif hasattr(experiment, "add_image"):  # TensorBoard
        experiment.add_image(key, image, step, dataformats="HWC")
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow, whose keys know no slash
        experiment.log_image(logger.run_id, image, key=key.replace("/", "_"), step=step)
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(image, name=key, step=step)
    else:
        path = Path(directory) / f"{file_name(key)}_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        return False
    return True
