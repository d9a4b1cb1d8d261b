"""From a plan to one that holds: try it, and where it fails find the norms that are to blame by halving."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from stabnorm._models.outputs import Picker
from stabnorm.fold._apply import apply_plan
from stabnorm.fold._lanes import Lanes, try_on
from stabnorm.fold._plan import Plan, plan_folds
from stabnorm.fold.manifest import manifest_of
from stabnorm.fold.result import FOLDED

_NEEDS_NEW_MEMORY = "view size is not compatible"  # torch's words where `.view` meets memory that a norm had rewritten


def settle(lanes: Lanes, options: dict[str, Any], outputs: Picker) -> tuple[Plan, float]:
    """Find the plan that holds, and its error in the first lane.

    Raises:
        ValueError: the model returns something else each time it is copied.
    """
    refused: dict[str, str] = {}
    fixed: dict[str, str] = {}
    while True:
        plan = plan_folds(lanes.trace, **options, refused=refused, fixed=fixed)
        error, problem = _try(plan, lanes, outputs)
        if not problem:
            return plan, error
        if _NEEDS_NEW_MEMORY in problem and options.get("contiguous") != lanes.trace.reordered:
            options = {**options, "contiguous": lanes.trace.reordered}
            continue
        folded = [fold.name for fold in plan.folds if fold.status in FOLDED or fold.into]
        changed = [*folded, *plan.affine]
        if not changed:  # nothing was changed, and yet the output differs
            raise ValueError("the model returns something else each time it is copied and run: state outside of it?")

        trial = partial(_alone, folded=folded, lanes=lanes, options=options, outputs=outputs)
        search = _Search(trial, folded, tries=3 * len(changed).bit_length() + 3)
        search.halve(changed, problem)
        for name, fault in search.culprits.items():
            (refused if name in folded else fixed)[name] = fault


@dataclass
class _Search:
    """Looks for the norms that a fault comes from.

    Args:
        trial: Says what is wrong when only these norms change; "" if nothing is.
        folded: The norms of which nothing is left. They are blamed first where it takes several to fail.
        tries: How many failing trials are allowed. Then the norms that are left are blamed together.
    """

    trial: Callable[[Sequence[str]], str]
    folded: Sequence[str]
    tries: int
    culprits: dict[str, str] = field(default_factory=dict)

    def halve(self, names: Sequence[str], problem: str) -> None:
        """Blame those of these norms that fail by themselves, or all where none does; together they have a problem."""
        middle, known = len(names) // 2, len(self.culprits)
        halves = (names[:middle], names[middle:]) if len(names) > 1 and self.tries > 0 else ()
        for half in halves:
            fault = self.trial(half)
            if fault:
                self.tries -= 1
                self.halve(half, fault)
        if len(self.culprits) == known:
            self.culprits |= dict.fromkeys([name for name in names if name in self.folded] or names, problem)


def _alone(
    names: Sequence[str], *, folded: Sequence[str], lanes: Lanes, options: dict[str, Any], outputs: Picker
) -> str:
    """Say what is wrong when only these norms change: those in `folded` go, the others become a multiply-add."""
    others = {site.name: "not on trial" for site in lanes.trace.sites if site.name not in names}
    as_it_is = {name: "on trial as one multiply-add" for name in names if name not in folded}
    return _try(plan_folds(lanes.trace, **options, refused=as_it_is, fixed=others), lanes, outputs)[1]


def _try(plan: Plan, lanes: Lanes, outputs: Picker) -> tuple[float, str]:
    return try_on(lanes, lambda copy: apply_plan(plan, manifest_of(plan), copy), outputs)
