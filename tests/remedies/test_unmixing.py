"""`unmix_norms`: the published formula, the stream that it is for, the refusal to fold, what holds for every remedy."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, StabNormError, find_norms, fold_norms, valid_tokens
from stabnorm.nn import UnMixTNS
from stabnorm.remedies import unmix_norms
from tests.remedies.family import check_compiled, check_copies, in_the_family


def convnet() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 4, 3))
    nn.init.normal_(model[1].weight, 1.0, 0.3)
    nn.init.normal_(model[1].running_mean)
    return model


def images(batch: int = 6) -> Tensor:
    return torch.randn(batch, 3, 7, 6, generator=torch.Generator().manual_seed(1)) + 0.5


def unmixed_norm(width: int = 8, **options: Any) -> tuple[UnMixTNS, Any]:
    """One such norm in float64, and a model that holds it alone."""
    model = nn.Sequential(nn.BatchNorm2d(width)).double()
    norm: Any = model[0]
    generator = torch.Generator().manual_seed(5)
    norm.running_mean.copy_(torch.randn(width, generator=generator))
    norm.running_var.copy_(torch.rand(width, generator=generator) + 0.5)
    norm.weight.data.copy_(torch.rand(width, generator=generator) + 0.5)
    unmix_norms(model, **options)
    assert isinstance(norm, UnMixTNS)
    return norm, model


@in_the_family
def test_unmix_norms(check: Callable[..., None]) -> None:
    still = check is check_copies  # which compares two forwards
    check(convnet, images(), functools.partial(unmix_norms, momentum=0.0 if still else 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_to_one_graph(training: bool) -> None:
    check_compiled(convnet, images(), unmix_norms, training)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_it_is_the_published_formula_and_so_is_its_next_forward(size: int) -> None:
    norm, _ = unmixed_norm(components=4, momentum=0.2)
    plain: Any = norm
    mu, var = (part.clone() for part in norm.components)
    for step in range(3):
        x = torch.randn(size, 8, 4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        want = torch.empty_like(x)
        change = torch.zeros(2, 4, 8, dtype=torch.float64)
        for index, image in enumerate(x):
            own_mean, own_var = image.mean((1, 2)), image.var((1, 2), correction=0)
            p = (
                torch.stack([nn.functional.cosine_similarity(own_mean, mu[k], 0) for k in range(4)])
                .div(0.07)
                .softmax(0)
            )
            means = torch.stack([(1 - p[k]) * mu[k] + p[k] * own_mean for k in range(4)])
            variances = torch.stack([(1 - p[k]) * var[k] + p[k] * own_var for k in range(4)])
            mean = means.mean(0)
            total = variances.mean(0) + means.square().mean(0) - mean.square()
            scale = plain.weight / (total + plain.eps).sqrt()
            want[index] = (image - mean[:, None, None]) * scale[:, None, None] + plain.bias[:, None, None]
            change[0] += p[:, None] * (own_mean - mu) / size
            change[1] += p[:, None] * (own_var - var) / size
        torch.testing.assert_close(plain(x), want, rtol=1e-10, atol=1e-12)
        rate = 1 - 0.8 ** (size / 64)
        mu, var = mu + rate * change[0], var + rate * change[1]


def test_with_one_component_each_image_has_its_own_statistics_and_the_component_is_a_convex_mix() -> None:
    norm, model = unmixed_norm(components=1, momentum=0.3)
    plain: Any = norm
    torch.testing.assert_close(norm.components[0, 0], plain.running_mean)
    torch.testing.assert_close(norm.components[1, 0], plain.running_var)
    x = torch.randn(64, 8, 4, 4, dtype=torch.float64) * 2 + 1
    before = norm.components.clone()
    want = nn.functional.instance_norm(x, weight=plain.weight, bias=plain.bias, eps=plain.eps)
    torch.testing.assert_close(model(x), want)
    model(x)
    own = torch.stack([x.mean((2, 3)).mean(0), x.var((2, 3), correction=0).mean(0)])
    torch.testing.assert_close(norm.components[:, 0], 0.7 * before[:, 0] + 0.3 * own)


def test_the_components_begin_around_the_running_statistics() -> None:
    norm, _ = unmixed_norm(width=4, components=4000)
    plain: Any = norm
    mean, var = norm.components
    torch.testing.assert_close(mean.mean(0), plain.running_mean, rtol=0, atol=0.1)
    torch.testing.assert_close(var.mean(0) + mean.var(0), plain.running_var, rtol=0.1, atol=0)
    again, _ = unmixed_norm(width=4, components=4000)
    assert torch.equal(again.components, norm.components)
    assert not torch.equal(unmixed_norm(width=4, components=4000, seed=1)[0].components, norm.components)


def test_in_a_stream_of_one_class_after_the_other_it_keeps_what_batch_statistics_take_out() -> None:
    """The mean of a class is what tells it from the others: batch statistics of one class subtract it."""
    width, classes = 16, 4
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(classes, width, generator=generator)
    shift = 0.7 * torch.randn(width, generator=generator)  # of the test data against the training's
    norm: Any = nn.BatchNorm2d(width)
    norm.running_mean.copy_(centres.mean(0))
    norm.running_var.copy_(1 + centres.var(0, correction=0))
    of_batch = copy.deepcopy(norm).train()
    model = nn.Sequential(norm).eval()
    source = copy.deepcopy(norm).eval()
    unmix_norms(model, components=4)
    errors = {"batch": 0.0, "source": 0.0, "unmixed": 0.0}
    for step in range(80):
        label = step // 3 % classes
        clean = torch.randn(16, width, 4, 4, generator=generator) + centres[label][:, None, None]
        wanted = source(clean)
        given = clean + shift[:, None, None]
        if step >= 60:
            for name, y in (("batch", of_batch(given)), ("source", source(given)), ("unmixed", model(given))):
                errors[name] += float((y - wanted).detach().square().mean())
        else:
            model(given)
    assert errors["unmixed"] < 0.5 * errors["source"]
    assert errors["unmixed"] < 0.5 * errors["batch"]


def test_an_image_that_is_not_finite_and_padding_leave_the_components_alone() -> None:
    norm, model = unmixed_norm()
    other = copy.deepcopy(model)
    x = torch.randn(5, 8, 4, 4, dtype=torch.float64)
    poisoned = torch.cat([x, torch.full_like(x[:1], torch.nan)])
    want, got = other(x), model(poisoned)
    torch.testing.assert_close(got[:5], want)
    rate = (1 - 0.9 ** (6 / 64)) / (1 - 0.9 ** (5 / 64))
    torch.testing.assert_close(norm.pending, rate * other[0].pending)
    padded = torch.cat([x, torch.full((5, 8, 2, 4), 1e9, dtype=torch.float64)], 2)
    mask = torch.ones(5, 6, 4, dtype=torch.bool)
    mask[:, 4:] = False
    _, masked = unmixed_norm()
    with valid_tokens(mask):
        torch.testing.assert_close(masked(padded)[:, :, :4], want)
    _, still = unmixed_norm(momentum=0.0)
    before = still[0].components.clone()
    still(x)
    still(x)
    assert torch.equal(still[0].components, before)


def test_rows_without_places_are_normalised_with_the_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    plain: Any = copy.deepcopy(model).eval()
    unmix_norms(model)
    x = torch.randn(6, 4)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)
    assert model(torch.randn(6, 4, 3)).shape == (6, 4, 3)


def test_it_does_not_fold_and_says_why() -> None:
    model = convnet().eval()
    unmix_norms(model)
    with pytest.warns(UserWarning, match="nothing is folded"):
        result = fold_norms(model, images())
    (norm,) = result.norms
    assert norm.status == "kept"
    assert "statistics of its own" in norm.reason


def test_a_monitor_watches_it_as_a_batch_norm() -> None:
    model = convnet()
    unmix_norms(model)
    (layer,) = find_norms(model)
    assert (layer.kind, layer.channel_dim) == ("batch", 1)
    with StabilityMonitor(model) as monitor:
        for _ in range(2):
            model(images()).square().mean().backward()
            monitor.step()
    assert torch.isfinite(monitor.history()["mean_discrepancy"][1]).all()


def test_what_it_cannot_unmix_is_left_with_the_reason() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4))
    unmix_norms(model, include="0")
    report = unmix_norms(model)
    assert report.changed == ["2"]
    assert "unmixed already" in report.left["0"]
    assert "no running statistics" in report.left["1"]
    with pytest.raises(StabNormError, match="no batch norms"):
        unmix_norms(nn.Sequential(nn.LayerNorm(4)))


@pytest.mark.parametrize(("option", "value"), [("components", 0), ("temperature", 0), ("momentum", 2), ("seed", -1)])
def test_a_wrong_argument_is_named_and_changes_nothing(option: str, value: Any) -> None:
    model = convnet()
    with pytest.raises(ValueError, match=f"{option}={value}"):
        unmix_norms(model, **{option: value})
    assert type(model[1]) is nn.BatchNorm2d
