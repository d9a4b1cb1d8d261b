"""What holds for every remedy that leaves a module of its own in the model: accumulation, padding and one graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stabnorm import convert_norms, valid_tokens
from stabnorm.remedies import (
    dual_patch_norm,
    lape,
    mix_norm,
    peri_norm,
    qk_norm,
    scale_by_depth,
    scale_residuals,
    sigma_reparametrize,
    stable_embedding,
    standardize_weights,
)
from tests.remedies import test_mix_norm, test_patches, test_positions, test_standardized
from tests.remedies.family import (
    check_autocast,
    check_checkpointed,
    check_compiled,
    check_loading,
    largest,
    net,
    tokens,
)


class Case(NamedTuple):
    """A remedy, the model that it is for, and a batch of it."""

    build: Callable[[], Any]
    batch: Callable[[], Tensor]
    apply: Callable[[Any], Any]


def small() -> Any:
    return net(depth=1)


def ids() -> Tensor:
    return tokens(4)


def hidden() -> Tensor:
    return torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.cat([test_standardized.images(), test_standardized.images().flip(2)])


CASES = {
    "sigma_reparametrize": Case(small, ids, sigma_reparametrize),
    "qk_norm": Case(small, ids, qk_norm),
    "scale_by_depth": Case(net, ids, scale_by_depth),
    "scale_residuals": Case(small, ids, lambda m: scale_residuals(m, tokens(1), scale=0.3)),
    "peri_norm": Case(small, ids, lambda m: peri_norm(m, tokens(1))),
    "mix_norm": Case(test_mix_norm.encoder, hidden, mix_norm),
    "stable_embedding": Case(small, ids, lambda m: stable_embedding(m, init=False)),
    "standardize_weights": Case(test_standardized.convnet, images, standardize_weights),
    "dual_patch_norm": Case(test_patches.vit, lambda: test_patches.IMAGES, dual_patch_norm),
    "lape": Case(test_positions.vit, hidden, lape),
}
of_every_case = pytest.mark.parametrize("name", CASES)


def batches_of(case: Case) -> list[Tensor]:
    return [case.batch(), case.batch().flip(0)]


def trained(case: Case, parts: Callable[[Tensor], list[Tensor]]) -> Any:
    """Train for two steps, each on the micro-batches of one batch."""
    model = case.build()
    case.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches_of(case):
        optimizer.zero_grad()
        pieces = parts(batch)
        for piece in pieces:
            (model(piece).square().mean() / len(pieces)).backward()
        optimizer.step()
    return model


@of_every_case
def test_micro_batches_train_it_as_one_batch_does(name: str) -> None:
    whole = trained(CASES[name], lambda batch: [batch])
    parts = trained(CASES[name], lambda batch: list(batch.chunk(2)))
    # Each micro-batch is one more power iteration, so the singular vectors are nearer to the truth.
    tolerance = 2e-3 if name == "sigma_reparametrize" else 1e-4
    for (key, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=1e-2 * tolerance, msg=key)


def test_mixed_norms_load_and_recompute_and_train_under_autocast() -> None:
    case = CASES["mix_norm"]
    check_loading(case.build, case.batch(), case.apply)
    check_checkpointed(case.build, case.batch(), case.apply)
    check_autocast(case.build, case.batch(), case.apply)


class Tokenwise(nn.Module):
    """Branches that mix no tokens, so that what padding holds could only matter through the statistics of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, fc in zip(self.norms, self.fcs, strict=True):
            x = x + fc(norm(x))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (Tokenwise, "stable_embedding"), (test_standardized.convnet, "standardize_weights"),
        (lambda: test_mix_norm.encoder(4), "mix_norm"),
    ],
)  # fmt: skip
def test_it_is_one_graph(build: Callable[[], Any], name: str) -> None:
    def seeded() -> Any:
        torch.manual_seed(0)
        return build()

    check_compiled(seeded, CASES[name].batch(), CASES[name].apply)


@pytest.mark.parametrize(
    "apply", [lambda m: stable_embedding(m, init=False), lambda m: peri_norm(m, tokens(1))], ids=["stable", "peri"]
)
def test_padding_enters_no_statistic_of_a_norm_that_a_remedy_has_added(apply: Callable[[Any], Any]) -> None:
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])
    models = []
    for padding in (0, 7):
        torch.manual_seed(0)
        model = Tokenwise()
        apply(model)
        convert_norms(model, to="repbn", include="output_norm")
        with valid_tokens(mask):
            y = model(torch.where(mask, tokens(), padding))
        y[mask].square().mean().backward()
        models.append((y[mask], model))
    assert largest(models[1][0], models[0][0]) < 1e-6
    norms = [name for name, _ in models[0][1].named_buffers() if name.endswith("running_var")]
    assert norms
    for (name, one), other in zip(models[0][1].state_dict().items(), models[1][1].state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7, msg=name)
    for (name, one), other in zip(models[0][1].named_parameters(), models[1][1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)
