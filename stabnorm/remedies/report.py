"""What every remedy returns, how all of its steps are carried out or none, and `undo`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stabnorm._checks import check_has_numbers, check_instance, check_model
from stabnorm._log import printable
from stabnorm._models.intact import intact_on_error
from stabnorm._models.names import NameFilter, Patterns, compiled
from stabnorm._models.tables import aligned
from stabnorm._models.watched import change_class, own_class
from stabnorm._models.wrappers import is_compiled, is_scripted, parallel_wrapper
from stabnorm.errors import StabNormError
from stabnorm.nn._fused_path import leave_fused_paths

Preserves = Literal["bits", "1e-6", "no"]
_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Change:
    """What a remedy did to one module or parameter.

    Attributes:
        name: its dotted name in the model.
        action: what was done to it.
    """

    name: str
    action: str


@dataclass(frozen=True)
class RemedyReport:
    """What a remedy did. `str` gives a table; `undo` takes it back.

    Attributes:
        remedy: the name of the function.
        changes: what was changed, in module order.
        left: what was left alone, by name, with the reason.
        preserves: how the outputs at the moment of the call compare with those before: "bits" the same bits, "1e-6" the
            same up to rounding, "no" others.
    """

    remedy: str
    changes: tuple[Change, ...]
    left: Mapping[str, str]
    preserves: Preserves
    _past: "list[_Past]" = field(default_factory=list, repr=False, compare=False)

    @property
    def changed(self) -> list[str]:
        """The names of what was changed."""
        return [change.name for change in self.changes]

    def __str__(self) -> str:
        outputs = {"bits": "the same bits", "1e-6": "the same up to rounding", "no": "changed"}[self.preserves]
        rows = [(change.name or "(model)", change.action) for change in self.changes]
        rows += [(name or "(model)", f"left: {reason}") for name, reason in self.left.items()]
        return "\n".join([f"{self.remedy}: {len(self.changes)} changed; outputs are {outputs}", *_table(rows)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle what is said, not the model; a copy cannot be undone."""
        return RemedyReport, (self.remedy, self.changes, dict(self.left), self.preserves)


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return aligned(rows, indent=2) if rows else []


class Step(NamedTuple):
    """One planned change.

    Attributes:
        name: dotted name of what is changed, for the report.
        action: what is done to it, for the report.
        carry_out: does it.
        modules: those whose class, attributes, parameters, buffers or children it changes.
        numbers: the tensors whose numbers it changes in place; `undo` keeps a copy of each.
    """

    name: str
    action: str
    carry_out: Callable[[], object]
    modules: tuple[nn.Module, ...] = ()
    numbers: tuple[Tensor, ...] = ()


def check_remedied(model: Any) -> None:
    """Check the model that a remedy is for.

    Raises:
        TypeError: it is no module.
        StabNormError: it is compiled, scripted, without numbers, or wrapped for several processes.
    """
    check_model("model", model)
    check_has_numbers(model, "to change")
    for name, module in model.named_modules():
        where = repr(printable(name)) if name else "the model"
        if is_scripted(module) or is_compiled(module):
            made = "scripted" if is_scripted(module) else "compiled"
            raise StabNormError(f"{where} is {made} already. Apply the remedy first, then compile")
        wrapper = parallel_wrapper(module)
        if wrapper:
            raise StabNormError(f"{where} is wrapped in {wrapper} already. Apply the remedy first, then wrap the model")


def chosen(
    of: str, names: Iterable[str], include: Patterns = None, exclude: Patterns = None, *, hint: str = ""
) -> list[str]:
    """Return the names that `include` and `exclude` leave of those that a remedy could change.

    Args:
        of: what they are, in the plural, for messages.
        names: the candidates.
        include: see `NameFilter`.
        exclude: see `NameFilter`.
        hint: what to do where there is no candidate, as a sentence. Default: nothing more.

    Raises:
        ValueError: a pattern is invalid, or matches none of the candidates.
        StabNormError: there is no candidate, or none is left.
    """
    names = list(names)
    wanted = NameFilter(include, exclude)
    if not names:
        raise StabNormError(f"the model has no {of}" + (f". {hint}" if hint else ""))
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in [] if patterns is None else compiled(argument, patterns):
            if not any(map(pattern.search, names)):
                some = ", ".join(map(repr, names[:8])) + (", ..." if names[8:] else "")
                raise ValueError(f"{argument}={pattern.pattern!r} matches none of the {len(names)} {of}: {some}")
    left = [name for name in names if wanted(name)]
    if not left:
        raise StabNormError(f"include={include!r}, exclude={exclude!r} leave none of the {len(names)} {of}")
    return left


def carried_out(
    remedy: str, model: nn.Module, steps: Sequence[Step], left: Mapping[str, str], preserves: Preserves
) -> RemedyReport:
    """Carry out all steps of a remedy; where one raises, the model is as it was.

    Raises:
        StabNormError: there is nothing to do; the message has the reasons.
    """
    if not steps:
        reasons = [":", *_table([(name or "(model)", reason) for name, reason in left.items()])] if left else []
        raise StabNormError(f"{remedy} has nothing to change in {type(model).__name__}" + "\n".join(reasons))
    past = _Past(model, steps)
    try:
        with intact_on_error(model), torch.no_grad():
            for step in steps:
                step.carry_out()
            leave_fused_paths(model)
    except BaseException:
        past.put_numbers_back()
        raise
    past.remember_now()
    changes = tuple(Change(step.name, step.action) for step in steps)
    return RemedyReport(remedy, changes, dict(left), preserves, [past])


def undo(report: RemedyReport) -> None:
    """Take a remedy back: the model is as it was before the call, bit for bit.

    This works as long as no parameter of the model has changed. A model that was trained or loaded since needs the
    remedy; `fold_norms` takes it out at inference. Undo the remedies of one model in reverse order.

    Args:
        report: what the remedy returned, the object itself.

    Raises:
        TypeError: it is no report.
        StabNormError: it is a copy, it was undone already, a parameter has changed since, or the modules were changed
            again, by another remedy. The model has not changed then.

    >>> from stabnorm.remedies import freeze_embedding
    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    >>> report = freeze_embedding(model)
    >>> model[0].weight.requires_grad
    False
    >>> undo(report)
    >>> model[0].weight.requires_grad
    True
    """
    check_instance("report", report, RemedyReport, "what a remedy of stabnorm.remedies returned")
    if not report._past:
        raise StabNormError(
            f"this report of {report.remedy} was undone already, or it is a copy. Pass the report that the remedy "
            "returned, once"
        )
    report._past[-1].bring_back(report.remedy)
    report._past.clear()


class _Past:
    """The model as it was before a remedy, so far as the remedy changes it."""

    def __init__(self, model: nn.Module, steps: Sequence[Step]) -> None:
        self.model = model
        self.modules = list({id(module): module for step in steps for module in step.modules}.values())
        self.before = [_State.of(module) for module in self.modules]
        tensors = {id(t): t for step in steps for t in step.numbers}
        self.numbers = [(t, t.detach().clone()) for t in tensors.values()]
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def remember_now(self) -> None:
        """Note what the remedy made, against which `bring_back` compares."""
        self.after = [_State.of(module) for module in self.modules]
        self.trained = [(p, was) for p, was in self.trained if p.requires_grad != was]
        self.parameters = {name: (p, _Print.of(p)) for name, p in self.model.named_parameters()}

    def put_numbers_back(self) -> None:
        with torch.no_grad():
            for tensor, numbers in self.numbers:
                tensor.copy_(numbers)
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)

    def bring_back(self, remedy: str) -> None:
        now = dict(self.model.named_parameters())
        for name, (parameter, print_then) in self.parameters.items():
            if now.get(name) is not parameter or print_then.differs_from(_Print.of(parameter)):
                raise StabNormError(
                    f"{printable(name)!r} has changed since {remedy}, so the model was trained or loaded, and undo "
                    "would give another model. Keep the remedy: fold_norms takes it out at inference"
                )
        for module, after in zip(self.modules, self.after, strict=True):
            if not after.is_still(module):
                raise StabNormError(
                    f"a {type(module).__name__} was changed again since {remedy}. Undo the later remedies first"
                )
        for module, before, after in zip(self.modules, self.before, self.after, strict=True):
            before.restore(module, after)
        self.put_numbers_back()


class _Print(NamedTuple):
    """What shows that a parameter's numbers have changed; another device only rounds the sums differently.

    Torch's own count of changes in place lacks those of fused optimizers, and counts an `undo` that brings them back.
    """

    total: float
    norm: float
    size: int

    @classmethod
    @torch.no_grad()
    def of(cls, tensor: Tensor) -> "_Print":
        total = tensor.sum(dtype=torch.float64)
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
        return cls(total.item(), norm.item(), tensor.numel())

    def differs_from(self, other: "_Print") -> bool:
        rounding = 1e-12 * self.norm * max(self.size, 1) ** 0.5
        return bool(abs(self.total - other.total) > rounding or abs(self.norm - other.norm) > rounding)


class _State(NamedTuple):
    """Class, attributes and tables of one module; the hooks are left out, which others put on and take off."""

    cls: type[nn.Module]
    attributes: dict[str, Any]
    tables: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> "_State":
        attributes = {name: v for name, v in vars(module).items() if "hook" not in name and name not in _TABLES}
        return cls(own_class(module), attributes, {name: dict(vars(module)[name]) for name in _TABLES})

    def is_still(self, module: nn.Module) -> bool:
        now = _State.of(module)
        same = all(
            list(now.tables[name]) == list(table) and all(now.tables[name][k] is v for k, v in table.items())
            for name, table in self.tables.items()
            if name != "_buffers"  # a buffer may become another object, as when the model moves
        )
        return own_class(module) is self.cls and same

    def restore(self, module: nn.Module, after: "_State") -> None:
        change_class(module, self.cls)
        attributes = vars(module)
        for name in after.attributes.keys() | self.attributes.keys():
            if name not in self.attributes:
                attributes.pop(name, None)
            elif name not in after.attributes or after.attributes[name] is not self.attributes[name]:
                attributes[name] = self.attributes[name]
        for name, table in self.tables.items():
            kept = {key: value for key, value in attributes[name].items() if key in table}
            changed = {key: value for key, value in table.items() if after.tables[name].get(key) is not value}
            ordered = {key: changed.get(key, kept.get(key)) for key in table}
            attributes[name].clear()
            attributes[name].update(ordered)
