"""From a trace to what happens to each norm and each weight. Pure: the same trace gives the same plan.

Along a path that folds, the unfolded model's value v and the folded model's value u differ by one affine map per
channel: v = A u + C. This is the whole algebra:

- behind a norm y = a x + c whose input is untouched: A = a, C = c;
- behind one whose input is itself such a stream, v = A' u + C': A = a A', C = a C' + c;
- a linear layer that reads it: W <- W A, b <- b + W C (forward);
- a branch that is added to it, v + w = A (u + w / A) + C: the branch's last rows are divided by A (residual);
- a multiplication by s: C <- s C;
- a norm that stays as one multiply-add: it takes A and C in.

Going the other way, a norm that reads nothing but a linear layer's outputs is taken into that layer's rows (backward).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stabnorm._models.ambient import plain_context
from stabnorm.fold._index import NONE, SEVERAL, Index
from stabnorm.fold._readers import Joined, Linear, NewBias, Slot, views_in
from stabnorm.fold._sites import Site
from stabnorm.fold._trace import Call, Trace
from stabnorm.fold.result import FOLDED, FoldedSite, Status

UNSEEN = "no example reaches it, so nothing about it can be verified: pass one that does"
VANISHING = 1e-6  # of the largest scale in a stream: dividing a branch by less loses its digits


@dataclass(eq=False)
class Edit:
    """W <- out_scale W in_scale, b <- out_scale (b + W in_shift) + out_shift.

    `in_` are ``[groups, inputs]``, `out_` ``[groups, outputs]``.
    """

    linear: Linear
    in_scale: Tensor
    in_shift: Tensor
    out_scale: Tensor
    out_shift: Tensor

    @property
    def shifts(self) -> bool:
        """Whether a bias is needed."""
        return bool((self.in_shift != 0).any() or (self.out_shift != 0).any())

    @property
    def new_biases(self) -> list[NewBias]:
        """The parameters that must be registered: those that hold a shift, and constants that are scaled."""
        bias = self.linear.bias
        parts: list[Slot] = [bias] if self.shifts else []
        if isinstance(bias, Joined):
            parts = list(bias.parts) if self.shifts or bool((self.out_scale != 1).any()) else []
        return [part for part in parts if isinstance(part, NewBias)]

    @property
    def changes(self) -> bool:
        """Whether any number changes."""
        return self.shifts or bool((self.in_scale != 1).any() or (self.out_scale != 1).any())

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that exist already and change."""
        return [self.linear.weight.name, *(view.name for view in views_in(self.linear.bias))]


@dataclass
class Plan:
    """What happens to the model.

    Args:
        folds: Every norm that is affine in eval, in order.
        edits: The weights that change.
        affine: Scale, shift and channel axis of each norm that stays as one multiply-add, by name.
        untied: Parameters that get a copy of their own.
        neutral: Norms that stay and give up their gain and bias.
        going_on: Of the norms that go, those whose children stay, such as an activation.
        contiguous: Of the norms that go, those whose output must lie in memory as the norm's did, and in which order.
        max_gauge: The largest factor by which a residual stream's channels are scaled, either way; 1 where none is.
    """

    folds: list[FoldedSite] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    affine: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    neutral: list[Site] = field(default_factory=list)
    going_on: list[str] = field(default_factory=list)
    contiguous: dict[str, tuple[int, int]] = field(default_factory=dict)
    max_gauge: float = 1.0

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that exist already and change."""
        names = {name for edit in self.edits for name in edit.parameters}
        gains = [(site.name, site.gain) for site in self.neutral if site.gain is not None]
        return names | {f"{name}.{part}" for name, gain in gains for part in (gain.weight, gain.bias) if part}


@plain_context()
def plan_folds(
    trace: Trace,
    *,
    residual: bool = True,
    tied: Mapping[str, str] | None = None,
    untie: bool = True,
    refused: Mapping[str, str] | None = None,
    fixed: Mapping[str, str] | None = None,
    contiguous: Mapping[str, tuple[int, int]] | None = None,
) -> Plan:
    """Decide what happens to each norm and each weight.

    Args:
        trace: The records of a forward.
        residual: Whether a stream may carry a norm's scale through residual adds. Default: True.
        tied: For each parameter that has a second owner, that owner's name for it. Default: none.
        untie: Whether such a parameter may get a copy of its own. Default: True.
        refused: Norms that must not be folded, and why. Default: none.
        fixed: Norms that must not even become one multiply-add, and why. Default: none.
        contiguous: Norms in whose place the memory must be rewritten, as the norm did, and in which order. Default:
            none.
    """
    index = Index(trace, tied or {}, untie)
    unseen = {site.name: UNSEEN for site, calls in zip(trace.sites, index.calls, strict=True) if not calls}
    fixed = {**(fixed or {}), **unseen}
    decisions = _Decisions(index, {**(refused or {}), **fixed}, fixed)
    decisions.refuse_by_obstacles()
    decisions.refuse_by_readers()
    decisions.refuse_by_norms()
    decisions.refuse_unread()
    decisions.refuse_by_residuals(residual)
    decisions.settle()
    decisions.refuse_unreached()
    plan = decisions.plan()
    gone = {fold.name for fold in plan.folds if fold.status in FOLDED or fold.name in plan.affine}
    plan.contiguous = {name: axes for name, axes in (contiguous or {}).items() if name in gone}
    return plan


class _Decisions:
    """Decides which norms fold forward, by refusing one after the other, and then what happens to the rest."""

    def __init__(self, index: Index, refused: Mapping[str, str], fixed: Mapping[str, str]) -> None:
        self.index, self.trace, self.refused, self.fixed = index, index.trace, refused, fixed
        self.reasons: list[list[str]] = [[refused[s.name]] if s.name in refused else [] for s in self.trace.sites]
        self.conditions: list[tuple[Tensor, str]] = []  # these tags fold only if their shift is 0
        self.links: dict[int, Call] = {}  # norms whose input is another norm's stream
        self.scale = torch.ones(self.trace.next_tag, dtype=torch.float64)  # A, by tag
        self.shift = torch.zeros(self.trace.next_tag, dtype=torch.float64)  # C, by tag

    def _refuse(self, tags: Tensor, why: str) -> bool:
        """Refuse the norms whose channels these are; True if one of them was not refused yet."""
        sites = self.index.sites(tags)
        fresh = any(not self.reasons[site] for site in sites)
        for site in sites:
            if not any(why.startswith(reason) for reason in self.reasons[site]):  # on a second input it is the same
                self.reasons[site].append(why)
        return fresh

    # --- what refuses ---

    def refuse_by_obstacles(self) -> None:
        for obstacle in self.trace.obstacles:
            if obstacle.shift_only:
                self.conditions.append((obstacle.tags, obstacle.text))
            else:
                self._refuse(obstacle.tags, obstacle.text)

    def refuse_by_readers(self) -> None:
        for index, linear in enumerate(self.trace.linears):
            tags = torch.cat([read.tags.flatten() for read in linear.reads])
            if not bool((tags > 0).any()):
                continue
            if len(linear.reads) > 1:
                on = next((read.on for read in linear.reads if read.on), "")
                self._refuse(tags, f"{linear} reads more than one thing with the same weight{on}")
            if self.index.weight_problems[index]:
                self._refuse(tags, f"{linear}: {self.index.weight_problems[index]}")
            no_shift = f"{linear} cannot take a shift"
            for problem in (linear.pads, self.index.bias_problem(index)):
                if problem:
                    self.conditions.append((tags, f"{no_shift}: {problem}"))
            for read in linear.reads:
                if read.padded:
                    zeros = f"{no_shift}: it also reads zeros of a padding{read.on}"
                    self.conditions.append((read.tags.flatten(), zeros))
                differs = f"{no_shift}: it differs by position{read.on}"
                self.conditions.append((read.tags[read.factor.isnan()], differs))

    def refuse_by_norms(self) -> None:
        for site, calls in enumerate(self.index.calls):
            streams = [call for call in calls if call.source == "stream"]
            name = self.trace.sites[site].name
            for call in streams:
                first = self.links.setdefault(site, call)
                if name in self.fixed:
                    self._refuse(call.tags, f"norm '{name}' reads it, and stays as it is")
                same = torch.equal(call.tags, first.tags) and torch.equal(call.factor, first.factor)
                if not same or len(streams) < len(calls):
                    self._refuse(call.tags, f"norm '{name}' reads something else, too")
                self.conditions.append(
                    (call.tags[call.factor.isnan()], f"norm '{name}' reads it multiplied by position")
                )

    def refuse_unread(self) -> None:
        """Refuse norms that nothing reads: their output may have left by a way that is not followed, such as NumPy."""
        for site, first in enumerate(self.trace.first_tags):
            if not self.reasons[site] and not self._readers(site):
                self._refuse(torch.tensor([first]), "nothing was seen to read its output")

    def refuse_by_residuals(self, allowed: bool) -> None:
        for add in self.trace.residuals:
            where = f"residual add in '{add.path}'" if add.path else "residual add"
            gains = all(self.trace.sites[site].gain is not None for site in self.index.sites(add.stream))
            problem = "" if allowed else "the stream reads it" if gains else "pass residual=True"
            problem = problem or self.index.rows_problem(add.features)
            if not problem and bool((self.index.stream[add.features] == SEVERAL).any()):
                problem = "the branch is added to several streams"
            if not problem and bool((self.index.reader[add.features] != NONE).any()):
                problem = "another norm reads the branch, too"
            if problem:
                self._refuse(add.stream, f"{where}: {problem}")

    def refuse_unreached(self) -> None:
        """Refuse what a part of the model could read that did not run."""
        if any([self._refuse(obstacle.tags, obstacle.text) for obstacle in self.trace.unreached]):
            self.settle()

    def settle(self) -> None:
        """Follow A and C along the streams, and refuse norms whose A or C is not allowed, until all are allowed."""
        order = list(dict.fromkeys(call.site for call in self.trace.calls))
        fresh = True
        while fresh:
            self.scale.fill_(1)
            self.shift.fill_(0)
            for site in order:
                if not self.reasons[site]:
                    first = self.trace.first_tags[site]
                    behind = slice(first, first + self.trace.sites[site].num_features)
                    self.scale[behind], self.shift[behind] = self._composed(site)
            fresh = False
            for tags, why in self.conditions:
                fresh |= self._refuse(tags[self.shift[tags] != 0], why)
            for add in self.trace.residuals:
                size = self.scale[add.stream].abs()
                vanishing = add.stream[size < VANISHING * size.max()]
                fresh |= self._refuse(
                    vanishing, f"its scale nearly vanishes in a channel of the stream in '{add.path}'"
                )

    def _composed(self, site: int) -> tuple[Tensor, Tensor]:
        """Give A and C behind a norm that folds, or scale and shift of one that stays."""
        scale, shift = self.trace.sites[site].scale, self.trace.sites[site].shift
        if site not in self.links:
            return scale, shift
        link = self.links[site]
        before = _times(link.factor, self.shift[link.tags])
        return scale * self.scale[link.tags], scale * before + shift

    # --- backward ---

    def _backward_problem(self, site: int) -> str:
        """Say why a norm cannot go into the layer before it; empty if it can."""
        calls, affine = self.index.calls[site], self.trace.sites[site]
        if not calls or any(call.source != "linear" for call in calls):
            return "its input is more than a linear layer's output"
        first = calls[0]
        for call in calls:
            same = torch.equal(call.tags, first.tags) and torch.equal(call.channels, first.channels)
            if not same or not torch.equal(call.factor.nan_to_num(), first.factor.nan_to_num()):
                return "its calls read different features"
        if bool((self.index.reader[first.tags] == SEVERAL).any()):
            return "another norm reads its input, too"
        if bool((self.index.stream[first.tags] != NONE).any()):
            return "its input is also added to a residual stream"
        problem = self.index.rows_problem(first.tags)
        shifted = affine.shift[first.channels] != 0
        if problem or not bool(shifted.any()):
            return problem
        tags, factor = first.tags[shifted], first.factor[shifted]
        if not bool((factor.isfinite() & (factor != 0)).all()):
            return "its input is multiplied by zero, or differently at each position"
        problems = [self.index.bias_problem(index) for index in self.index.linears(tags)]
        return next(filter(None, [self.index.text(self.index.shift_obstacle, tags), *problems]), "")

    # --- the plan ---

    def plan(self) -> Plan:
        plan = Plan(edits=[self._edit(linear) for linear in self.trace.linears])
        plan.going_on = [site.name for site in self.trace.sites if site.goes_on and site.name not in self.fixed]
        streams = set()
        for add in self.trace.residuals:
            scale = self.scale[add.stream]
            self._scale_rows(plan.edits, add.features, 1 / scale)
            streams.update(self.index.sites(add.stream))
            plan.max_gauge = max(plan.max_gauge, float(scale.abs().max()), float(1 / scale.abs().min()))
        for site, affine in enumerate(self.trace.sites):
            reasons = self.reasons[site]
            if affine.gain is not None:
                plan.folds.append(
                    FoldedSite(affine.name, "kept", () if reasons else self._readers(site), "; ".join(reasons))
                )
                plan.neutral += [] if reasons else [affine]
                continue
            if not reasons:
                status: Status = "residual" if site in streams else "forward"
                plan.folds.append(FoldedSite(affine.name, status, self._readers(site)))
                continue
            problem = "" if affine.name in self.refused else self._backward_problem(site)
            if not problem and affine.name not in self.refused:
                plan.folds.append(FoldedSite(affine.name, "backward", self._into_rows(plan.edits, site)))
                continue
            reason = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
            reason += f". Backward: {problem}" if problem else ""
            if affine.name in self.fixed:
                plan.folds.append(FoldedSite(affine.name, "kept", (), reason))
                continue
            plan.folds.append(FoldedSite(affine.name, "affine", (), reason))
            plan.affine[affine.name] = affine.frozen(*self._composed(site))
        plan.edits = [edit for edit in plan.edits if edit.changes]
        plan.untied = sorted({name for edit in plan.edits for name in edit.parameters if name in self.index.tied})
        return plan

    def _edit(self, linear: Linear) -> Edit:
        """Give the change of a linear operation's weight that makes up for the streams it reads."""
        groups, _, outputs = linear.size
        read = linear.reads[0]  # where there are several, none of them folds
        scale, shift = self.scale[read.tags], _times(read.factor, self.shift[read.tags])
        one = torch.ones(groups, outputs, dtype=torch.float64)
        return Edit(linear, scale, shift, one, torch.zeros_like(one))

    def _scale_rows(self, edits: list[Edit], features: Tensor, scale: Tensor, shift: Tensor | None = None) -> list[str]:
        """Scale features, and shift them; return the layers' names."""
        names = []
        for index in self.index.linears(features):
            own = self.index.linear[features] == index
            edit = edits[index]
            rows = features[own] - (edit.linear.biased or edit.linear.outputs)
            edit.out_scale.view(-1)[rows] = scale[own]
            if shift is not None:
                edit.out_shift.view(-1)[rows] = shift[own]
            names.append(edit.linear.name)
        return names

    def _into_rows(self, edits: list[Edit], site: int) -> tuple[str, ...]:
        call, affine = self.index.calls[site][0], self.trace.sites[site]
        shift = affine.shift[call.channels]
        shift = torch.where(shift == 0, 0, shift / call.factor)
        return tuple(self._scale_rows(edits, call.tags, affine.scale[call.channels], shift))

    def _readers(self, site: int) -> tuple[str, ...]:
        linears = [n.name for n in self.trace.linears if any(site in self.index.sites(r.tags) for r in n.reads)]
        norms = [self.trace.sites[n].name for n, link in self.links.items() if site in self.index.sites(link.tags)]
        return tuple(dict.fromkeys([*linears, *norms]))


def _times(factor: Tensor, shift: Tensor) -> Tensor:
    """Multiply; an unknown factor does not matter where the shift is 0."""
    return torch.where(shift == 0, 0, factor * shift)
