"""What `fold_norms` hands back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from stabnorm._models.tables import aligned

Status = Literal["forward", "residual", "backward", "affine", "rms", "kept"]
FOLDED = ("forward", "backward", "residual")  # nothing of the norm is left


@dataclass(frozen=True)
class FoldedSite:
    """What became of one norm.

    Args:
        name: Its name in the model.
        status: "forward": it went into the weights that read it; "backward": into the layer before it; "residual":
            forward, and the residual stream carries its scale; "affine": one multiply-add is left; "rms": an RMSNorm is
            left (`to_pre_rms`); "kept": it stays unchanged.
        into: The layers, or norms, that took it in.
        reason: Why something of it is left; empty when nothing is.
    """

    name: str
    status: Status
    into: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class FoldResult:
    """A folded model, and what became of each norm; printed, it is a table.

    Args:
        model: The folded model.
        norms: One entry for each norm, in module order.
        max_rel_error: Largest difference between the outputs before and after, relative to the largest output.
        precision: The precision of this error: "float64", or the lowest one in the model's own forward.
        checked_on: The inputs it was checked on, in words.
        vacuous: True when the outputs do not change when the norms do, so that the check says nothing.
        max_gauge: The largest factor by which a channel of a residual stream is scaled up or down. Weights grow by this
            factor: beyond about 1e3 do not store them in float16, or in int8 with one scale per tensor.
        manifest: What changed in the model's structure, JSON-able; see `apply_manifest`.
    """

    model: nn.Module
    norms: list[FoldedSite]
    max_rel_error: float
    precision: str
    checked_on: str
    vacuous: bool
    max_gauge: float
    manifest: dict[str, Any]

    @property
    def summary(self) -> str:
        """How many norms went where, and how exact the result is, in one line."""
        went, bare = counts_of(self.norms), sum(norm.status == "kept" and bool(norm.into) for norm in self.norms)
        went += f", {bare} of them without gain and bias" if bare else ""
        text = f"{len(self.norms)} norms: {went}; largest relative error {self.max_rel_error:.1e} in {self.precision}"
        return f"{text}, on {self.checked_on}" + (
            "; but the output does not depend on the norms: this check says nothing" * self.vacuous
        )

    def __str__(self) -> str:
        rows = [
            (norm.name, norm.status, ". ".join(filter(None, [", ".join(norm.into), norm.reason])))
            for norm in self.norms
        ]
        return "\n".join([self.summary, *aligned(rows)])


def counts_of(norms: Sequence[FoldedSite]) -> str:
    """Say how many norms have which status."""
    counts = {status: sum(norm.status == status for norm in norms) for status in get_args(Status)}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none"
