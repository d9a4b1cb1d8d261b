"""The fit as the starting point of the switch: what ``convert_norms(init="fit")`` does beside converting."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from stabnorm._models.batches import batches_of
from stabnorm._models.copies import copied
from stabnorm._models.devices import device_of
from stabnorm._models.random_state import random_state_kept
from stabnorm.norms import NormSearch
from stabnorm.fit.fit import fit_norms, write_affine
from stabnorm.fit.measure import measure_norms
from stabnorm.fit.sums import Affine
from stabnorm.fit.watch import Runner
from stabnorm.switch.lam import progressive_norms

BATCHES = 32  # of the loader; two numbers per channel need no more


def fitted_start(
    model: nn.Module, loader: Iterable[Any], names: set[str], convert: Callable[[nn.Module], object]
) -> Callable[[nn.Module], None]:
    """Fit on copies, in depth order; give what writes the result into a model that was converted alike.

    Args:
        model: not converted yet; it is copied.
        loader: batches.
        names: the norms that will be converted.
        convert: converts a copy as the model will be.

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

    def write(model: nn.Module) -> None:
        for name, norm in progressive_norms(model).items():
            fit = fits.get(name)
            if isinstance(fit, Affine):
                write_affine(norm, fit)
                norm.fitted = True

    return write
