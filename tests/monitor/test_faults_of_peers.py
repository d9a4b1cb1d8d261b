"""What published monitors were found to measure wrongly, measured here. Resuming in mid-window is in `test_resume`."""

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor
from stabnorm.functional import RawMoments, merge_moments_, raw_moments
from stabnorm.monitor.ranks import merge_stacked_, variance_between


@pytest.mark.parametrize("offset", [1.0, 3.0])
def test_ranks_with_opposite_means_merge_to_the_variance_of_the_whole(offset: float) -> None:
    # A published merge adds the wrong sign: -8.15 in place of 10 for means of 3 and -3.
    rows = [torch.randn(40, 5) + offset, torch.randn(60, 5) - offset]
    stacked = RawMoments(
        *(torch.stack(parts)[:, None] for parts in zip(*(raw_moments(r, "layer", 1e-5) for r in rows), strict=True))
    )
    between = variance_between(stacked)[0]
    merged = merge_stacked_(stacked, merge_moments_)
    whole = torch.cat(rows).double()
    variance = whole.var(0, correction=0)
    torch.testing.assert_close(merged.channel[0, 4].double(), variance, rtol=1e-6, atol=0)
    within = (40 * rows[0].double().var(0, correction=0) + 60 * rows[1].double().var(0, correction=0)) / 100
    torch.testing.assert_close(between, variance - within, rtol=1e-5, atol=0)


def test_one_activation_of_a_thousand_among_256_tokens_is_a_thousand() -> None:
    # A mean over tokens of each token's signed largest value reads 5.7.
    x = torch.randn(8, 32, 16)
    x[3, 17, 5] = -1000.0
    model = nn.Sequential(nn.LayerNorm(16))
    with StabilityMonitor(model, ["amax", "crest"], gradients=False) as monitor:
        model(x)
        monitor.step()
        monitor.flush()
    history = monitor.history()
    assert history["amax"].item() == 1000
    assert history["crest"].item() == pytest.approx(1000 / float(x.double().square().mean().sqrt()), rel=1e-6)
    assert history["tokens"].item() == 256


def test_the_spread_between_samples_is_part_of_the_variance() -> None:
    # A mean of per-sample variances reads 1 where it is 50.
    x = torch.randn(8, 32, 16) + 7 * torch.linspace(-1, 1, 8)[:, None, None].sign()
    model = nn.Sequential(nn.BatchNorm1d(16))
    with StabilityMonitor(model, ["running_var_distance"], gradients=False) as monitor:
        model(x.transpose(1, 2))
        monitor.step()
    past: Tensor = monitor.state_dict()["past"]["var"][0]
    torch.testing.assert_close(past, x.double().flatten(0, 1).var(0, correction=0), rtol=1e-6, atol=0)
    assert past.min() > 45


def test_a_steady_small_channel_that_jumps_fifty_times_is_a_burst() -> None:
    # The published filter pools its variance over channels, and is blind to this one among scales of 0.01 to 100.
    scale = torch.logspace(-2, 2, 16)
    model = nn.Sequential(nn.LayerNorm(16))
    with StabilityMonitor(model, ["am_gm_ratio"], gradients=False) as monitor:
        for step in range(40):
            x = torch.randn(64, 16) * scale
            if step == 30:
                x[:, 0] *= 50
            model(x)
            monitor.step()
    ratio = monitor.history()["am_gm_ratio"][:, 0]
    assert ratio[30] > 100
    assert ratio[4:30].max() < 1
    assert ratio[31:].max() < 1


def test_a_step_of_nan_hides_no_spike_after_it() -> None:
    # A window that takes the NaN in calls nothing a spike for as long as it holds it.
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["scale_jump"], gradients=False) as monitor:
        for step in range(12):
            model(torch.randn(64, 8) * {5: torch.nan, 6: 1000.0}.get(step, 1.0))
            monitor.step()
        monitor.flush()
    assert [(alert.step, alert.statistic) for alert in monitor.alerts] == [(5, "nonfinite"), (6, "scale_jump")]
