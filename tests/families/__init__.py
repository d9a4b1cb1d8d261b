"""Small look-alikes of the model families people train: their layouts, their names, how their norms' outputs are read.

    model = FAMILIES["swin, padded windows"].build()
    args, kwargs = FAMILIES["swin, padded windows"].example(seed=1)
    randomize_(model, seed=0)
    y = model(*args, **kwargs)

Each has a few thousand parameters at most, no dropout and one tensor for output, so a check costs milliseconds and
equal means equal. A fresh model has zero biases, gains of one and often a silent head, which let wrong code pass:
`randomize_` draws them all, and running statistics.
"""

import pytest

from tests.families import convolutional, decoders, encoders, seq2seq, torch_native, vision, windows
from tests.families.family import Example, Family, randomize_

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (vision, windows, convolutional, encoders, decoders, seq2seq, torch_native)
    for family in module.FAMILIES
}

# What holds for every family is tested on all of them; `make quick` takes one of each kind.
_QUICK = {"vit, class token", "convnext", "bert", "llama", "gpt-2, tied head"}
EVERY_FAMILY = [
    pytest.param(family, id=name, marks=() if name in _QUICK else pytest.mark.slow) for name, family in FAMILIES.items()
]

__all__ = ["EVERY_FAMILY", "FAMILIES", "Example", "Family", "randomize_"]
