"""The unfolded model in two precisions: what a folded one must return in each, and how closely.

In float64 the algebra is checked, because rounding cannot hide a fault there. In the model's own precision those faults
show that the algebra does not know: an overflow, or a mixture of types that does not run. The distance between the two
outputs measures how far rounding carries in this model.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stabnorm._models.copies import copied
from stabnorm._models.examples import Example
from stabnorm._models.outputs import OutputError, Picker
from stabnorm._models.tree import Tree
from stabnorm.errors import StabNormError
from stabnorm.fold._follow import trace_model
from stabnorm.fold._following import tensors_of
from stabnorm.fold._second_input import LookUps, cast, padded, second_inputs
from stabnorm.fold._sites import Site
from stabnorm.fold._trace import Trace
from stabnorm.fold._verify import TOLERANCE, Outputs, Precision, finite, largest_error, run_all
from stabnorm.fold.manifest import own_parameters

_UNFOLLOWED = "the model runs on the example, but its operations cannot be followed one by one"
ROOM = 30.0  # how much further rounding may carry in a folded model than in the unfolded one


@dataclass(frozen=True)
class Lane:
    """A model in one precision.

    Args:
        model: Not folded; copied before anything is done to it.
        examples: Its inputs: first the user's, then those that it is checked on.
        expected: What it returns for each.
        lowest: The lowest precision in its forward.
        tolerance: How far off a folded model may be, relative to an output's largest element.
        given: How many of `examples` are the user's.
        others: What the rest are, in words.
    """

    model: nn.Module
    examples: list[Example]
    expected: Outputs
    lowest: torch.dtype
    tolerance: float
    given: int
    others: str

    def trace(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        examples: list[Example],
        outputs: Picker,
        tied: Mapping[str, str],
    ) -> Trace:
        """Follow a copy of the model on all inputs."""
        return trace_model(model, sites, examples, outputs, self.given, self.others, tied)

    def checked_on(self) -> str:
        """Name the inputs."""
        given = "the example" if self.given == 1 else f"{self.given} examples"
        return f"{given} and {self.others}" if self.others else given

    def error(self, outputs: Outputs) -> tuple[float, str]:
        """Give the largest error, and the inputs that it is found on, in words."""
        own, other = (
            largest_error(outputs[part], self.expected[part]) for part in (slice(self.given), slice(self.given, None))
        )
        return max(own, other), f" on {self.others}" if own <= self.tolerance < other else ""


@dataclass(frozen=True)
class Lanes:
    """What a plan is made from and tried on.

    Args:
        lanes: float64 where it runs, and the model's own precision.
        trace: The records of a forward in the first of them.
        tied: For each parameter that has a second owner, that owner's name for it.
    """

    lanes: list[Lane]
    trace: Trace
    tied: dict[str, str]

    @property
    def checked_on(self) -> str:
        """The inputs, in words."""
        return self.lanes[0].checked_on()

    def precision(self, error: float) -> str:
        """Name the precision in which an error of the first lane was computed: float64 where the error is as small."""
        is_wide = len(self.lanes) > 1
        lowest = torch.float64 if is_wide and error <= TOLERANCE[torch.float64] else self.lanes[0].lowest
        return str(lowest).removeprefix("torch.")


def make_lanes(
    model: nn.Module, sites: Sequence[Site], examples: list[Example], check: list[Example] | None, outputs: Picker
) -> Lanes:
    """Run the model, unfolded, in both precisions; trace it in float64 if it runs so.

    Raises:
        ValueError: it does not run, cannot be copied or followed, or returns something else each time.
        StabNormError: a norm's `fold_affine` has another number of channels than its output.
    """
    own = _own_lane(model, examples, check, outputs)
    try:
        wide = copied(model).double()
        tied = _untie(wide)
        inputs = [cast(example, torch.float64) for example in own.examples]
        trace = own.trace(wide, sites, inputs, outputs, tied)
        with Precision() as precision:
            expected = run_all(wide, inputs, outputs)
        runs = all(finite(tensors) for tensors in expected)
    except Exception:  # a quantised layer, a kernel without float64: the result says in what it was checked
        runs = False
    if runs:
        rounding = largest_error(own.expected, expected)
        rounding = rounding if rounding < float("inf") else 0.0  # an overflow says nothing of rounding
        carried = ROOM * rounding / torch.finfo(own.lowest).eps
        wide_lane, own_lane = (
            replace(lane, tolerance=max(lane.tolerance, carried * torch.finfo(lane.lowest).eps))
            for lane in (
                replace(
                    own,
                    model=wide,
                    examples=inputs,
                    expected=expected,
                    lowest=precision.lowest,
                    tolerance=TOLERANCE[precision.lowest],
                ),
                own,
            )
        )
        return Lanes([wide_lane, own_lane], trace, tied)
    plain = copied(model)
    tied = _untie(plain)
    try:
        return Lanes([own], own.trace(plain, sites, own.examples, outputs, tied), tied)
    except StabNormError:
        raise
    except Exception as error:
        raise ValueError(f"{_UNFOLLOWED}: {type(error).__name__}: {error}") from error


def try_on(lanes: Lanes, change: Callable[[nn.Module], None], outputs: Picker) -> tuple[float, str]:
    """Change a copy in each lane; give the error in the first one, and what is wrong, empty if nothing is."""
    errors = []
    for lane in lanes.lanes:
        changed = copied(lane.model)
        try:
            change(changed)
            error, where = lane.error(run_all(changed, lane.examples, outputs))
            errors.append(error)
        except Exception as raised:
            return float("inf"), f"rolled back: the changed model does not run ({type(raised).__name__}: {raised})"
        if not errors[-1] <= lane.tolerance:
            return errors[0], f"rolled back: the output would be off by {error:.1e} of its largest element{where}"
    return errors[0], ""


def run_checked(model: nn.Module, examples: Sequence[Example], outputs: Picker, name: str = "the example") -> Outputs:
    """Run the model on inputs that the user passed under this name.

    Raises:
        ValueError: it does not run on one of them, or returns no finite number, so that no fault of a fold would show.
    """
    try:
        returned = run_all(model, examples, outputs)
    except OutputError:
        raise
    except Exception as error:
        if any(t.is_nested for example in examples for t in tensors_of((example.args, example.kwargs))):
            raise ValueError(
                f"the model does not run on {name}, which holds a nested tensor: torch's attention takes one in fused "
                "layers only, which a fold must leave, and norms read plain tensors. Pass a padded tensor, such as "
                "torch.nested.to_padded_tensor gives, and the model's padding mask"
            ) from error
        raise ValueError(
            f"the model does not run on {name}: {type(error).__name__}: {error}. A tuple is positional arguments, "
            "a dict keyword arguments, a tuple (args, kwargs) both"
        ) from error
    for number, tensors in enumerate(returned, 1):
        if not any(bool(t.isfinite().any()) for t in tensors):
            which = name if len(examples) == 1 else f"input {number} of {len(examples)}"
            numbers = [t.numel() for t in tensors]
            what = "only NaN and infinities" if any(numbers) else "no number" if numbers else "no floating tensor"
            raise ValueError(
                f"on {which} the model returns {what}, so a check on it would say nothing. Pass inputs with at least "
                "one row and without NaN and infinities, and name with outputs= what matters of what it returns"
            )
    return returned


def _own_lane(model: nn.Module, examples: list[Example], check: list[Example] | None, outputs: Picker) -> Lane:
    unfolded = copied(model)
    expected = run_checked(unfolded, examples, outputs)
    try:
        with Precision() as precision, LookUps() as look_ups:
            again = run_all(unfolded, examples, outputs)
    except Exception as error:
        raise ValueError(
            f"{_UNFOLLOWED}: {type(error).__name__}: {error}. Where it uses flex_attention or torch.cond, fold it with "
            "plain attention and branches; the folded weights are the same"
        ) from error
    tolerance = TOLERANCE[precision.lowest]
    if largest_error(again, expected) > tolerance:
        raise ValueError(
            "the model returns something else each time it runs the example. Take out what is random in eval or left "
            "over from the forward before, or name the outputs that matter with outputs="
        )
    if check is not None:
        more = run_checked(unfolded, check, outputs, "check")
        others = "check"
    else:
        check, more, others = _second_inputs(unfolded, examples, look_ups, outputs)
    return Lane(model, examples + check, expected + more, precision.lowest, tolerance, len(examples), others)


def _second_inputs(
    model: nn.Module, examples: list[Example], look_ups: LookUps, outputs: Picker
) -> tuple[list[Example], Outputs, str]:
    """Make second inputs of each example, and run the model on them; where none runs, the examples alone must do."""

    def returned(candidate: Example) -> Outputs:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a size that the user would not pass
                returns = run_all(model, [candidate], outputs)
        except Exception:  # it takes no such values, or no such size
            return []
        return returns if finite(returns[0]) else []

    seconds: list[Example] = []
    resized = False
    for example in examples:
        rows = look_ups.rows(example)
        others, has_other_sizes = second_inputs(example, rows, lambda other: bool(returned(other)))
        with_masks = [padded(model, other, rows) for other in others]
        seconds += [masked if returned(masked) else other for masked, other in zip(with_masks, others, strict=True)]
        resized |= has_other_sizes
    words = ("a second input of another size" if resized else "a second input") if seconds else ""
    return seconds, run_all(model, seconds, outputs), words


def _untie(model: nn.Module) -> dict[str, str]:
    """Give every module its own copy of a shared parameter; return another owner's name for each such parameter.

    So the trace shows which module reads which copy. A folded model keeps the copies that folding changes.
    """
    tied = {}
    for (first, _), *rest in Tree(model).holders.values():
        for name, _ in rest:
            tied[name] = first
            tied.setdefault(first, name)
        own_parameters(model, [name for name, _ in rest])
    return tied
