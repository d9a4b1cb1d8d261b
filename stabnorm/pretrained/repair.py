r"""Train a converted model until it reproduces the hidden states of the original, without labels.

.. math:: L = \frac{1}{N + 1} \Big[ \sum_n \frac{\|h_n - \hat h_n\|^2}{\|\hat h_n\|^2} + d(y, \hat y) \Big]

h_n is the output of norm n or of its affine map, and y the model's output. With a hat they are those of the frozen
original on the same batch. d is the relative squared error of the output, or a function of your own.

Without norms, an error in an early layer grows along the depth, and so do gradients in the backward. Therefore each
part between two norms may first learn on inputs from the original (teacher forcing): the output that a norm passes on
is moved towards the original's, by a share p that falls from 1 to 0.

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

from stabnorm._checks import (
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_has_numbers,
    check_instance,
    check_loader,
    check_model,
    check_number,
)
from stabnorm._models.batches import batches_of
from stabnorm._models.devices import device_of
from stabnorm._models.masks import mask_for
from stabnorm._models.outputs import tensors_in
from stabnorm._models.ranks import gather_over_ranks, ranks
from stabnorm._states import check_state, load_whole
from stabnorm.errors import StabNormError
from stabnorm.fit.sums import Seen
from stabnorm.fit.watch import Runner, drawn_towards, watched
from stabnorm.norms import NormSearch
from stabnorm.switch.lam import progressive_norms, write_lam
from stabnorm.switch.schedules import Order, check_order, make_schedule

Weights = Literal["all", "affine"]
Distance = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a converted model is repaired.

    Args:
        weights: "all" trains all parameters that require gradients except embedding tables, because a batch only has a
            few of their rows. "affine" trains only the affine maps in the norms' places. Default: "all".
        lr: peak learning rate of AdamW. Default: 3e-4.
        affine_lr: learning rate of the affine maps, which are in units of the norm's output. Default: `lr`, or ten
            times `lr` if only they are trained.
        warmup: share of the steps in which the learning rate rises; then it falls to zero along half a cosine.
            Default: 0.05.
        forcing: share of the steps in which p falls from 1 to 0; 0 means no teacher forcing. After many steps a deep
            model ends closer to the original with 0.8. With few steps it ends worse, because the fit, which was made on
            the converted model's own hidden states, is unlearned first. It does not help with weights="affine", because
            affine maps alone cannot follow the original. Default: 0.
        homotopy: share of the steps in which lam of each norm falls from 1 (LayerNorm) to 0 (affine map); 0 starts with
            the affine maps. Default: 0.
        order: "together", "shallow_first" or "deep_first", see `stabnorm.switch.schedules.linear`. Default: "together".
        accumulate: batches per step. Default: 1.
        precision: dtype for `torch.autocast`: torch.bfloat16, or None for the model's own. Default: None.
        clip: largest norm of the gradient; a larger gradient is scaled down. Default: 1.
        seed: seed of all random numbers, also of those of a loader that shuffles. Default: 0.

    Raises:
        TypeError: an argument has another type.
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
        check_choice("weights", self.weights, get_args(Weights))
        check_number("lr", self.lr, above=0)
        if self.affine_lr is not None:
            check_number("affine_lr", self.affine_lr, above=0)
        if self.clip is not math.inf:
            check_number("clip", self.clip, above=0, hint=", or math.inf for no clipping")
        for name in ("warmup", "forcing", "homotopy"):
            check_number(name, getattr(self, name), least=0, most=1, hint=", a share of the steps")
        check_order(self.order)
        check_count("accumulate", self.accumulate)
        check_count("seed", self.seed, 0)
        if self.precision is not None and self.precision is not torch.bfloat16:
            raise ValueError(f"precision={self.precision} is not torch.bfloat16, the only one that needs no loss scale")


def relative_error(output: Any, wanted: Any) -> Tensor:
    r"""Return the relative squared error of an output: ||y - y'||^2 / ||y'||^2, where y' is the original's output.

    Padding does not count. It is the mean over the output's floating tensors. Equal outputs give 0; an error of a tenth
    gives 0.01.

    >>> relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]))
    tensor(0.0080)
    """
    outputs, originals = tensors_in(output), tensors_in(wanted)
    if [y.shape for y in outputs] != [y.shape for y in originals]:
        shapes = [[tuple(y.shape) for y in tensors] for tensors in (outputs, originals)]
        raise ValueError(f"output and wanted hold tensors of other shapes, {shapes[0]} and {shapes[1]}")
    pairs = [(y, y_hat) for y, y_hat in zip(outputs, originals, strict=True) if y_hat.is_floating_point()]
    if not pairs:
        raise StabNormError(
            f"the model's output, wanted, is a {type(wanted).__name__} without a floating tensor, so there is nothing "
            "to compare. Pass loss=, a function of the output and the original's"
        )
    return torch.stack([_relative(y, y_hat, _valid(y_hat)) for y, y_hat in pairs]).mean()


def _valid(output: Tensor) -> Tensor | None:
    try:
        return mask_for(output.shape[:-1], "output") if output.ndim > 1 else None
    except ValueError:  # the output has another length than the tokens
        return None


def _relative(y: Tensor, wanted: Tensor, valid: Tensor | None) -> Tensor:
    wanted = wanted.detach().float()
    difference = y.float() - wanted
    if valid is not None:  # `where` and not a product, because padding may hold NaN
        difference, wanted = (torch.where(valid[..., None], t, 0) for t in (difference, wanted))
    return difference.square().sum() / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


class Repair:
    """The training of a converted model towards the original. Use it with `repair_norms`, with Lightning, or by itself.

    One step is a call of `begin`, a backward of `loss` for each batch of the step, and a call of `step`.

    Args:
        model: the model, converted with `convert_norms` and with fitted norms. It is trained in eval mode, so dropout
            is off.
        original: the model before its conversion, in eval mode; it does not change.
        steps: optimizer steps.
        recipe: how to train. Default: `Recipe()`.
        loss: d of the formula above, ``loss(output, original_output)``. Default: `relative_error`.
        run: how both models are run. Default: `Runner()`.

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
        check_model("model", model)
        check_model("original", original)
        for part in (model, original):
            check_has_numbers(part, "to repair")
        check_count("steps", steps)
        if recipe is not None:
            check_instance("recipe", recipe, Recipe, "a Recipe, such as Recipe(lr=1e-4)")
        if loss is not None:
            check_function("loss", loss, "output", "original_output")
        if run is not None:
            check_instance("run", run, Runner, "a Runner, or leave it out")
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
        self.share = 0.0  # p in the current step
        trained = set(map(id, self.parameters))
        self._frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
        for parameter in self._frozen:  # so that no gradient is computed for them, and DDP waits for none
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
        """The parameters that are trained."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate: a linear rise, then half a cosine."""
        warmup = max(1, round(self.recipe.warmup * self.steps))
        progress = max(0, step - warmup) / max(1, self.steps - warmup)
        return min((step + 1) / warmup, (1 + math.cos(math.pi * min(1.0, progress))) / 2)

    def begin(self, step: int | None = None) -> None:
        """Set lam and p for `step`. Default: the next step."""
        step = self.steps_done if step is None else step
        self.share = max(0.0, 1 - step / self._forced_steps) if self._forced_steps else 0.0
        lam = self._lam(step) if self._lam else [0.0] * len(self.norms)
        write_lam([*self.norms.values(), *self.kept], [*lam, *[1.0] * len(self.kept)])

    def loss(self, batch: Any) -> Tensor:
        """Return the loss on a batch, with gradients."""
        with self._precision():
            with torch.no_grad(), watched(self._theirs) as wanted:
                target = self.run(self.original, batch)
            drawn = drawn_towards(wanted, self._ours, self.share)
            with watched(self._ours) as written, drawn, self.run.prepared(self.model, batch) as prepared:
                output = self.run.forward(self.model, prepared)
                distance = self.distance(output, target)
        hidden = _hidden_states(written, wanted)
        return (hidden.sum() + distance) / (len(hidden) + 1)

    def _precision(self) -> AbstractContextManager[Any]:
        kind, low = device_of(self.model).type, self.recipe.precision
        return torch.autocast(kind, low) if low is not None else nullcontext()  # leaves a Trainer's autocast alone

    def step(self) -> None:
        """Clip the gradient, step the optimizer, and reset the gradient; with several processes average it first."""
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
        """End the repair, also before its last step: set lam to 0, and unfreeze the parameters that were frozen."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.share = 0.0
        write_lam([*self.norms.values(), *self.kept], [*[0.0] * len(self.norms), *[1.0] * len(self.kept)])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the repair, with the model's weights."""
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
        """Continue from a state.

        Raises:
            StabNormError: the state is of a repair of other norms or of another length; nothing is loaded then.
        """
        check_state(state, "Repair", self.state_dict())
        load_whole(self, self._load, state)

    def _load(self, state: Mapping[str, Any]) -> None:
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


def _hidden_states(written: Mapping[str, list[Seen]], wanted: Mapping[str, list[Seen]]) -> Tensor:
    parts = [
        _relative(now.written, then.written, now.valid)
        for name, calls in wanted.items()
        for now, then in zip(written.get(name, ()), calls, strict=True)
    ]
    return torch.stack(parts)


def repair_norms(
    repair: Repair, loader: Iterable[Any], *, progress: bool = False, until: int | None = None
) -> list[float]:
    """Train to the end, or to step `until`. This changes the random state.

    The loader is repeated as often as needed. Each pass over it has its own seed, so that a repair that was resumed
    with `Repair.load_state_dict` gets the same batches as without the interruption.

    Args:
        repair: the repair; the training continues from its current step.
        loader: batches.
        progress: show a progress bar. Default: False.
        until: stop after this step. Default: the last one.

    Returns:
        The loss of each step.

    Raises:
        StabNormError: the loader is empty, or the loss is not finite.
    """
    from tqdm.auto import tqdm

    check_instance("repair", repair, Repair, "a Repair")
    check_loader("loader", loader)
    check_flag("progress", progress)
    if until is not None:
        check_count("until", until, 0)
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
    """Repeat the loader's batches without end, beginning with number `start`; pass p has the random seed `seed` + p."""
    number, passes = 0, 0
    while True:
        torch.manual_seed(seed + passes)
        for batch in batches_of(loader):
            if number >= start:
                yield batch
            number += 1
        passes += 1
