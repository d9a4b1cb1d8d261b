"""The random state that snapshots and the flight recorder keep gives the same numbers again."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.random import mtrand

from stabnorm._models.random_state import random_state_kept
from stabnorm.actions.snapshot import random_state, restore_random_state


def drawn() -> list[float]:
    return [
        *(random.random() for _ in range(3)),
        *np.random.rand(3),
        *(np.random.randn() for _ in range(3)),  # an odd number: NumPy keeps another one
        *torch.randn(3).tolist(),
    ]


@pytest.mark.parametrize(
    "between",
    [
        lambda: None,
        lambda: np.random.rand(1),
        lambda: np.random.randn(1),
        lambda: np.random.randn(2),
        lambda: np.random.seed(5),
        lambda: np.random.rand(700),
        lambda: random.random(),
        lambda: torch.rand(1),
    ],
)
def test_it_gives_the_same_numbers_again(between: Callable[[], object]) -> None:
    with random_state_kept(torch.device("cpu")):
        for _ in range(3):
            between()
            state = random_state()
            first = drawn()
            restore_random_state(state)
            assert drawn() == first
            between()


def test_another_generator_of_numpy_is_kept_too() -> None:
    before = mtrand.get_bit_generator()
    try:
        mtrand.set_bit_generator(np.random.MT19937(3))
        with random_state_kept(torch.device("cpu")):
            state = random_state()
            first = drawn()
            restore_random_state(state)
            assert drawn() == first
    finally:
        mtrand.set_bit_generator(before)
