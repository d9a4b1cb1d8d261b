"""What the costlier statistics mean, in cases whose answer is known in closed form."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor
from stabnorm.nn import PRepBN, RepBN


def watched(
    layers: Sequence[nn.Module], inputs: Sequence[Tensor | None], statistics: list[str], steps: int = 1
) -> dict[str, Tensor]:
    model = nn.ModuleList(layers)
    with StabilityMonitor(model, statistics) as monitor:
        for _ in range(steps):
            for layer, x in zip(layers, inputs, strict=True):
                if x is not None:
                    layer(x)
            monitor.step()
    return monitor.history()


# --- depth ---

GROWTH = ["depth_ratio", "depth_growth_rate", "depth_growth_shape"]


def depth_profile(variances: Sequence[float | None], widths: list[int] | None = None) -> dict[str, Tensor]:
    widths = widths or [16] * len(variances)
    inputs = [None if v is None else math.sqrt(v) * nn.functional.layer_norm(torch.randn(40, w), (w,), eps=0.0)
              for v, w in zip(variances, widths, strict=True)]  # fmt: skip
    return watched([nn.LayerNorm(w) for w in widths], inputs, GROWTH)


def test_exponential_growth_in_depth_has_its_rate_and_is_told() -> None:
    history = depth_profile([math.exp(0.3 * layer) for layer in range(12)])
    rate, shape = history["depth_growth_rate"][0], history["depth_growth_shape"][0]
    assert torch.isnan(rate[:2]).all()
    torch.testing.assert_close(rate[2:], torch.full((10,), 0.3), rtol=1e-4, atol=0)
    assert (shape[2:] > 0.99).all()
    torch.testing.assert_close(history["depth_ratio"][0, -1], torch.tensor(math.exp(0.15 * 11)), rtol=1e-5, atol=0)


def test_linear_growth_in_depth_is_told_from_exponential() -> None:
    # What a residual stream does whose branches all add as much; scaled by 1 / sqrt(l), even less.
    history = depth_profile([1.0 + 0.5 * layer for layer in range(12)])
    assert (history["depth_growth_shape"][0, 2:] < 0.01).all()
    scaled = depth_profile(np.cumsum([1 / (1 + layer) for layer in range(12)]).tolist())
    assert scaled["depth_growth_shape"][0, -1] < 0.5
    assert scaled["depth_growth_rate"][0, -1] < history["depth_growth_rate"][0, -1]


def test_the_fits_are_those_of_numpy() -> None:
    variances = [0.5, 1.1, 0.9, 3.0, 2.0, 8.0]
    history = depth_profile(variances)
    for last in range(2, 6):
        v, depth = np.array(variances[: last + 1]), np.arange(last + 1.0)
        rate, start = np.polyfit(depth, np.log(v), 1)
        exponential = ((np.log(v) - start - rate * depth) ** 2).mean()
        slope, offset = np.polyfit(depth, v, 1, w=1 / v)
        linear = ((1 - (offset + slope * depth) / v) ** 2).mean()
        assert float(history["depth_growth_rate"][0, last]) == pytest.approx(rate, rel=1e-4)
        assert float(history["depth_growth_shape"][0, last]) == pytest.approx(linear / (linear + exponential), rel=1e-3)


def test_no_growth_has_rate_0_and_no_shape() -> None:
    history = depth_profile([4.0] * 6)
    assert history["depth_growth_rate"][0, -1].abs() < 1e-6
    assert history["depth_growth_shape"][0, -1] == pytest.approx(0.5, abs=1e-2)


def test_only_layers_as_wide_count_and_one_that_did_not_run_leaves_a_gap() -> None:
    variances: list[float | None] = [1.0, 100.0, math.exp(0.2), None, math.exp(0.6), 7.0]
    history = depth_profile(variances, [16, 8, 16, 16, 16, 8])
    assert float(history["depth_growth_rate"][0, 4]) == pytest.approx(0.2, rel=1e-4)  # depths 0, 1 and 3
    assert history["depth_growth_rate"][0].isnan().tolist() == [True, True, True, True, False, True]
    assert float(history["depth_ratio"][0, 5]) == pytest.approx(math.sqrt(0.07), rel=1e-5)


# --- samples ---


def test_independent_tokens_count_in_full_and_copies_once() -> None:
    torch.manual_seed(0)
    flat, copies = torch.randn(400, 6), torch.randn(40, 1, 6).expand(40, 10, 6).contiguous()
    history = watched([nn.LayerNorm(6), nn.LayerNorm(6)], [flat, copies], ["effective_samples"])["effective_samples"][0]
    torch.testing.assert_close(history, torch.tensor([399.0, 39.0]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_effective_samples_foretell_how_the_batch_mean_varies() -> None:
    torch.manual_seed(0)
    recorded, means = [], []
    for _ in range(300):
        x = 0.5 * torch.randn(16, 1, 8) + torch.randn(16, 25, 8)  # an intraclass correlation of 0.2
        recorded.append(float(watched([nn.LayerNorm(8)], [x], ["effective_samples"])["effective_samples"]))
        means.append(x.mean((0, 1)))
    measured = 1.25 / float(torch.stack(means).var(0).mean())
    assert float(np.median(recorded)) == pytest.approx(measured, rel=0.15)


def test_one_sequence_says_nothing_about_its_certainty() -> None:
    history = watched([nn.LayerNorm(6)], [torch.randn(1, 50, 6)], ["effective_samples"])
    assert torch.isnan(history["effective_samples"]).all()


# --- collapse ---


def cosines(layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[float]:
    return watched(layers, inputs, ["token_cosine"])["token_cosine"][0].tolist()


def test_the_cosine_of_tokens_is_that_of_all_pairs_and_does_not_ask_how_long_they_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 16) + torch.randn(16)
    lengths = torch.rand(40, 1).mul(3).exp()
    unit = nn.functional.normalize(x.double(), dim=-1)
    products = unit @ unit.T
    expected = float((products.sum() - 40) / (40 * 39))
    found = cosines([nn.RMSNorm(16, eps=1e-12) for _ in range(2)], [x, lengths * x])
    assert found == pytest.approx([expected] * 2, abs=1e-5)


def test_tokens_with_nothing_in_common_have_cosine_0_and_copies_1() -> None:
    axes = torch.eye(8)
    opposite = torch.cat([torch.ones(1, 8), -torch.ones(1, 8)])
    norms = [nn.RMSNorm(8, eps=1e-12) for _ in range(3)]
    assert cosines(norms, [axes, torch.randn(8).expand(5, 8), opposite]) == pytest.approx([0, 1, -1], abs=1e-5)


def test_one_token_a_dead_layer_and_a_batch_norm_have_no_cosine() -> None:
    x = torch.randn(6, 8)
    norms = [nn.LayerNorm(8), nn.LayerNorm(8), nn.BatchNorm1d(8)]
    assert all(math.isnan(value) for value in cosines(norms, [x[:1], torch.zeros(6, 8), x]))


# --- outliers ---


def test_a_massive_activation_is_one_from_the_published_rule_on() -> None:
    torch.manual_seed(0)
    x = 0.1 * torch.randn(256, 64)
    median = float(np.median(x.abs().numpy(), 1).mean())
    histories = []
    for largest in (99.9, 100.1, 1001 * median):
        spoilt = x.clone()
        spoilt[7, 3] = largest
        histories.append(watched([nn.LayerNorm(64)], [spoilt], ["massive_activation", "massive_channels"]))
    values = [float(h["massive_activation"]) for h in histories]
    assert values[0] < 1 < values[1]
    assert [float(h["massive_channels"]) for h in histories[:2]] == [0, 1]
    assert values[2] < 1  # a thousand medians, but small


def test_one_activation_of_1000_among_256_tokens_is_not_averaged_away() -> None:
    x = torch.randn(256, 64)
    x[9, 9] = 1000
    history = watched([nn.LayerNorm(64)], [x], ["massive_activation", "max_to_median", "token_kurtosis"])
    assert history["massive_activation"] > 1
    assert history["max_to_median"] > 8
    assert history["token_kurtosis"] > 3


def test_an_outlier_dim_is_deep_in_a_quarter_of_the_layers_as_wide() -> None:
    layers = [nn.LayerNorm(8) for _ in range(8)] + [nn.LayerNorm(5)]
    for layer, channels in ((0, [2, 4]), (3, [2]), (5, [7]), (8, [0])):
        for channel in channels:
            layers[layer].get_parameter("weight").data[channel] = 100.0
    inputs = [torch.randn(50, 8) for _ in range(8)] + [torch.randn(50, 5)]
    history = watched(layers, inputs, ["outlier_dims", "outlier_dims_deep"])
    assert history["outlier_dims"][0].tolist() == [2, 0, 0, 1, 0, 1, 0, 0, 1]
    assert history["outlier_dims_deep"][0].tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 1]


def test_six_of_a_hundred_positions_make_an_outlier_dim_and_five_do_not() -> None:
    class Constant(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x

    from stabnorm import register_norm

    register_norm(Constant, "layer", num_features="normalized_shape")
    x = torch.zeros(100, 8)
    x[:6, 1], x[:5, 2], x[:60, 3] = -6, 9, 5.9
    assert float(watched([Constant(8)], [x], ["outlier_dims"])["outlier_dims"]) == 1


def test_a_new_outlier_is_told_and_an_old_large_one_is_not() -> None:
    model = nn.Sequential(nn.LayerNorm(32))
    with StabilityMonitor(model, ["outlier_overlap", "new_outlier_share"]) as monitor:
        for step in range(30):
            x = torch.randn(64, 32)
            x[:, :3] *= 50
            x[:, 20] *= 500 if step == 20 else 1
            model(x)
            monitor.step()
    history = monitor.history()
    quiet = [step for step in range(1, 20)]
    assert (history["outlier_overlap"][quiet] == 1).all()
    assert (history["new_outlier_share"][quiet] < 0.01).all()
    assert history["outlier_overlap"][20, 0] == pytest.approx(0.5)
    assert history["new_outlier_share"][20, 0] > 0.9
    assert history["new_outlier_share"][21:, 0].max() < 0.4  # the third of the old three, which the spike outdid
    assert [(alert.step, alert.statistic) for alert in monitor.alerts] == [(20, "new_outlier_share")]


def test_channels_that_change_places_raise_no_alert_even_where_there_are_few() -> None:
    model = nn.ModuleList([nn.LayerNorm(width) for width in (1, 2, 3, 4, 5, 64)])
    with StabilityMonitor(model, ["new_outlier_share", "outlier_overlap"]) as monitor:
        for _ in range(200):
            for norm in model:
                norm(torch.randn(64, norm.normalized_shape[0]))  # type: ignore[arg-type, index]
            monitor.step()
    monitor.flush()
    assert monitor.alerts == []
    assert (monitor.history()["outlier_overlap"][1:, :3] == 1).all()


# --- parameters ---


def test_gains_that_differ_no_more_in_mxfp8_are_counted_by_blocks() -> None:
    layers = [nn.LayerNorm(64) for _ in range(5)] + [
        nn.LayerNorm(40),
        nn.LayerNorm(8, elementwise_affine=False),
    ]
    gains = [torch.full((64,), value) for value in (1.0, 0.9, 0.83, 1.9)]
    mixed = torch.full((64,), 0.95)
    mixed[3] = 0.5
    for layer, gain in zip(layers, [*gains, mixed, torch.full((40,), -0.97)], strict=False):
        layer.get_parameter("weight").data.copy_(gain)
    inputs = [torch.randn(4, 64)] * 5 + [torch.randn(4, 40), torch.randn(4, 8)]
    shares = watched(layers, inputs, ["mx_last_bin"])["mx_last_bin"][0]
    assert shares[:6].tolist() == [0, 1, 0, 1, 0.5, 1]
    assert torch.isnan(shares[6])


def test_sign_flips_and_drift_are_against_the_step_before_and_the_first_step() -> None:
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm)
    with StabilityMonitor(model, ["gain_sign_flips", "bias_drift"]) as monitor:
        for step in range(4):
            model(torch.randn(5, 4))
            if step == 2:
                norm.weight.data[:3] *= -1
            norm.bias.data += 0.5
            monitor.step()
    history = monitor.history()
    assert history["gain_sign_flips"][1:, 0].tolist() == [0, 0.75, 0]
    assert history["bias_drift"][:, 0].nan_to_num(0).tolist() == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize("lam", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("center", [True, False])
def test_dead_gains_are_channels_whose_output_is_nearly_constant(lam: float | None, center: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(4000, 12) * (torch.rand(12) + 0.5) + (0 if center else torch.randn(12))
    norm: nn.Module = RepBN(12, center=center) if lam is None else PRepBN(12, center=center)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.0)
    rep = norm.rep if isinstance(norm, PRepBN) else norm
    assert isinstance(rep, RepBN)
    power = x.var(0, correction=0) if center else x.square().mean(0)
    share = 1.0 if lam is None else 1 - lam
    own = norm.get_parameter("weight").data
    dead = torch.tensor([0, 5, 6])
    if isinstance(norm, PRepBN) and lam is not None:
        norm.lam.fill_(lam)
        own[dead] = 0
    # What cancels the skip path there.
    rep.weight.data[dead] = -(rep.eta.data * (power + rep.eps).sqrt())[dead]
    expected = 3 / 12 if share or isinstance(norm, PRepBN) else 0
    assert float(watched([norm], [x], ["dead_gains"])["dead_gains"]) == pytest.approx(expected)


# --- optimizer ---


def test_without_adam_its_figures_are_nan_and_with_it_they_need_the_gradients() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 1))
    adam, sgd = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters())
    with StabilityMonitor(model, ["adam_staleness", "gradient_to_eps"]) as monitor:
        for optimizer, given, zeroed in (
            (sgd, sgd, False),
            (adam, (), False),
            (adam, adam, True),
            (adam, [sgd, adam], False),
        ):
            model.zero_grad()
            model(torch.randn(6, 8)).mean().backward()
            optimizer.step()
            if zeroed:
                model.zero_grad()
            monitor.step(optimizer=given)
    assert monitor.history()["adam_staleness"][:, 0].isnan().tolist() == [True, True, True, False]
    assert monitor.history()["gradient_to_eps"][:, 0].isnan().tolist() == [True, True, True, False]


def test_what_is_no_optimizer_is_refused() -> None:
    match = r"optimizer is a torch.optim.Optimizer, or several of them, got {}"
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["adam_staleness"]) as monitor, pytest.raises(TypeError, match=match):
        monitor.step(optimizer=[{}])  # type: ignore[list-item]


def test_adam_whose_gradients_jump_is_stale_and_one_with_a_large_eps_does_not_move() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    adam = torch.optim.Adam(model.parameters(), lr=0.0, eps=1e-3)
    g = torch.randn(16, 8)
    with StabilityMonitor(model, ["adam_staleness", "gradient_to_eps"]) as monitor:
        for step in range(60):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
            adam.zero_grad()
            model(x).backward(g * (1e-5 if step < 50 else 1e-3))
            adam.step()
            monitor.step(optimizer=adam)
    history = monitor.history()
    assert history["adam_staleness"][50, 0] > 2.3
    assert history["gradient_to_eps"][49, 0] < 0.5
    torch.testing.assert_close(history["gradient_to_eps"][50], 100 * history["gradient_to_eps"][49], rtol=1e-4, atol=0)


def test_a_gradient_spike_is_measured_against_its_own_channel() -> None:
    norm = nn.LayerNorm(8)
    model = nn.Sequential(norm)
    with StabilityMonitor(model, ["gradient_spike"]) as monitor:
        for step in range(40):
            model.zero_grad()
            g = torch.ones(32, 8) * torch.tensor([1e-4, 1, 1, 1, 1, 1, 1, 0])
            g[:, 0] *= 80 if step == 30 else 1  # the smallest channel, and still smaller than the others
            model(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))).backward(g)
            monitor.step()
    spikes = monitor.history()["gradient_spike"][:, 0]
    assert torch.isnan(spikes[:10]).all()
    torch.testing.assert_close(spikes[10:30], torch.ones(20), rtol=1e-4, atol=0)
    assert float(spikes[30]) == pytest.approx(80, rel=1e-3)
