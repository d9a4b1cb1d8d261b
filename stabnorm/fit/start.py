"""The fit as the start of a switch: what ``convert_norms(init="fit")`` does in addition to the conversion."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from stabnorm._models.batches import batches_of
from stabnorm._models.copies import copied
from stabnorm._models.devices import device_of
from stabnorm._models.random_state import random_state_kept
from stabnorm.fit.fit import fit_norms, write_affine
from stabnorm.fit.measure import measure_norms
from stabnorm.fit.sums import Affine
from stabnorm.fit.watch import Runner
from stabnorm.nn.prep import PRepBN
from stabnorm.norms import NormSearch

BATCHES = 32  # how many of the loader's batches are used; two numbers per channel need no more


def fit_copies(
    model: nn.Module, loader: Iterable[Any], names: set[str], convert: Callable[[nn.Module], object]
) -> dict[str, Affine]:
    """Fit the successors of a model's norms on copies of the model, in depth order.

    Args:
        model: the model before its conversion; it is copied twice.
        loader: batches.
        names: the norms that will be converted.
        convert: converts a copy in the way in which the model will be converted.

    Returns:
        The fit of each norm that has one.

    Raises:
        ValueError: the loader gives its batches only once, or the model cannot be copied.
        StabNormError: the loader is empty, or the model does not run on its batches.
    """
    run = Runner()
    with random_state_kept(device_of(model)):
        batches = list(itertools.islice(batches_of(loader), BATCHES))
        original, converted = copied(model).eval(), copied(model).eval()
        layers = [layer for layer in NormSearch(original).found if layer.name in names]
        measure = measure_norms(original, layers, batches, run)
        convert(converted)
        fits = fit_norms(converted, original, batches, measure.levels, run, measure.calls)
    return {name: fit for name, fit in fits.items() if isinstance(fit, Affine)}


def start_from_fits(model: nn.Module, fits: Mapping[str, Affine]) -> None:
    """Write the fits into the converted norms of these names, and mark them, so that `start_from_norm` skips them."""
    for layer in NormSearch(model).found:
        if layer.name in fits:
            assert isinstance(layer.module, PRepBN)
            write_affine(layer.module, fits[layer.name])
            layer.module.fitted = True
