"""`standardize_weights`: moments of the weights (T25), the fold, and what holds for every remedy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabNormError
from stabnorm.remedies import standardize_weights
from tests.remedies.family import check_fold, in_the_family


def convnet() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(4, 8),
        nn.Flatten(2), nn.Conv1d(8, 5, 2, bias=False),
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(1))


@in_the_family
def test_standardize_weights(check: Callable[..., None]) -> None:
    check(convnet, images(), standardize_weights)


def test_the_fold_is_exact() -> None:
    check_fold(convnet, images().double(), standardize_weights)


def test_each_output_channel_has_mean_0_and_unbiased_variance_1() -> None:
    """T25, against numpy in float64."""
    model = convnet()
    before = model[3].weight.detach().double().numpy()
    standardize_weights(model, eps=1e-5)
    rows = before.reshape(len(before), -1)
    expected = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, ddof=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(model[3].weight.detach().double().numpy().reshape(rows.shape), expected, rtol=1e-5)
    tiny = convnet()
    with torch.no_grad():
        tiny[0].weight.mul_(1e3)
    standardize_weights(tiny)
    weight = tiny[0].weight.detach().flatten(1)
    assert weight.mean(1).abs().max() < 1e-5
    assert (weight.var(1) - 1).abs().max() < 1e-5


def test_the_gradient_is_that_of_the_formula_and_has_no_share_along_the_weight() -> None:
    """The loss does not change with the scale of the parameter, so its gradient is orthogonal to it."""
    model = convnet().double()
    standardize_weights(model, eps=0)
    y = model(images().double())
    y.backward(torch.randn(y.shape, dtype=torch.float64))
    parameter = model[3]._parameters["weight"]
    along = (parameter.grad * parameter.detach()).flatten(1).sum(1)
    assert along.abs().max() < 1e-10 * parameter.grad.abs().max()
    assert parameter.grad.flatten(1).sum(1).abs().max() < 1e-10


def test_what_cannot_be_standardized_is_left_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 2))
    report = standardize_weights(model)
    assert report.changed == ["1"]
    assert report.left == {"0": "each of its outputs has one weight only, which has no variance"}
    with pytest.raises(StabNormError, match="standardized already"):
        standardize_weights(model, include="1")
    with pytest.raises(StabNormError, match="no convolutions"):
        standardize_weights(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="eps=-1"):
        standardize_weights(convnet(), eps=-1)
