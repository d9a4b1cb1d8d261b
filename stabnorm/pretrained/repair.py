r"""Training a converted model until its hidden states are the original's again; no labels.

.. math:: L = \frac{1}{N + 1} \Big[ \sum_n \frac{\|h_n - \hat h_n\|^2}{\|\hat h_n\|^2} + d(y, \hat y) \Big]

h_n is what norm n, or what stands in its place, writes, y the model's output; with a hat they are the frozen original's
on the same batch. d is the output's relative squared error, or a function of your own.

Without norms an error made early grows along the depth, and so do gradients on their way back. So at first each part
between two norms may learn on what the original hands it: what a norm hands on is drawn towards the original's, less
and less (teacher forcing).

.. math:: h_n + p\,(\hat h_n - h_n),\quad p: 1 \to 0
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from stabnorm._models.batches import batches_of
from stabnorm._models.devices import device_of
from stabnorm._models.masks import mask_for
from stabnorm._models.outputs import tensors_in
from stabnorm._models.ranks import gather_over_ranks, ranks
from stabnorm.errors import StabNormError
from stabnorm.fit.sums import Seen
from stabnorm.fit.watch import Runner, drawn_towards, watched
from stabnorm.norms import NormSearch
from stabnorm.switch.lam import progressive_norms, write_lam
from stabnorm.switch.schedules import Order, make_schedule

Weights = Literal["all", "affine"]
Distance = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a converted model is repaired.

    Args:
        weights: "all" trains whatever the model trains, embedding tables apart, of which a batch shows a few rows only;
            "affine" the norms' affine numbers alone.
        lr: peak learning rate of AdamW.
        affine_lr: of the affine numbers, which are in units of the norm's output; None: `lr`, and ten times that where
            they are trained alone.
        warmup: share of the steps over which the rate rises; then half a cosine takes it to zero.
        forcing: share of the steps over which p falls from 1 to 0; 0 goes without. In many steps a deep model ends
            closer with it (0.8); in few it is still further away, for what was fitted to the converted model's own
            hidden states is unlearnt first; nor can affine numbers alone do what the original does.
        homotopy: share of the steps over which lam of each norm goes from 1 to 0, LayerNorm to affine map; 0 starts
            without LayerNorm.
        order: "together", "shallow_first" or "deep_first", see `stabnorm.switch.schedules.linear`.
        accumulate: batches in a step.
        precision: of `torch.autocast`, say torch.bfloat16; None: the model's own.
        clip: the gradient's largest norm.
        seed: of whatever draws random numbers, a loader that shuffles among it.

    Raises:
        ValueError: an argument is out of range.
    """

    weights: Weights = "all"
    lr: float = 3e-4
    affine_lr: float | None = None
    warmup: float = 0.05
    forcing: float = 0.0
    homotopy: float = 0.0
    order: Order = "together"
    accumulate: int = 1
    precision: torch.dtype | None = None
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights={self.weights!r} is unknown. Choose 'all' or 'affine'")
        for name in ("lr", "affine_lr", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be above 0")
        for name in ("warmup", "forcing", "homotopy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share of the steps, from 0 to 1")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} makes no step. Use 1 or more batches")
        if self.precision not in (None, torch.bfloat16):
            raise ValueError(f"precision={self.precision} is not torch.bfloat16, the only one that needs no loss scale")


def relative_error(output: Any, wanted: Any) -> Tensor:
    r"""How far an output is from the original's: ||y - y'||^2 / ||y'||^2, padding left out.

    The mean over its floating tensors, y' the original's.

    0 where they are equal; 0.01 is an error of a tenth.

    >>> relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]))
    tensor(0.0080)
    """
    pairs = [
        (y, y_hat) for y, y_hat in zip(tensors_in(output), tensors_in(wanted), strict=True) if y_hat.is_floating_point()
    ]
    if not pairs:
        raise StabNormError(
            f"the model returns a {type(wanted).__name__} without a floating tensor, so there is nothing to compare. "
            "Pass loss=, a function of the output and the original's"
        )
    return torch.stack([_relative(y, y_hat, _valid(y_hat)) for y, y_hat in pairs]).mean()


def _valid(output: Tensor) -> Tensor | None:
    try:
        return mask_for(output.shape[:-1], "output") if output.ndim > 1 else None
    except ValueError:  # of another length than the tokens
        return None


def _relative(y: Tensor, wanted: Tensor, valid: Tensor | None) -> Tensor:
    wanted = wanted.detach().float()
    difference = y.float() - wanted
    if valid is not None:  # not a product: padding may hold NaN
        difference, wanted = (torch.where(valid[..., None], t, 0) for t in (difference, wanted))
    return difference.square().sum() / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


class Repair:
    """One training of a converted model towards the original; drive it with `repair_norms`, Lightning, or by hand.

    A step is `begin`, a backward of `loss` for each of its batches, and `step`.

    Args:
        model: converted with `convert_norms`, its norms fitted; it is trained, and stays in eval mode: dropout is off.
        original: what it was converted from, in eval mode; only run.
        steps: optimizer steps.
        recipe: how. Default: `Recipe()`.
        loss: d of the module's formula, ``loss(output, original_output)``. Default: `relative_error`.
        run: how both are run. Default: `Runner()`.

    Raises:
        ValueError: `steps` is below 1.
        StabNormError: the model has no converted norm whose lam goes to 0, or nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        steps: int,
        recipe: Recipe | None = None,
        loss: Distance | None = None,
        run: Runner | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} repairs nothing. Use 1 or more")
        self.model, self.original, self.steps = model, original, steps
        self.recipe, self.distance, self.run = recipe or Recipe(), loss or relative_error, run or Runner()
        every = progressive_norms(model)
        self.norms = {name: norm for name, norm in every.items() if not norm.lam}
        self.kept = [norm for norm in every.values() if norm.lam]
        if not self.norms:
            raise StabNormError(
                f"{type(model).__name__} has no norm that was fitted, so there is nothing to repair. Convert it with "
                "convert_norms and fit it with fit_norms first"
            )
        self._ours, self._theirs = NormSearch(model).found, NormSearch(original).found
        homotopy: dict[str, Any] = {"fraction": self.recipe.homotopy, "order": self.recipe.order}
        self._lam = make_schedule("linear", steps, len(self.norms), **homotopy) if self.recipe.homotopy else None
        self.groups = self._groups()
        self.optimizer = torch.optim.AdamW(self.groups, weight_decay=0.0)
        self.schedule = LambdaLR(self.optimizer, self.rate)
        self.steps_done = 0
        self._forced_steps = self.recipe.forcing * steps
        self.share = 0.0  # p of the step that `begin` began
        trained = set(map(id, self.parameters))
        self._frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
        for parameter in self._frozen:  # no gradient is spent on them, and no process waits for one
            parameter.requires_grad_(False)

    def _groups(self) -> list[dict[str, Any]]:
        affine = [p for norm in self.norms.values() for p in (norm.rep.weight, norm.rep.bias) if p is not None]
        ours = set(map(id, affine)) | {id(p) for norm in self.norms.values() for p in norm.parameters()}
        ours |= {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]
        recipe, together = self.recipe, self.recipe.weights == "all"
        groups = [{"params": affine, "lr": recipe.affine_lr or (recipe.lr if together else 10 * recipe.lr)}]
        return groups + ([{"params": rest, "lr": recipe.lr}] if together and rest else [])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def rate(self, step: int) -> float:
        """The learning rate's factor: a linear rise, then half a cosine."""
        warmup = max(1, round(self.recipe.warmup * self.steps))
        progress = max(0, step - warmup) / max(1, self.steps - warmup)
        return min((step + 1) / warmup, (1 + math.cos(math.pi * min(1.0, progress))) / 2)

    def begin(self, step: int | None = None) -> None:
        """Lam and p as they are in the step that comes: `step`, or the next."""
        step = self.steps_done if step is None else step
        self.share = max(0.0, 1 - step / self._forced_steps) if self._forced_steps else 0.0
        lam = self._lam(step) if self._lam else [0.0] * len(self.norms)
        write_lam([*self.norms.values(), *self.kept], [*lam, *[1.0] * len(self.kept)])

    def loss(self, batch: Any) -> Tensor:
        """The loss on a batch, with gradients."""
        with self._precision():
            with torch.no_grad(), watched(self._theirs) as wanted:
                target = self.run(self.original, batch)
            drawn = drawn_towards(wanted, self._ours, self.share)
            with watched(self._ours) as found, drawn, self.run.prepared(self.model, batch) as there:
                output = self.run.forward(self.model, there)
                distance = self.distance(output, target)
        hidden = _hidden_states(found, wanted)
        return (hidden.sum() + distance) / (len(hidden) + 1)

    def _precision(self) -> AbstractContextManager[Any]:
        kind, low = device_of(self.model).type, self.recipe.precision
        return torch.autocast(kind, low) if low is not None else nullcontext()  # a Trainer may have its own

    def step(self) -> None:
        """Clip the gradient, move the weights and forget the gradient; with several processes it is their mean."""
        parameters = [p for p in self.parameters if p.grad is not None]
        if ranks() > 1:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.copy_(gather_over_ranks(parameter.grad).mean(0))
        torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.steps_done += 1

    def finish(self) -> None:
        """The end, also before all steps were done: lam is 0 from here on, and what was frozen can be trained again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.share = 0.0
        write_lam([*self.norms.values(), *self.kept], [*[0.0] * len(self.norms), *[1.0] * len(self.kept)])

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the model's weights included."""
        return {
            "version": 1,
            "steps": self.steps,
            "steps_done": self.steps_done,
            "norms": list(self.norms),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            StabNormError: it was another repair, of other norms or another length; nothing is loaded then.
        """
        if state["norms"] != list(self.norms) or state["steps"] != self.steps:
            raise StabNormError(
                f"the state is of a repair of {len(state['norms'])} norms in {state['steps']} steps, and this one is "
                f"of {len(self.norms)} norms in {self.steps}. Resume with what that one was made with"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.steps_done = int(state["steps_done"])
        self.begin()


def _hidden_states(found: Mapping[str, list[Seen]], wanted: Mapping[str, list[Seen]]) -> Tensor:
    parts = [
        _relative(now.written, then.written, now.valid)
        for name, calls in wanted.items()
        for now, then in zip(found.get(name, ()), calls, strict=True)
    ]
    return torch.stack(parts)


def repair_norms(
    repair: Repair, loader: Iterable[Any], *, progress: bool = False, until: int | None = None
) -> list[float]:
    """Train to the end, or to step `until`; the random state is the caller's to keep.

    The loader is gone through as often as it takes. With a seed of its own for each pass, a repair that is resumed with
    `Repair.load_state_dict` sees the batches it would have seen.

    Args:
        repair: where it stands decides where the training goes on.
        loader: batches.
        progress: show a bar. Default: False.
        until: leave off after this step. Default: the last.

    Returns:
        The loss of each step.

    Raises:
        StabNormError: the loader is empty, or the loss is not finite.
    """
    from tqdm.auto import tqdm

    end = repair.steps if until is None else min(until, repair.steps)
    batches = _endless(loader, repair.recipe.seed, repair.steps_done * repair.recipe.accumulate)
    losses = []
    with tqdm(total=repair.steps, initial=repair.steps_done, desc="repair", disable=not progress) as bar:
        while repair.steps_done < end:
            repair.begin()
            total = 0.0
            for _ in range(repair.recipe.accumulate):
                loss = repair.loss(next(batches)) / repair.recipe.accumulate
                loss.backward()
                total += float(loss.detach())
            if not math.isfinite(total):
                raise StabNormError(
                    f"the loss of step {repair.steps_done} is {total}. Use a lower lr than {repair.recipe.lr:g}"
                )
            repair.step()
            losses.append(total)
            bar.update()
            bar.set_postfix(loss=f"{total:.4f}")
    if repair.steps_done == repair.steps:
        repair.finish()
    return losses


def _endless(loader: Iterable[Any], seed: int, start: int) -> Iterator[Any]:
    """The loader's batches over and over, from number `start` on; pass p draws its random numbers from seed + p."""
    number, turn = 0, 0
    while True:
        torch.manual_seed(seed + turn)
        for batch in batches_of(loader):
            if number >= start:
                yield batch
            number += 1
        turn += 1
