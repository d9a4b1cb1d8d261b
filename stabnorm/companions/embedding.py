"""`EmbeddingCompanion`: two cheap signs of instability in the first layer, where gradients explode first."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stabnorm._checks import check_model
from stabnorm._models.names import NameFilter
from stabnorm._models.wrappers import plain_name
from stabnorm.companions._optimizer_steps import Group, Indices, OptimizerSteps, local, no_step
from stabnorm.companions.companion import Companion, Watch, selected, wide
from stabnorm.statistic import Statistic


class EmbeddingSums(NamedTuple):
    """Sums of one step, ``[embeddings]`` each except for `others`.

    Attributes:
        gradient: squared norm of each embedding's gradient; NaN if it has none.
        others: ``[matrices]``, the same for all other weight matrices.
        deviation: sum over tokens of the standard deviation over features; NaN if the layer is no `nn.Embedding`.
        tokens: number of tokens.
    """

    gradient: Tensor
    others: Tensor
    deviation: Tensor
    tokens: Tensor

    def merge(self, other: "EmbeddingSums") -> "EmbeddingSums":
        """Merge two shards (FSDP); replicas, as in DDP, have the same values and need no merging."""
        return EmbeddingSums(*(a + b for a, b in zip(self, other, strict=True)))


def _gradient_ratio(sums: EmbeddingSums, past: None) -> Tensor:
    del past
    if not sums.others.numel():
        return torch.full_like(sums.gradient, torch.nan)
    return sums.gradient.sqrt() / sums.others.sqrt().nanquantile(0.5)


@dataclass(frozen=True)
class EmbeddingCompanion(Companion):
    """Token-embedding variability, and the embedding's gradient against that of the other matrices.

    It watches every `nn.Embedding`. Name other first layers with `EmbeddingCompanion(include="patches")`; they have no
    tokens and so no variability.

    Args:
        include: a regular expression, or a list of them, that a parameter's name must match. Default: the weights of
            `nn.Embedding` and `nn.EmbeddingBag`.
        exclude: the same for parameters to leave out. Default: none.

    Raises:
        ValueError: from `watch`: no embedding found.

    >>> import stabnorm
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 10))
    >>> with stabnorm.StabilityMonitor(model, companions=["embedding"]) as monitor:
    ...     monitor.step()
    >>> list(monitor.companions["embedding"].history())
    ['token_embedding_variability', 'embedding_gradient_ratio']
    """

    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    name: ClassVar[str] = "embedding"
    cost: ClassVar[str] = "two reads of the embedding, one of the gradients"
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(
            "token_embedding_variability", formula="mean over tokens of the standard deviation (over all features) of "
            "the token's vector", unit="weight", source="TEV, arXiv 2409.07787", bad="rises during the training",
            compute=lambda sums, _: sums.deviation / sums.tokens,
        ),
        Statistic(
            "embedding_gradient_ratio", formula="|g| of the embedding / median of |g| over the other weight matrices, "
            "as the optimizer saw them", source="arXiv 2211.09359; bound ours", compute=_gradient_ratio,
            threshold=10.0, advice="its gradient is far larger than the others': freeze it when fine-tuning "
            "(stabnorm.remedies.freeze_embedding), or give it a smaller learning rate",
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        NameFilter(self.include, self.exclude)  # complain now

    def watch(self, model: nn.Module) -> "EmbeddingWatch":
        """Find the embeddings."""
        check_model("model", model)
        of_tokens = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        named = [(plain_name(name), parameter) for name, parameter in model.named_parameters()]
        wanted = selected([name for name, _ in named], self.include, self.exclude)
        if self.include is None:
            wanted = [yes and id(p) in of_tokens for yes, (_, p) in zip(wanted, named, strict=True)]
        chosen = [pair for pair, yes in zip(named, wanted, strict=True) if yes]
        if not chosen:
            raise ValueError(
                f"no embedding found in {type(model).__name__} under include={self.include!r}, exclude={self.exclude!r}"
                ": name the weight of its first layer, as in EmbeddingCompanion(include='patches'), or leave the "
                "companion 'embedding' out"
            )
        watched = {id(parameter) for _, parameter in chosen}
        others = [parameter for _, parameter in named if parameter.ndim > 1 and id(parameter) not in watched]
        return EmbeddingWatch(chosen, others, [id(p) in of_tokens for _, p in chosen])


class EmbeddingWatch(Watch):
    """Reads gradients right after each optimizer step; see `EmbeddingCompanion`."""

    def __init__(
        self,
        embeddings: Sequence[tuple[str, nn.Parameter]],
        others: Sequence[nn.Parameter],
        of_tokens: Sequence[bool],
    ) -> None:
        self.rows = tuple(name for name, _ in embeddings)
        self._of_tokens = of_tokens
        self._parameters = [*(parameter for _, parameter in embeddings), *others]
        self._steps = OptimizerSteps(self._parameters, None, self._after)
        self._squares: Tensor | None = None
        self._indices = Indices()

    @property
    def _gathered(self) -> Tensor:
        device = local(self._parameters[0]).device
        if self._squares is None or self._squares.device != device:
            self._squares = torch.full((len(self._parameters),), torch.nan, dtype=wide(device), device=device)
        return self._squares

    def attach(self) -> None:
        """Register a hook after optimizer steps."""
        self._steps.attach()
        self.discard()

    def detach(self) -> None:
        """Remove the hook."""
        self._steps.detach()

    def discard(self) -> None:
        """Discard the gradients of the last step."""
        self._gathered.fill_(torch.nan)

    def _after(self, rows: list[int], optimizer: torch.optim.Optimizer, group: Group) -> None:
        start = time.perf_counter()
        given = [(row, _dense(gradient)) for row in rows if (gradient := self._parameters[row].grad) is not None]
        if given:
            gathered = self._gathered
            norms = torch._foreach_norm([gradient for _, gradient in given])
            squares = torch.stack([norm.to(gathered) for norm in norms]).square()
            gathered.index_copy_(0, self._indices.on(gathered.device, [row for row, _ in given]), squares)
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def take(self) -> EmbeddingSums:
        """Return the sums of this process; for a sharded embedding, those of its own tokens."""
        gathered, count = self._gathered.clone(), len(self.rows)
        weights = [local(parameter) for parameter in self._parameters[:count]]
        deviation = [
            _deviation(weight).to(gathered) if is_tokens else torch.full_like(gathered[0], torch.nan)
            for weight, is_tokens in zip(weights, self._of_tokens, strict=True)
        ]
        tokens = torch.stack([torch.full_like(gathered[0], len(weight)) for weight in weights])
        return EmbeddingSums(gathered[:count], gathered[count:], torch.stack(deviation), tokens)

    def complaint(self, values: Tensor) -> str | None:
        """Name the embeddings on which no optimizer step was seen."""
        return no_step(self.rows, self._parameters, self._steps)


def _deviation(weight: Tensor) -> Tensor:
    """Sum, over tokens, of the standard deviation over features."""
    return weight.float().std(-1, correction=0).sum(dtype=wide(weight.device))


def _dense(gradient: Tensor) -> Tensor:
    """Return a dense tensor with the gradient's norm. A sparse gradient is summed first, which waits for the GPU."""
    own = local(gradient)
    values = own.coalesce().values() if own.is_sparse else own
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
