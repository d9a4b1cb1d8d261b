"""`WeightCompanion`: measure how far each optimizer step moves each weight matrix, and how large the matrix is.

A weight that feeds a norm is scale-invariant: only its direction counts, so that a step of size dw turns it by an angle
of about |dw| / |w|, and the part of dw along w does nothing but change how far later steps turn it. The formulas hold
for every matrix; what they say of one that feeds no norm is its relative change.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stabnorm._checks import check_model
from stabnorm._models.names import NameFilter
from stabnorm._models.wrappers import plain_name
from stabnorm.companions._optimizer_steps import Group, Indices, OptimizerSteps, local, no_step, option_of
from stabnorm.companions.companion import Companion, Watch, selected, wide
from stabnorm.statistic import Statistic

_FIRST = 16  # power iterations before the first figure; after that one per step, from where the last one ended
_LIVED_WITH = 128  # steps after which a learning rate is one that the training has lived with: the detector's window
_SHIFT = 1e-15  # added to W^T W: the vectors are the same, and those of a matrix of zeros do not vanish


class WeightSums(NamedTuple):
    """Squares and products of a step's weights, ``[matrices]`` each; NaN where no optimizer stepped.

    Attributes:
        weight: |w|^2 before the step.
        update: |dw|^2.
        inner: <w, dw>.
        learning_rate: of the group the matrix is in.
        weight_decay: of this group; NaN if it has none.
        singular: the largest singular value at the end of the step; NaN for a sharded matrix.
        highest: the highest learning rate of the steps before the last 128; NaN where there are none.
        columns: number of columns, all axes but the first taken as one.
        resolution: the share of |w| that a step must reach, or the dtype of the weights rounds most of it away.
    """

    weight: Tensor
    update: Tensor
    inner: Tensor
    learning_rate: Tensor
    weight_decay: Tensor
    singular: Tensor
    highest: Tensor
    columns: Tensor
    resolution: Tensor

    def merge(self, other: "WeightSums") -> "WeightSums":
        """Merge two shards of the matrices (FSDP); replicas, as in DDP, have the same values and need no merging."""
        return self._replace(
            weight=self.weight + other.weight, update=self.update + other.update, inner=self.inner + other.inner
        )


def _radial_share(sums: WeightSums, past: None) -> Tensor:
    del past
    return (sums.inner.square() / (sums.weight * sums.update)).clamp(0, 1)


def _angular_update(sums: WeightSums, past: None) -> Tensor:
    del past
    # The tangential part of dw against what lies along w; an arc cosine would lose small angles.
    along = sums.weight + sums.inner
    across = (sums.weight * sums.update - sums.inner.square()).clamp(min=0).sqrt()
    return torch.atan2(across, along)


def _update_excess(sums: WeightSums, past: None) -> Tensor:
    del past
    usual = torch.fmin(sums.learning_rate, sums.highest)
    ratio = (sums.update / sums.weight).sqrt()
    # What was rounded away may be as large as the resolution. At a rate that has fallen, this bound says nothing.
    fallen = sums.learning_rate < sums.highest
    unknown = (ratio == 0) | ((ratio < sums.resolution) & fallen)
    return torch.where(unknown, torch.nan, torch.maximum(ratio, sums.resolution) / usual)


def _singular_to_proxy(sums: WeightSums, past: None) -> Tensor:
    del past
    proxy = (sums.learning_rate / sums.weight_decay).sqrt() * sums.columns**0.75
    return torch.where(proxy.isfinite() & (proxy > 0), sums.singular / proxy, torch.nan)


_KEPT = "effective learning rate, arXiv 1706.05350"


@dataclass(frozen=True)
class WeightCompanion(Companion):
    """How far each step moves each weight matrix, along and across, its effective learning rate and singular value.

    Any optimizer that derives from `torch.optim.Optimizer` is seen, several of them too; an optimizer step compiled by
    `torch.compile` is not. Keeps a copy of the watched weights, in float32.

    Args:
        include: a regular expression, or a list of them, that a parameter's name must match. Default: all parameters
            that are matrices: two axes or more, of which the first and the product of the others exceed 1.
        exclude: the same for parameters to leave out. Default: none.

    Raises:
        ValueError: from `watch`: no matrix to watch.

    >>> import stabnorm
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with stabnorm.StabilityMonitor(model, companions=["weights"]) as monitor:
    ...     model(torch.randn(3, 4)).square().mean().backward()
    ...     optimizer.step()
    ...     monitor.step()
    >>> monitor.companions["weights"].rows
    ('0.weight',)
    """

    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    name: ClassVar[str] = "weights"
    cost: ClassVar[str] = "about nine reads of the weights, and a copy of them"
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(
            "update_ratio", formula="|dw| / |w|, dw what the optimizer step changed",
            source="bound ours: healthy starts stay below 0.006, runs without warm-up pass 0.24",
            compute=lambda sums, _: (sums.update / sums.weight).sqrt(), threshold=0.05, start=0.1,
            advice="each step changes it by a large part: lower the learning rate, or lengthen the warm-up",
        ),
        Statistic(
            "update_excess", formula="max(|dw| / |w|, eps / 4) / min(lr, the highest lr of the steps before the last "
            "128), eps of the dtype of w, which rounds a smaller step away; NaN if no weight moved, and below eps / 4 "
            "where lr is lower than this highest lr",
            source="ours", compute=_update_excess, floor=0.1, upward=True,
            advice="each step changes it far more than the learning rates explain that this training has lived with: "
            "look at the learning rate, at the optimizer's state, and at what was changed just before this step",
        ),
        Statistic(
            "angular_update", formula="angle between w and w + dw", unit="rad",
            source="rotational equilibrium, arXiv 2305.17212: sqrt(2 lr weight_decay) in the long run, with AdamW",
            bad="far from that of other matrices", compute=_angular_update,
        ),
        Statistic(
            "radial_share", formula="<w, dw>^2 / (|w|^2 |dw|^2): what of the step only changes the norm",
            source="AdamP, arXiv 2006.08217", bad="near 1 where w feeds a norm", compute=_radial_share,
            advice="steps only make it longer: where a norm follows, keep its length with "
            "stabnorm.callbacks.ProjectWeightsCallback",
        ),
        Statistic(
            "effective_learning_rate", formula="lr / |w|^2, lr of the parameter's own group", unit="1 / weight^2",
            source=_KEPT, bad="decays with growing |w| faster than planned",
            compute=lambda sums, _: sums.learning_rate / sums.weight,
            advice="the weights grow and their effective learning rate falls: where a norm follows, keep their length "
            "with stabnorm.callbacks.ProjectWeightsCallback",
        ),
        Statistic(
            "weight_norm", formula="|w| before the step", unit="weight", source=_KEPT, bad="grows without end",
            compute=lambda sums, _: sums.weight.sqrt(),
        ),
        Statistic(
            "top_singular_value", formula="max |W v| over |v| = 1, all axes but the first taken as one; by power "
            "iteration, one per step", unit="weight", source="arXiv 1802.05957, arXiv 2303.06296",
            bad="grows without end", compute=lambda sums, _: sums.singular,
        ),
        Statistic(
            "singular_to_proxy", formula="top_singular_value / (sqrt(lr / weight_decay) d^0.75), d the number of "
            "columns: what AdamW's weight decay lets a matrix grow to at any width, up to a factor that a smaller "
            "model shows; NaN without weight decay",
            source="weight decay scaling rule, arXiv 2510.15262",
            bad="settles at another value than in a model of another width", compute=_singular_to_proxy,
            advice="once it has settled, it should be that of the same matrix in the smaller model whose settings are "
            "used: where the learning rate is divided by the width, multiply the weight decay by its square root",
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        NameFilter(self.include, self.exclude)  # complain now

    def watch(self, model: nn.Module) -> "WeightWatch":
        """Find the matrices."""
        check_model("model", model)
        matrices = [(plain_name(name), p) for name, p in model.named_parameters() if _is_matrix(p)]
        wanted = selected([name for name, _ in matrices], self.include, self.exclude)
        chosen = [pair for pair, yes in zip(matrices, wanted, strict=True) if yes]
        if not chosen:
            raise ValueError(
                f"no weight matrix found in {type(model).__name__} under include={self.include!r}, "
                f"exclude={self.exclude!r}: these are searched for in parameters' names, as in named_parameters()"
            )
        return WeightWatch(chosen)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and 1 < len(parameter) < parameter.numel()


def _resolution(dtype: torch.dtype) -> float:
    """Return half the smallest distance of two neighbouring numbers of a dtype, relative to their size."""
    return torch.finfo(dtype).eps / 4


class WeightWatch(Watch):
    """Reads the weights before and after each optimizer step; see `WeightCompanion`."""

    def __init__(self, matrices: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.rows = tuple(name for name, _ in matrices)
        self._weights = [weight for _, weight in matrices]
        self._steps = OptimizerSteps(self._weights, self._before, self._after)
        self._old: list[Tensor | None] = [None] * len(matrices)  # weights before the step, then what it took from them
        self._open = [0] * len(matrices)  # optimizers in the middle of their step; one may wrap another
        self._sums: Tensor | None = None  # [5, matrices]: the first five of `WeightSums`
        self._indices = Indices()
        self._rates: Tensor | None = None  # [128, matrices], learning rates of the last steps, as a ring
        self._highest: Tensor | None = None  # [matrices], the highest one that has left the ring
        self._steps_taken = 0
        self._right: list[Tensor] = []  # right singular vectors
        self._iterated = False
        columns = [weight[0].numel() for weight in self._weights]
        self._columns = torch.tensor(columns, dtype=torch.float32, device="cpu")
        self._resolution: Tensor | None = None  # [matrices]
        sharded = [hasattr(weight, "to_local") for weight in self._weights]
        self._sharded = torch.tensor(sharded, device="cpu") if any(sharded) else None

    @property
    def _gathered(self) -> Tensor:
        device = local(self._weights[0]).device
        if self._sums is None or self._sums.device != device:
            self._sums = torch.full((5, len(self.rows)), torch.nan, dtype=wide(device), device=device)
        return self._sums

    def attach(self) -> None:
        """Register hooks before and after optimizer steps."""
        self._steps.attach()
        self._resolution = None  # the model may have another dtype than the last time
        self.discard()

    def detach(self) -> None:
        """Remove the hooks, and free the copy of the weights."""
        self._steps.detach()
        self._old = [None] * len(self.rows)

    def discard(self) -> None:
        """Discard the last step."""
        self._gathered.fill_(torch.nan)
        self._open = [0] * len(self.rows)

    def _before(self, rows: list[int], optimizer: torch.optim.Optimizer, group: Group) -> None:
        start = time.perf_counter()
        for row in rows:
            self._open[row] += 1
        rows = [row for row in rows if self._open[row] == 1]
        now = [local(self._weights[row]) for row in rows]
        for row, weight in zip(rows, now, strict=True):
            old = self._old[row]
            if old is None or old.shape != weight.shape or old.device != weight.device:
                self._old[row] = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        if rows:
            torch._foreach_copy_(self._old_of(rows), now)
            self._write(0, rows, self._squares(now))
        self.seconds += time.perf_counter() - start

    def _after(self, rows: list[int], optimizer: torch.optim.Optimizer, group: Group) -> None:
        start = time.perf_counter()
        ended = [row for row in rows if self._open[row] == 1]  # 0: added to the optimizer in between
        for row in rows:
            self._open[row] = max(0, self._open[row] - 1)
        rows = ended
        if rows:
            now = [local(self._weights[row]) for row in rows]
            taken = self._old_of(rows)
            torch._foreach_sub_(taken, now)  # -dw
            update = self._squares(taken)
            pairs = zip(now, taken, strict=True)
            inner = self._stack([torch.dot(w.to(d.dtype).flatten(), d.flatten()) for w, d in pairs])
            self._write(1, rows, update)
            self._write(2, rows, -inner - update)  # from <w + dw, -dw>
            for part, option in ((3, "lr"), (4, "weight_decay")):
                self._fill(part, rows, option_of(group, option))
        self.seconds += time.perf_counter() - start

    def _old_of(self, rows: list[int]) -> list[Tensor]:
        return [old for row in rows if (old := self._old[row]) is not None]

    def _squares(self, tensors: list[Tensor]) -> Tensor:
        full = [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]
        return self._stack(torch._foreach_norm(full)).square()

    def _stack(self, numbers: Sequence[Tensor]) -> Tensor:
        return torch.stack([number.to(self._gathered) for number in numbers])

    def _fill(self, part: int, rows: list[int], value: float | Tensor) -> None:
        if isinstance(value, Tensor):  # filling with a tensor would read it
            self._write(part, rows, value.reshape(1).expand(len(rows)))
        else:
            self._gathered[part].index_fill_(0, self._indices.on(self._gathered.device, rows), value)

    def _write(self, part: int, rows: list[int], values: Tensor) -> None:
        gathered = self._gathered
        gathered[part].index_copy_(0, self._indices.on(gathered.device, rows), values.to(gathered))

    @torch.no_grad()
    def take(self) -> WeightSums:
        """Return the sums of this process; for a sharded weight, those of its shard."""
        weight, update, inner, learning_rate, weight_decay = self._gathered.clone()
        highest, singular = self._lived_with(learning_rate), self._singular_values()
        if self._resolution is None or self._resolution.device != weight.device:
            self._resolution = weight.new_tensor([_resolution(w.dtype) for w in self._weights])
        columns = self._columns.to(weight)
        return WeightSums(
            weight, update, inner, learning_rate, weight_decay, singular, highest, columns, self._resolution
        )

    def _lived_with(self, learning_rate: Tensor) -> Tensor:
        """Add the learning rates of a step, and return the highest of those before the last 128 steps.

        A return to such a rate, as in a schedule with restarts, is no surprise; a rise beyond it is one.
        """
        if self._rates is None or self._highest is None:
            self._rates = learning_rate.new_full((_LIVED_WITH, len(learning_rate)), torch.nan)
            self._highest = torch.full_like(learning_rate, torch.nan)
        if self._rates.device != learning_rate.device:
            self._rates, self._highest = self._rates.to(learning_rate), self._highest.to(learning_rate)
        place = self._steps_taken % _LIVED_WITH
        self._highest = torch.fmax(self._highest, self._rates[place])
        self._rates[place] = learning_rate
        self._steps_taken += 1
        return self._highest

    def _singular_values(self) -> Tensor:
        matrices = list(self._matrices())
        if not self._right:
            self._right = _unit_vectors([matrix.shape[1] for matrix in matrices])
        self._right = [v.to(w) for v, w in zip(self._right, matrices, strict=True)]
        for _ in range(1 if self._iterated else _FIRST):
            left = [w @ v for w, v in zip(matrices, self._right, strict=True)]
            back = [w.T @ u for w, u in zip(matrices, left, strict=True)]
            torch._foreach_add_(back, self._right, alpha=_SHIFT)
            self._right = list(torch._foreach_div(back, torch._foreach_norm(back)))
        self._iterated = True
        values = self._stack(torch._foreach_norm(left))
        if self._sharded is not None:
            values = torch.where(self._sharded.to(values.device), torch.nan, values)
        return values

    def _matrices(self) -> Iterator[Tensor]:
        for weight in self._weights:
            matrix = local(weight).flatten(1)
            yield matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix

    def complaint(self, values: Tensor) -> str | None:
        """Name the matrices on which no optimizer step was seen."""
        return no_step(self.rows, self._weights, self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors of the power iteration, and the learning rates of the last steps."""
        rates = None if self._rates is None else self._rates.cpu().clone()
        highest = None if self._highest is None else self._highest.cpu().clone()
        return {
            "right": [vector.detach().cpu() for vector in self._right],
            "rates": rates, "highest": highest, "steps_taken": self._steps_taken,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; an older one does not have the learning rates."""
        if state.get("rates") is not None and state["rates"].shape[1] == len(self.rows):
            self._rates, self._highest = state["rates"].clone(), state["highest"].clone()
            self._steps_taken = int(state["steps_taken"])
        if [len(v) for v in state["right"]] == [local(weight).flatten(1).shape[1] for weight in self._weights]:
            self._right, self._iterated = list(state["right"]), True


def _unit_vectors(sizes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)  # the user's random state is not ours
    vectors = [torch.randn(size, generator=generator, device="cpu", dtype=torch.float32) for size in sizes]
    return [vector / torch.linalg.vector_norm(vector) for vector in vectors]
