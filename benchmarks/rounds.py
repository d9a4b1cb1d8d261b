"""The order in which the contenders of a benchmark take their turns."""

import random
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


def in_turn(contenders: Sequence[_T], number: int) -> list[_T]:
    """Return the contenders in the order of a round, which is random and the same in every run.

    What ran before decides what the caches hold and which memory is free. In an order that only rotates, each contender
    would always follow the same one.

    >>> sorted(in_turn("abc", 0))
    ['a', 'b', 'c']
    """
    return random.Random(number).sample(contenders, len(contenders))
