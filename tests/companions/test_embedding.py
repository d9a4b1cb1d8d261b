"""Token-embedding variability and the embedding's gradient, against numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.companions.embedding import EmbeddingCompanion
from tests.companions.nets import Text, batch, loss


def train(model: nn.Module, scale: float = 1.0, clip: bool = False, companion: Any = "embedding") -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with StabilityMonitor(model, companions=[companion]) as monitor:
        for part in batch(6).split(3):
            (scale * loss(model, part)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        monitor.step(grad_scale=scale)
    return {name: float(values[0, 0]) for name, values in monitor.companions["embedding"].history().items()}


def norms(model: nn.Module) -> dict[str, float]:
    return {n: float(p.grad.double().norm()) for n, p in model.named_parameters() if p.grad is not None and p.ndim > 1}


def test_figures_are_those_of_float64() -> None:
    model = Text()
    with torch.no_grad():
        model.tokens.weight.mul_(torch.arange(1, 14)[:, None]).add_(1e3)
    history = train(model)
    vectors = model.tokens.weight.detach().double().numpy()
    assert history["token_embedding_variability"] == pytest.approx(vectors.std(1).mean(), rel=1e-4)
    all_norms = norms(model)
    own = all_norms.pop("tokens.weight")
    assert history["embedding_gradient_ratio"] == pytest.approx(own / np.median(list(all_norms.values())), rel=1e-5)


def test_loss_scale_and_clipping_drop_out() -> None:
    figures = []
    for scale, clip in ((1.0, False), (1024.0, False), (1.0, True)):
        torch.manual_seed(3)
        figures.append(train(Text(), scale, clip)["embedding_gradient_ratio"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-6)
    assert figures[2] == pytest.approx(figures[0], rel=1e-5)


def test_embedding_and_matrices_may_have_different_optimizers() -> None:
    model = Text()
    first = torch.optim.SGD(model.tokens.parameters(), lr=0.0)
    second = torch.optim.AdamW([p for n, p in model.named_parameters() if n != "tokens.weight"], lr=0.0)
    with StabilityMonitor(model, companions=["embedding"]) as monitor:
        loss(model, batch()).backward()
        first.step()
        second.step()
        monitor.step()
    all_norms = norms(model)
    own = all_norms.pop("tokens.weight")
    ratio = monitor.companions["embedding"].history()["embedding_gradient_ratio"].item()
    assert ratio == pytest.approx(own / np.median(list(all_norms.values())), rel=1e-5)


def test_sparse_gradients_are_summed_up() -> None:
    figures = []
    for sparse in (False, True):
        torch.manual_seed(3)
        model = Text()
        model.tokens.sparse = sparse
        figures.append(train(model)["embedding_gradient_ratio"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-6)


def test_another_first_layer_is_named_and_has_no_variability() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"no embedding found in Sequential.*include='patches'"):
        EmbeddingCompanion().watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StabilityMonitor(model, companions=[EmbeddingCompanion(include=r"^0\.weight")]) as monitor:
        model(torch.randn(4, 3, 2, 2)).square().mean().backward()
        optimizer.step()
        monitor.step()
    history = monitor.companions["embedding"].history()
    assert history["token_embedding_variability"].isnan().all()
    gradients: Any = model[0].weight.grad, model[3].weight.grad
    assert history["embedding_gradient_ratio"].item() == pytest.approx(
        float(gradients[0].norm() / gradients[1].norm()), rel=1e-5
    )


def test_a_frozen_embedding_has_no_ratio_and_no_complaint(caplog: pytest.LogCaptureFixture) -> None:
    model = Text()
    model.tokens.requires_grad_(False)
    history = train(model)
    assert np.isnan(history["embedding_gradient_ratio"])
    assert history["token_embedding_variability"] > 0
    assert caplog.text == ""
