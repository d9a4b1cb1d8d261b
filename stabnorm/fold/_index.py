"""The trace, indexed by tag: whose tag it is, what stops it, and how a linear operation can be changed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stabnorm.fold._readers import Linear, View, views_in
from stabnorm.fold._trace import Call, Trace

NONE, SEVERAL = -1, -2


class Index:
    """Tables over a trace's tags; an entry is `NONE`, `SEVERAL`, or what the table says.

    Args:
        trace: The records of the forward.
        tied: For each parameter that has a second owner, that owner's name for it.
        untie: Whether such a parameter may get a copy of its own.
    """

    def __init__(self, trace: Trace, tied: Mapping[str, str], untie: bool) -> None:
        self.trace, self.tied, self.untie = trace, tied, untie
        self.site = self._table()  # the norm whose channel it is
        for index, (site, first) in enumerate(zip(trace.sites, trace.first_tags, strict=True)):
            self.site[first : first + site.num_features] = index
        self.linear = self._table()  # the linear operation whose feature it is
        self.bare = torch.zeros(trace.next_tag, dtype=torch.bool)  # features that still get a bias
        for index, linear in enumerate(trace.linears):
            features = linear.size[0] * linear.size[2]
            for first in filter(None, (linear.outputs, linear.biased)):
                self.linear[first : first + features] = index
            self.bare[linear.outputs : linear.outputs + features] = bool(linear.biased)
        self.obstacle = self._table()  # the first operation that stops a scale
        self.shift_obstacle = self._table()  # the first that stops a shift only
        for index, obstacle in reversed(list(enumerate(trace.obstacles))):
            (self.shift_obstacle if obstacle.shift_only else self.obstacle)[obstacle.tags] = index
        self.unreached = self._table()  # the first part that did not run and could read it
        for index, obstacle in reversed(list(enumerate(trace.unreached))):
            self.unreached[obstacle.tags] = index
        self.stream = self._table()  # the norm channel that a feature is added to
        for add in trace.residuals:
            self._note(self.stream, add.features, add.stream)
        self.reader = self._table()  # the norm that reads a feature
        self.calls: list[list[Call]] = [[] for _ in trace.sites]
        for call in trace.calls:
            self.calls[call.site].append(call)
            if call.source == "linear":
                self._note(self.reader, call.tags, torch.full_like(call.tags, call.site))
        self.weight_problems = [
            self._problem(i, linear.weight) or linear.problem for i, linear in enumerate(trace.linears)
        ]

    def _table(self) -> Tensor:
        return torch.full((self.trace.next_tag,), NONE)

    @staticmethod
    def _note(table: Tensor, tags: Tensor, values: Tensor) -> None:
        earlier = table[tags]
        table[tags] = torch.where((earlier == NONE) | (earlier == values), values, SEVERAL)

    def _problem(self, index: int, view: View) -> str:
        for use in self.trace.uses:
            if use.linear != index and use.view.overlaps(view):
                return f"'{view.name}' is also read by {use.text}: give each its own copy"
        if view.name in self.tied and not self.untie:
            return f"'{view.name}' is tied to '{self.tied[view.name]}': pass tied='untie'"
        return ""

    def sites(self, tags: Tensor) -> list[int]:
        """List the norms whose channels these are."""
        return [site for site in torch.unique(self.site[tags]).tolist() if site != NONE]

    def linears(self, tags: Tensor) -> list[int]:
        """List the linear operations whose features these are."""
        return [linear for linear in torch.unique(self.linear[tags]).tolist() if linear != NONE]

    def text(self, table: Tensor, tags: Tensor) -> str:
        """Give the text of the first obstacle on these tags; empty if there is none."""
        records = self.trace.unreached if table is self.unreached else self.trace.obstacles
        obstacles = table[tags]
        obstacles = obstacles[obstacles != NONE]
        return records[int(obstacles.min())].text if len(obstacles) else ""

    def bias_problem(self, index: int) -> str:
        """Say why a linear operation's outputs cannot get a shift; empty if they can."""
        linear = self.trace.linears[index]
        if isinstance(linear.bias, str):
            return linear.bias
        if linear.biased:
            bare = self.bare & (self.linear == index)
            if bool((bare & ((self.obstacle != NONE) | (self.stream != NONE) | (self.reader != NONE))).any()):
                return "it is used in two ways: its output is also read before its bias is added"
        return next(filter(None, (self._problem(index, view) for view in views_in(linear.bias))), "")

    def rows_problem(self, features: Tensor) -> str:
        """Say why these features cannot be scaled; empty if they can."""
        stopped = self.text(self.obstacle, features)
        if stopped:
            return stopped
        if bool(self.bare[features].any()):
            return "its bias is added later"
        for index in self.linears(features):
            linear: Linear = self.trace.linears[index]
            problem = self.weight_problems[index] or (self.bias_problem(index) if linear.has_bias else "")
            if problem:
                return f"{linear}: {problem}"
        return self.text(self.unreached, features)
