"""Schedules of the switch: lam, the share of LayerNorm, as a function of the optimizer step.

`linear`, `cosine` and `constant` are pure functions: 1 before ``start``, and exactly 0 from
``start + fraction * total`` on. `make_schedule` prepares one of them, or a function of the user, for a training.
`stabnorm.switch.gate` is the closed loop, which also looks at the inputs of the layers. This file does not import
torch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from stabnorm._checks import check_choice, check_count, check_function, check_number

Order = Literal["together", "shallow_first", "deep_first"]
FRACTION = 0.8  # the default: the last fifth of the training belongs to the finished model
STAGGER = 0.5  # share of the schedule that one layer takes if the layers are switched one after the other


def schedule_end(total: int, *, start: int = 0, fraction: float = FRACTION) -> int:
    """Return the step from which lam is 0: ``start + fraction * total``, rounded.

    Args:
        total: optimizer steps of the training.
        start: the step at which the switch begins. Default: 0.
        fraction: how long it takes, as a share of `total`. Default: 0.8.

    Raises:
        ValueError: `fraction` is outside (0, 1], `start` is negative, or the training ends before the schedule.

    >>> schedule_end(1000), schedule_end(1000, start=500, fraction=0.5)
    (800, 1000)
    """
    check_count("total", total)
    check_span(start, fraction)
    end = start + max(1, round(fraction * total))
    if end > total:
        raise ValueError(
            f"the schedule ends at step {end} (start={start}, and then {fraction:g} of {total} steps), and the "
            f"training already at step {total}: lam would not reach 0. Train longer, or choose a smaller start or "
            "fraction"
        )
    return end


def linear(
    step: int,
    total: int,
    layer: int = 0,
    layers: int = 1,
    *,
    start: int = 0,
    fraction: float = FRACTION,
    order: Order = "together",
) -> float:
    r"""Return :math:`1 - u` with u the share of the schedule that is over (arXiv:2405.11582, SLAB).

    Args:
        step: optimizer steps done.
        total: optimizer steps of the training.
        layer: index of the layer, counted from the input. Default: 0.
        layers: number of layers. Default: 1.
        start: the step at which the switch begins. Default: 0.
        fraction: length of the switch as a share of `total`. Default: 0.8.
        order: "together", or one layer after the other, "shallow_first" or "deep_first". In these two orders each layer
            takes half of the schedule, and layers begin at equal distances in the first half. Default: "together".

    Raises:
        ValueError: an argument is out of range, or the schedule is longer than the training.

    >>> [linear(step, 10) for step in (0, 2, 4, 8, 10)]
    [1.0, 0.75, 0.5, 0.0, 0.0]
    >>> [linear(4, 10, layer, 3, order="shallow_first") for layer in range(3)]
    [0.0, 0.5, 1.0]
    """
    return 1 - min(max(_elapsed(step, total, layer, layers, start, fraction, order), 0.0), 1.0)


def cosine(
    step: int,
    total: int,
    layer: int = 0,
    layers: int = 1,
    *,
    start: int = 0,
    fraction: float = FRACTION,
    order: Order = "together",
) -> float:
    r"""Return half a period of a cosine, :math:`(1 + \cos \pi u) / 2`; arguments as for `linear`.

    >>> round(cosine(2, 10), 4), cosine(8, 10)
    (0.8536, 0.0)
    """
    elapsed = min(max(_elapsed(step, total, layer, layers, start, fraction, order), 0.0), 1.0)
    return 0.0 if elapsed == 1 else (1 + math.cos(math.pi * elapsed)) / 2


def constant(
    step: int,
    total: int,
    layer: int = 0,
    layers: int = 1,
    *,
    start: int = 0,
    fraction: float = FRACTION,
    order: Order = "together",
) -> float:
    """Return 0 as soon as the switch of the layer begins, without a transition; arguments as for `linear`.

    With `start` 0 and the order "together", the model has RepBN from the first step.

    >>> constant(0, 10), constant(4, 10, start=5, fraction=0.5)
    (0.0, 1.0)
    """
    return 0.0 if _elapsed(step, total, layer, layers, start, fraction, order) >= 0 else 1.0


SCHEDULES: Mapping[str, Callable[..., float]] = {"linear": linear, "cosine": cosine, "constant": constant}


def _elapsed(step: int, total: int, layer: int, layers: int, start: int, fraction: float, order: str) -> float:
    """Return the share of the layer's schedule that is over; below 0 before it begins, 1 or more after its end."""
    end = schedule_end(total, start=start, fraction=fraction)
    check_order(order)
    check_count("step", step, 0)
    check_count("layers", layers)
    check_count("layer", layer, 0)
    if layer >= layers:
        raise ValueError(f"layer={layer} is not one of {layers} layers. Count from 0")
    if step >= end:
        return 1.0  # independent of rounding
    begin, length = float(start), float(end - start)
    if order != "together" and layers > 1:
        turn = layer if order == "shallow_first" else layers - 1 - layer
        begin += turn / (layers - 1) * (1 - STAGGER) * length
        length *= STAGGER
    return (step - begin) / length


def check_span(start: int, fraction: float) -> None:
    """Raise an error unless `start` is a step and `fraction` a share."""
    check_number("fraction", fraction, above=0, most=1, hint=": 0.8 leaves the last fifth to the finished model")
    check_count("start", start, 0, hint=": an optimizer step")


def check_order(order: str) -> None:
    """Raise ValueError unless `order` is one there is."""
    check_choice("order", order, get_args(Order))


def check_schedule(schedule: str | Callable[[int], float]) -> None:
    """Raise ValueError unless `schedule` is a name there is, or a function."""
    if callable(schedule):
        check_function("schedule", schedule, "step")
    else:
        check_choice("schedule", schedule, (*SCHEDULES, "adaptive"), ", or give a function of the step")


def check_plan(schedule: str | Callable[[int], float], start: int, fraction: float, order: str) -> None:
    """Raise an error unless all of them are in range, and the schedule follows the others."""
    check_schedule(schedule)
    check_span(start, fraction)
    check_order(order)
    if callable(schedule) and (start, fraction) != (0, FRACTION):
        raise ValueError(
            f"start={start} and fraction={fraction} would not be followed: a function of the step says itself when it "
            "begins and ends. Leave them out, or name a schedule"
        )
    if order != "together" and schedule not in SCHEDULES:
        what = "a function of the step gives one lam for all layers"
        if schedule == "adaptive":
            what = "the adaptive schedule decides for each layer by its own affine residual"
        names = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"order={order!r} would not be followed: {what}. Leave it out, or take a schedule of {names}")


def make_schedule(
    schedule: str | Callable[[int], float],
    total: int,
    layers: int = 1,
    *,
    start: int = 0,
    fraction: float = FRACTION,
    order: Order = "together",
) -> Callable[[int], list[float]]:
    """Return a function of the step that gives the lam of every layer.

    Args:
        schedule: "linear", "cosine", "constant", or a function of the step. Such a function is the lam of all layers
            and must be 0 at the end of the training; only `total` and `layers` apply to it.
        total: optimizer steps of the training.
        layers: number of layers. Default: 1.
        start: the step at which the switch begins. Default: 0.
        fraction: how long it takes, as a share of `total`. Default: 0.8.
        order: see `linear`. Default: "together".

    Raises:
        ValueError: an argument is out of range, the schedule is longer than the training, or a function gives something
            outside [0, 1].

    >>> make_schedule("linear", 10, 2)(2)
    [0.75, 0.75]
    >>> make_schedule(lambda step: max(0.0, 1 - step / 5), 10, 2)(1)
    [0.8, 0.8]
    """
    check_plan(schedule, start, fraction, order)
    check_count("layers", layers, 0)
    if not callable(schedule):
        formula = SCHEDULES[schedule]
        options: dict[str, Any] = {"start": start, "fraction": fraction, "order": order}
        formula(0, total, **options)  # complain now
        return lambda step: [formula(step, total, layer, layers, **options) for layer in range(layers)]
    last = _lam_at(schedule, total)
    if last != 0:
        raise ValueError(
            f"the schedule function gives lam={last:g} at step {total}, where the training ends, and it has to be 0 by "
            "then: the model would neither have its LayerNorms nor be free of them"
        )
    return lambda step: [_lam_at(schedule, step)] * layers


def _lam_at(schedule: Callable[[int], float], step: int) -> float:
    try:
        lam = float(schedule(step))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the schedule function failed at step {step}: {type(error).__name__}: {error}. It takes the step and "
            "returns lam, a number from 0 to 1"
        ) from error
    if not 0 <= lam <= 1:
        raise ValueError(f"the schedule function gives lam={lam:g} at step {step}. lam is a share, from 0 to 1")
    return lam
