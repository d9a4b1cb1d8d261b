"""Odd inputs for every public door: `python -m tests.field.odd_inputs` prints what becomes of each of them.

A door is something public that a user calls. For each of its arguments there are values that it must refuse, by kind of
argument: what is no model, no number, no name, and so on.
"""

import collections
import functools
import linecache
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import stabnorm
from stabnorm import StabNormError, companions, dashboard, fold, monitor, ops, pretrained, switch
from stabnorm.callbacks import FoldCallback, ProgressiveNormCallback, StabilityCallback, repair_module
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm, no_decay_groups
from stabnorm.switch import schedules

NAN, INF = math.nan, math.inf


class Odd:
    """An object that is nothing in particular."""

    def __repr__(self) -> str:
        return "Odd()"


ODD = Odd()

# --- what is none, by kind of argument ---

MODULE = (None, 5, "model", nn.Linear, [nn.Linear(2, 2)], {"weight": torch.zeros(2, 2)}, torch.zeros(2, 2), len, ODD)
COUNT = (None, 2**70, 0, -1, 1.5, NAN, INF, "5", [1], ODD, torch.zeros(2))  # of 1 or more
INDEX = (None, -1, 1.5, NAN, INF, "5", [1], ODD, torch.zeros(2))  # of 0 or more
NUMBER = (None, "x", [1.0], NAN, 1j, ODD, torch.zeros(2))
FLAG: tuple[Any, ...] = (None, "x", 2, 0.5, [], ODD)
NAME = ("nonsense", "", 5, ["layer"], ODD)
PATTERN = (5, 1.5, "(", b"norm", [5], [None], ODD, torch.zeros(2), torch.zeros(()))
FUNCTION = (5, "x", [len], ODD, lambda: None)  # of one argument or more
MASK: tuple[Any, ...] = (lambda: None, 1.5, [], {}, b"mask", ODD, torch.ones(2, dtype=torch.bool))
LOADER = (
    None,
    5,
    np.float64(1),
    np.zeros((8, 4)),
    "batches",
    {"x": torch.zeros(2, 4)},
    torch.zeros(8, 4),
    nn.Linear(2, 2),
    len,
    ODD,
)
EXAMPLE: tuple[Any, ...] = (None, 5, "x", [], [5], len, ODD)
STATE: tuple[Any, ...] = (None, 5, "x", [], {}, {"nonsense": 1}, ODD)
OPTIONS = (5, "x", [1], {"nonsense": 1}, {5: 1}, ODD)
SHAPE: tuple[Any, ...] = (None, 0, -1, 1.5, "8", NAN, ODD, [], ())
TENSOR = (None, 5, "x", [1.0], ODD)
FOLDER = (5, 1.5, None, ODD, ["run"])
EPS = (*NUMBER, -1.0, INF)
SHARE = (*NUMBER, -0.1, 1.5, INF)  # from 0 to 1
AXIS = (None, 0, 1.5, "x", ODD)


def without(values: tuple[Any, ...], *but: Any) -> tuple[Any, ...]:
    """The values that are none of these."""
    return tuple(value for value in values if not any(value is b or (b == {} and value == {}) for b in but))


# --- the doors ---


class Door(NamedTuple):
    """Something public that is called: with what it works, and which values of its arguments are odd."""

    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    odd: Mapping[str, tuple[Any, ...]]


X = torch.randn(16, 4)
BATCHES = [X, X + 1]


def plain() -> nn.Module:
    """A model with a LayerNorm."""
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def affine() -> nn.Module:
    """A model with a norm that folds."""
    return nn.Sequential(nn.Linear(4, 8), RepBN(8), nn.Linear(8, 2)).eval()


def converted() -> nn.Module:
    """A model with a progressive norm."""
    return nn.Sequential(nn.Linear(4, 8), PRepBN(8), nn.Linear(8, 2))


def folded() -> nn.Module:
    """A model whose norm is folded."""
    model: nn.Module = stabnorm.fold_norms(affine(), X).model
    return model


@functools.cache
def kept_folder() -> Path:
    """A folder for what the doors write."""
    return Path(tempfile.mkdtemp())


def record() -> Path:
    """A folder with a record."""
    folder = kept_folder() / "record"
    monitor.FileRecord(folder).close()
    return folder


@functools.cache
def run() -> Path:
    """A folder with the record of a run of one step."""
    folder, model = kept_folder() / "run", plain()
    with stabnorm.StabilityMonitor(model) as watching:
        watching.records.append(monitor.FileRecord(folder))
        model(X)
        watching.step()
    watching.records[0].close()
    return folder


def ours() -> tuple[nn.Module, nn.Module]:
    """A model that is converted and fitted, and its original."""
    original, model = plain().eval(), plain().eval()
    model.load_state_dict(original.state_dict())
    stabnorm.convert_norms(model)
    pretrained.fit_norms(model, original, BATCHES, [["1"]], pretrained.Runner())
    return model, original


def repair(**options: Any) -> pretrained.Repair:
    """A repair that has not begun."""
    model, original = ours()
    arguments: dict[str, Any] = {"model": model, "original": original, "steps": 2}
    return pretrained.Repair(**arguments | options)


def attached() -> stabnorm.StabilityMonitor:
    """A monitor that has seen one forward."""
    model = plain()
    watching = stabnorm.StabilityMonitor(model)
    watching.attach()
    model(X).sum().backward()
    return watching


def in_step(**arguments: Any) -> None:
    """End a step of a monitor."""
    watching = attached()
    try:
        watching.step(**arguments)
    finally:
        watching.detach()


def restored(make: Callable[[], Any]) -> Callable[..., Any]:
    """What loads a state into a new object."""
    return lambda state: make().load_state_dict(state)


def forward_of(make: Callable[[], nn.Module]) -> Callable[..., Any]:
    """The forward of a new module."""
    return lambda x, mask=None: make()(x, mask)


def new_switch(**options: Any) -> stabnorm.ProgressiveSwitch:
    """A switch of ten steps."""
    arguments: dict[str, Any] = {"model": converted(), "total_steps": 10}
    return stabnorm.ProgressiveSwitch(**arguments | options)


REP_OPTIONS = {
    "eps": EPS, "momentum": (*without(NUMBER, None), 5, -1.0, 1.01, INF), "center": FLAG, "filtration": NAME,
    "init": (None, *NAME), "statistic": (None, *NAME), "sync": FLAG,
}  # fmt: skip
FILTERS = {"include": PATTERN, "exclude": PATTERN}
FOLD = {"outputs": FUNCTION, "tied": (None, *NAME), "check": without(EXAMPLE, None)}
SCHEDULE = {"start": (*INDEX,), "fraction": (*SHARE, 0), "order": (None, *NAME)}
LAM = lambda step, total=10, **rest: 0.0  # noqa: E731

DOORS: dict[str, Door] = {
    "find_norms": Door(stabnorm.find_norms, lambda: {"model": plain()}, {"model": MODULE, **FILTERS}),
    "register_norm": Door(
        stabnorm.register_norm,
        lambda: {"norm_class": type("Mine", (nn.Module,), {}), "kind": "layer"},
        {
            "norm_class": (None, 5, "x", nn.LayerNorm(4), int, ODD),
            "kind": (None, *NAME),
            "channel_dim": tuple(axis for axis in AXIS[:3] if axis is not None),  # None leaves it to the class
            "num_features": (0, -1, 1.5, ODD),
            "eps": (-1.0, NAN, [1], ODD),
            "weight": (5, [1], ODD),
            "bias": (5, [1], ODD),
            "gain_offset": NUMBER,
        },
    ),
    "valid_tokens": Door(
        lambda mask: stabnorm.valid_tokens(mask),
        lambda: {"mask": torch.ones(2, 3, dtype=torch.bool)},
        {"mask": (*TENSOR, torch.ones(2), torch.tensor(True), [True])},
    ),
    "convert_norms": Door(
        stabnorm.convert_norms,
        lambda: {"model": plain()},
        {
            "model": MODULE,
            "to": (None, *NAME),
            **FILTERS,
            "loader": without(LOADER, None),
            **REP_OPTIONS,
            "eval_mode": (None, *NAME),
            "variant": NAME,
            "nonsense": (1,),
        },
    ),
    "convert_norms, fit": Door(
        lambda **a: stabnorm.convert_norms(init="fit", **a),
        lambda: {"model": plain(), "loader": BATCHES},
        {"loader": (*LOADER, [5], ["x"], [X[:, :3]], [])},
    ),
    "fold_norms": Door(
        stabnorm.fold_norms,
        lambda: {"model": affine(), "example": X},
        {
            "model": MODULE,
            "example": (*EXAMPLE, X[:, :3], (), {}),
            **FOLD,
            "residual": (None, 2, *NAME),
            "strict": FLAG,
            "inplace": FLAG,
        },
    ),
    "fold_gains": Door(
        stabnorm.fold_gains,
        lambda: {"model": plain().eval(), "example": X},
        {"model": MODULE, "example": EXAMPLE, **FOLD, "inplace": FLAG},
    ),
    "to_pre_rms": Door(
        stabnorm.to_pre_rms,
        lambda: {"model": plain().eval(), "example": X},
        {"model": MODULE, "example": EXAMPLE, **FOLD},
    ),
    "plan_fold": Door(
        stabnorm.plan_fold,
        lambda: {"model": plain(), "example": X},
        {
            "model": MODULE,
            "example": EXAMPLE,
            "to": (None, *NAME),
            "residual": (None, 2, *NAME),
            "tied": (None, *NAME),
            "outputs": FUNCTION,
            "eps": EPS,
            "nonsense": (1,),
        },
    ),
    "guard_folds": Door(
        stabnorm.guard_folds,
        lambda: {"model": folded(), "loader": BATCHES},
        {
            "model": MODULE,
            "loader": (*LOADER, [], [5]),
            "guard": (None, *NAME),
            "margin": (*NUMBER, 0, -1, INF),
            "forward": FUNCTION,
        },
    ),
    "FoldGuard": Door(
        fold.FoldGuard,
        lambda: {"model": folded(), "guard": "warn", "margin": 2.0},
        {"model": MODULE, "guard": (None, *NAME), "margin": (*NUMBER, 0, -1, INF)},
    ),
    "apply_manifest": Door(
        stabnorm.apply_manifest,
        lambda: {"model": affine(), "manifest": stabnorm.fold_norms(affine(), X).manifest},
        {"model": MODULE, "manifest": (*STATE, {"format": 1}, '{"format": 1}')},
    ),
    "FrozenAffine": Door(
        fold.FrozenAffine,
        lambda: {"scale": torch.ones(4), "shift": torch.zeros(4)},
        {"scale": (*TENSOR, torch.ones(3), torch.ones(2, 2)), "shift": TENSOR, "channel_dim": AXIS},
    ),
    "StabilityMonitor": Door(
        stabnorm.StabilityMonitor,
        lambda: {"model": plain()},
        {
            "model": MODULE,
            "preset": (None, 5, "x", "", [], ["x"], [5], {"amax": 1}, ODD),
            "flush_every": COUNT,
            **FILTERS,
            "gradients": FLAG,
            "sync": FLAG,
            "fused": FLAG,
            "detector": (*FUNCTION, int, list),
            "companions": (None, 5, "x", ["x"], [5], ODD),
        },
    ),
    "StabilityMonitor.step": Door(
        in_step,
        dict,
        {
            "loss": ("x", [1.0], 1j, ODD, torch.zeros(2), torch.zeros((), dtype=torch.complex64)),
            "learning_rate": ("x", [1.0], ODD, torch.zeros(2)),
            "grad_scale": ("x", {}, {"a": 1}, 0, -1, NAN, [1.0], ODD, torch.zeros(2)),
            "optimizer": (None, 5, "x", [5], torch.optim.SGD, ODD),
        },
    ),
    "StabilityMonitor.load_state_dict": Door(
        restored(lambda: stabnorm.StabilityMonitor(plain())),
        lambda: {"state": stabnorm.StabilityMonitor(plain()).state_dict()},
        {"state": STATE},
    ),
    "remove_norms": Door(
        stabnorm.remove_norms,
        lambda: {"model": plain(), "loader": BATCHES},
        {
            "model": MODULE,
            "loader": (*LOADER, [], [5]),
            "steps": INDEX,
            "tolerance": (*without(NUMBER, None), -1),
            "keep": PATTERN,
            "loss": FUNCTION,
            "held_out": without(LOADER, None),
            "recipe": (5, "x", {}, ODD),
            "fit": NAME,
            "fit_batches": COUNT,
            "forward": FUNCTION,
            "mask": MASK,
            "progress": FLAG,
        },
    ),
    "recalibrate_norms": Door(
        stabnorm.recalibrate_norms,
        lambda: {"model": affine(), "loader": BATCHES, "n_batches": 2},
        {
            "model": MODULE,
            "loader": (*LOADER, [], [5]),
            "n_batches": COUNT,
            "metric": (*FUNCTION, lambda model: None, lambda model: "x"),
            "kappa": (-0.1, 1.5, *NUMBER[1:]),
            "momentum": (0, 1.5, *NUMBER),
            "alpha": (-0.1, 1.5, *NUMBER),
            "forward": FUNCTION,
        },
    ),
    "ProgressiveSwitch": Door(
        new_switch,
        dict,
        {
            "model": MODULE,
            "total_steps": COUNT,
            "schedule": (None, *NAME),
            **SCHEDULE,
            "monitor": (5, "x", plain(), ODD),
        },
    ),
    "ProgressiveSwitch, linear": Door(
        functools.partial(new_switch, schedule="linear"), dict, {"total_steps": COUNT, **SCHEDULE}
    ),
    "ProgressiveSwitch.begin": Door(
        lambda loss_scale: new_switch().begin(loss_scale),
        lambda: {"loss_scale": 2.0},
        {"loss_scale": ("x", 0, -1, NAN, INF, [1.0], ODD, torch.zeros(2))},
    ),
    "ProgressiveSwitch.step": Door(
        lambda steps_done: new_switch(schedule="linear").step(steps_done),
        lambda: {"steps_done": 1},
        {"steps_done": without(INDEX, None)},
    ),
    "ProgressiveSwitch.load_state_dict": Door(
        restored(new_switch), lambda: {"state": new_switch().state_dict()}, {"state": STATE}
    ),
    "RepBN": Door(
        RepBN,
        lambda: {"num_features": 4},
        {"num_features": COUNT, **REP_OPTIONS, "channel_dim": AXIS},
    ),
    "PRepBN": Door(
        PRepBN,
        lambda: {"normalized_shape": 4},
        {
            "normalized_shape": SHAPE,
            **REP_OPTIONS,
            "channel_dim": AXIS,
            "kind": (None, *NAME),
            "eval_mode": (None, *NAME),
            "variant": NAME,
            "nonsense": (1,),
        },
    ),
    "UnifiedNorm": Door(
        UnifiedNorm,
        lambda: {"num_features": 4},
        {
            "num_features": COUNT,
            "window": (None, 0, -1, 1.5, "x", NAN, [], (1,), (1, 2, 3), (1, "x"), (1, 0), ODD),
            "warmup_steps": INDEX,
            "filtration": NAME,
            "patience": without(COUNT, None),
            "momentum": (*NUMBER, 5, -1.0),
            "eps": EPS,
            "bias": FLAG,
            "channel_dim": AXIS,
            "sync": FLAG,
            "variant": NAME,
        },
    ),
    "PowerNorm": Door(
        PowerNorm,
        lambda: {"num_features": 4},
        {
            "num_features": COUNT,
            "groups": (0, -1, 3, 1.5, "x", NAN, [1], ODD),
            "warmup_steps": INDEX,
            "alpha_fwd": (*NUMBER, 5, -1.0),
            "alpha_bkw": (*NUMBER, 5, -1.0),
            "eps": EPS,
            "channel_dim": AXIS,
            "sync": FLAG,
            "variant": NAME,
        },
    ),
    **{
        f"{norm.__name__}.forward": Door(
            forward_of(functools.partial(norm, 4)),
            lambda: {"x": X},
            {
                "x": (*TENSOR, X.long(), X[:, :3], torch.tensor(1.0), X.bool()),
                "mask": (5, "x", [True], torch.ones(16), torch.ones(3, dtype=torch.bool), ODD),
            },
        )
        for norm in (RepBN, PRepBN, UnifiedNorm, PowerNorm)
    },
    "no_decay_groups": Door(
        no_decay_groups,
        lambda: {"model": plain(), "weight_decay": 0.1},
        {"model": MODULE, "weight_decay": (*NUMBER, -1, INF)},
    ),
    "StabilityCallback": Door(
        StabilityCallback,
        dict,
        {
            "preset": (None, 5, "x", "", [], ["x"], [5], ODD),
            "flush_every": COUNT,
            **FILTERS,
            "gradients": FLAG,
            "mask": MASK,
            "companions": (None, 5, "x", ["x"], [5], ODD),
            "fused": FLAG,
            "detector": (*FUNCTION, int, list),
        },
    ),
    "StabilityCallback.load_state_dict": Door(
        restored(StabilityCallback),
        lambda: {"state": StabilityCallback().state_dict()},
        {"state": without(STATE, {})},
    ),
    "ProgressiveNormCallback": Door(
        ProgressiveNormCallback,
        dict,
        {
            "to": (None, *NAME),
            "schedule": (None, *NAME),
            **SCHEDULE,
            **FILTERS,
            "mask": MASK,
            "total_steps": without(COUNT, None),
            "norm_options": (*OPTIONS, {"eps": -1}, {"init": "x"}, {"momentum": "x"}),
        },
    ),
    "ProgressiveNormCallback.load_state_dict": Door(
        restored(ProgressiveNormCallback),
        lambda: {"state": {}},
        {"state": without(STATE, {})},
    ),
    "FoldCallback": Door(
        FoldCallback,
        dict,
        {
            "module": (None, 5, ["net"], nn.Linear(2, 2), ODD),
            "example": (5, "x", [], [5], ODD),
            "options": (*OPTIONS, {"tied": "x"}, {"residual": "x"}, {"strict": "x"}),
        },
    ),
    "repair_module": Door(
        repair_module,
        lambda: {"repair": repair()},
        {"repair": MODULE, "base": (None, 5, "x", int, ODD)},
    ),
    "AttentionCompanion": Door(
        companions.AttentionCompanion,
        dict,
        {"queries": without(COUNT, None), "heads": without(COUNT, None), **FILTERS},
    ),
    "OutputCompanion": Door(
        companions.OutputCompanion, dict, {"tokens": without(COUNT, None), "layer": (5, 1.5, [5], [], ODD)}
    ),
    **{
        kind.__name__: Door(kind, dict, FILTERS)
        for kind in (companions.WeightCompanion, companions.EmbeddingCompanion, companions.SwitchCompanion)
    },
    **{
        f"{kind.__name__}.watch": Door(
            lambda model, kind=kind: kind().watch(model),
            lambda: {
                "model": nn.Sequential(
                    nn.Embedding(4, 8), nn.LayerNorm(8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2)
                )
            },
            {"model": MODULE},
        )
        for kind in (
            companions.AttentionCompanion,
            companions.OutputCompanion,
            companions.WeightCompanion,
            companions.EmbeddingCompanion,
            companions.SwitchCompanion,
        )
    },
    "FileRecord": Door(
        lambda directory: monitor.FileRecord(directory).close(),
        lambda: {"directory": kept_folder() / "file"},
        {"directory": FOLDER},
    ),
    "TensorBoardRecord": Door(
        monitor.TensorBoardRecord,
        lambda: {"summary_writer": collections.namedtuple("Writer", "log_dir")(str(kept_folder()))},
        {"summary_writer": (None, 5, "run", ODD)},
    ),
    "write_report": Door(
        dashboard.write_report,
        lambda: {"folder": run(), "path": kept_folder() / "report.html"},
        {"folder": (*FOLDER, "/nowhere"), "path": without(FOLDER, None), "format": (None, *NAME)},
    ),
    "read_record": Door(
        monitor.read_record,
        lambda: {"path": record()},
        {"path": (*FOLDER, "/nowhere"), "series": (5, "loss", ODD), "companion": (None, 5, ODD)},
    ),
    "Statistic": Door(
        lambda **fields: stabnorm.StabilityMonitor(plain(), [monitor.Statistic(**fields)]),
        lambda: {"name": "own", "compute": lambda now, past: now.mean.sum(-1)},
        {
            "name": (None, 5, "a b", "", "amax", ODD),
            "compute": (None, *FUNCTION, lambda: 1, lambda now, past: 1.0),
            "needs": ("x", 5, ["x"], ODD),
            "threshold": ("x", NAN, ODD),
            "alarm": ("x", NAN, ODD),
            "floor": ("x", NAN, -1, 0, ODD),
            "negligible": ("x", NAN, -1, None, ODD),
            "harmless": ("x", NAN, -1, None, ODD),
            "least": ("x", NAN, ODD),
            "remembers": FLAG,
            "drifts": FLAG,
        },
    ),
    "RobustDetector": Door(
        monitor.RobustDetector,
        lambda: {"statistics": [], "layers": ["a"]},
        {"statistics": (None, 5, "x", [5], ODD), "layers": (None, 5, "x", [5], ODD)},
    ),
    "RobustDetector.load_state_dict": Door(
        restored(lambda: monitor.RobustDetector([], ["a"])),
        lambda: {"state": monitor.RobustDetector([], ["a"]).state_dict()},
        {"state": STATE},
    ),
    "AffineGate": Door(
        switch.AffineGate,
        lambda: {"layers": ["a", "b"], "total": 10},
        {
            "layers": (None, 5, "layer", [5], ODD),
            "total": COUNT,
            "start": INDEX,
            "fraction": (*SHARE, 0),
            **{name: SHARE for name in ("on", "off", "warm", "last_start", "last_refusal")},
        },
    ),
    "AffineGate.observe": Door(
        lambda step, residuals: switch.AffineGate(["a"], 10).observe(step, residuals),
        lambda: {"step": 0, "residuals": [0.5]},
        {"step": INDEX, "residuals": (None, 5, "x", ["x"], [], [1, 2], ODD)},
    ),
    "AffineGate.advance": Door(
        lambda step: switch.AffineGate(["a"], 10).advance(step), lambda: {"step": 1}, {"step": INDEX}
    ),
    "AffineGate.load_state_dict": Door(
        restored(lambda: switch.AffineGate(["a"], 10)),
        lambda: {"state": switch.AffineGate(["a"], 10).state_dict()},
        {"state": STATE},
    ),
    **{
        f"schedules.{name}": Door(
            getattr(schedules, name),
            lambda: {"step": 1, "total": 10},
            {"step": INDEX, "total": COUNT, **SCHEDULE, "layer": INDEX, "layers": COUNT},
        )
        for name in ("linear", "cosine", "constant")
    },
    "make_schedule": Door(
        switch.make_schedule,
        lambda: {"schedule": "linear", "total": 10},
        {
            "schedule": (None, *NAME, lambda: 0.0, lambda step: "x", lambda step: NAN),
            "total": COUNT,
            "layers": INDEX,
            **SCHEDULE,
        },
    ),
    "progressive_norms": Door(switch.progressive_norms, lambda: {"model": plain()}, {"model": MODULE}),
    "running_norms": Door(switch.running_norms, lambda: {"model": plain()}, {"model": MODULE}),
    "write_lam": Door(
        switch.write_lam,
        lambda: {"norms": [PRepBN(4)], "lam": [0.5]},
        {
            "norms": (None, 5, "x", [5], [nn.LayerNorm(4)], ODD),
            "lam": (None, 0.5, "x", ["x"], [2.0], [-1.0], [NAN], [], [1, 1], ODD),
            "settled": FLAG,
        },
    ),
    "write_step": Door(
        switch.write_step,
        lambda: {"norms": [RepBN(4)], "step": 1},
        {"norms": (None, 5, "x", [5], [nn.LayerNorm(4)], ODD), "step": INDEX},
    ),
    "write_loss_scale": Door(
        switch.write_loss_scale,
        lambda: {"norms": [UnifiedNorm(4)], "scale": 2.0},
        {
            "norms": (None, 5, "x", [5], [nn.LayerNorm(4)], ODD),
            "scale": (None, "x", 0, -1, NAN, [1.0], ODD, torch.zeros(2)),
        },
    ),
    "BranchGap": Door(
        switch.BranchGap, lambda: {"norms": [PRepBN(4)]}, {"norms": (None, 5, "x", [5], [nn.LayerNorm(4)], ODD)}
    ),
    "Recipe": Door(
        pretrained.Recipe,
        dict,
        {
            "weights": (None, *NAME),
            "lr": (*NUMBER, 0, -1, INF),
            "affine_lr": (*without(NUMBER, None), 0, -1, INF),
            "warmup": SHARE,
            "forcing": SHARE,
            "homotopy": SHARE,
            "order": (None, *NAME),
            "accumulate": COUNT,
            "precision": (5, "x", torch.float16, ODD),
            "clip": (*NUMBER, 0, -1),
            "seed": (None, 1.5, "x", -1, ODD),
        },
    ),
    "Repair": Door(
        repair,
        dict,
        {
            "model": MODULE,
            "original": MODULE,
            "steps": COUNT,
            "recipe": (5, "x", {}, ODD),
            "loss": FUNCTION,
            "run": (5, "x", ODD),
        },
    ),
    "Repair.load_state_dict": Door(restored(repair), lambda: {"state": repair().state_dict()}, {"state": STATE}),
    "repair_norms": Door(
        lambda **a: pretrained.repair_norms(**{"repair": repair()} | a),
        lambda: {"loader": BATCHES},
        {
            "repair": (None, 5, "x", nn.Linear(2, 2), ODD),
            "loader": (*LOADER, [], [5]),
            "progress": FLAG,
            "until": without(INDEX, None),
        },
    ),
    "Runner": Door(pretrained.Runner, dict, {"forward": FUNCTION, "mask": MASK}),
    "measure_norms": Door(
        pretrained.measure_norms,
        lambda: {
            "model": (model := plain().eval()),
            "layers": stabnorm.find_norms(model),
            "loader": BATCHES,
            "run": pretrained.Runner(),
        },
        {"model": MODULE, "layers": (None, 5, "x", [5], ODD), "loader": (*LOADER, []), "run": (None, 5, len, ODD)},
    ),
    "fit_norms": Door(
        pretrained.fit_norms,
        lambda: dict(
            zip(("model", "original"), ours(), strict=True), loader=BATCHES, levels=[["1"]], run=pretrained.Runner()
        ),
        {
            "model": MODULE,
            "original": MODULE,
            "loader": (*LOADER, []),
            "run": (None, 5, len, ODD),
            "levels": (None, 5, "x", [5], [["nonsense"]], ["1"], ODD),
        },
    ),
    "relative_error": Door(
        pretrained.relative_error,
        lambda: {"output": X, "wanted": X},
        {"output": (None, 5, "x", (X, X + 1), X[:3], ODD), "wanted": (None, 5, "x", (X, X + 1), X[:3], ODD)},
    ),
    "use_kernels": Door(ops.use_kernels, lambda: {"kernels": "aten"}, {"kernels": (None, *NAME)}),
}


# --- what becomes of them ---

PACKAGE = Path(stabnorm.__file__).resolve().parent
OURS = (str(PACKAGE), str((PACKAGE / "callbacks").resolve()))
ALSO_CALLED = {"preset": "statistic", "compute": "statistic", "path": "record", "norm_class": "class"}


def verdict(door: Door, arguments: dict[str, Any], argument: str) -> str:
    """ "clear": refused in our own words, with the argument's name; else "works", or what it died of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            door.call(**arguments)
    except Exception as error:
        clear = is_clear(error, argument, arguments[argument])
        return "clear" if clear else f"{type(error).__name__}: {str(error)[:150]}"
    return "works"


def is_clear(error: Exception, argument: str, value: Any) -> bool:
    """Whether we raised it, with the right class, and with the argument's name or that of an entry in it."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = str(Path(trace.tb_frame.f_code.co_filename).resolve())
    raised = "raise" in linecache.getline(file, trace.tb_lineno)
    kinds = (TypeError, ValueError, StabNormError, FileNotFoundError)
    names = [argument.rstrip("s"), ALSO_CALLED.get(argument, argument)]
    names += map(str, value) if type(value) is dict else ()
    named = any(name in str(error) for name in names)
    return file.startswith(OURS) and raised and isinstance(error, kinds) and named


def verdicts(name: str) -> Iterator[tuple[str, Any, str]]:
    """Each odd value of a door with its argument, and what becomes of it."""
    door = DOORS[name]
    good = door.good()
    for argument, values in door.odd.items():
        for value in values:
            what = verdict(door, good | {argument: value}, argument)
            yield argument, value, what
            if what != "clear":  # what was refused has changed nothing
                good = door.good()


def main() -> None:
    """Print what is not refused clearly, and the counts."""
    counts: collections.Counter[str] = collections.Counter()
    for name in sys.argv[1:] or DOORS:
        DOORS[name].call(**DOORS[name].good())
        for argument, value, what in verdicts(name):
            counts[what if what in ("clear", "works") else "obscure"] += 1
            if what != "clear":
                text = repr(value).replace("\n", " ")[:60]
                print(f"{name}({argument}={text}): {what}".replace("\n", " "))
    print(dict(counts), "of", counts.total())


if __name__ == "__main__":
    main()
