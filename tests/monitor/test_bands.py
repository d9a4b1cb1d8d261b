"""Layers of very different widths: figures are those of each layer alone, and cost follows the sum of the widths."""

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor
from stabnorm.monitor import bands
from stabnorm.monitor.bands import cheapest_bands
from tests.monitor.test_resume import stored, tensors

WIDE = 5000


class Mixed(nn.Module):
    """Narrow norms before and after a wide one, which normalises three axes together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.last = nn.LayerNorm(4), nn.LayerNorm([2, 50, 50]), nn.BatchNorm1d(6)
        self.to_wide, self.to_last = nn.Linear(4, WIDE), nn.Linear(WIDE, 6)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(self.to_wide(self.first(x)).view(-1, 2, 50, 50))
        out: Tensor = self.last(self.to_last(wide.flatten(1)))
        return out


def run(net: nn.Module, monitor: StabilityMonitor, steps: range) -> None:
    for step in steps:
        net.zero_grad()
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(step))
        (net(x) * torch.arange(54.0).view(9, 6)).square().mean().backward()
        monitor.step(loss=float(step), grad_scale=2.0)


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


@pytest.mark.parametrize("preset", ["standard", "full"])
def test_every_layer_has_the_figures_that_it_has_alone(preset: str) -> None:
    net = mixed()
    monitors = [StabilityMonitor(net, preset, include=name) for name in ("", "first", "wide", "last")]
    for monitor in monitors:
        monitor.attach()
    for step in range(6):
        net.zero_grad()
        net(torch.randn(9, 4, generator=torch.Generator().manual_seed(step))).pow(3).mean().backward()
        for monitor in monitors:
            monitor.step(grad_scale=2.0)
    whole, *alone = (monitor.history() for monitor in monitors)
    assert monitors[0].layers == ("first", "wide", "last")
    for name, values in whole.items():
        for layer, own in enumerate(alone):
            torch.testing.assert_close(values[:, layer], own[name][:, 0], rtol=1e-6, atol=1e-9, equal_nan=True)
    for monitor in monitors:
        monitor.detach()


def test_memory_and_checkpoint_follow_the_sum_of_the_widths() -> None:
    def numbers(widths: list[int]) -> int:
        net = nn.Sequential(*map(nn.LayerNorm, widths))
        monitor = StabilityMonitor(net)
        monitor.attach()
        monitor.step()
        slabs = [part for slab in monitor._accumulators.slabs(torch.device("cpu")) for part in slab]
        monitor.detach()
        return sum(tensor.numel() for tensor in [*slabs, *tensors(monitor.state_dict()["past"])])

    assert numbers([64] * 40 + [65536]) < 1.01 * (numbers([64] * 40) + numbers([65536]))


def test_layers_of_like_width_share_a_band() -> None:
    assert cheapest_bands([768] * 25) == [(768, 768)]
    assert cheapest_bands([64, 64, 128, 256, 512]) == [(64, 512)]
    widths = [2**power for power in range(4, 17) for _ in range(8)]
    padded = sum(
        8 * sum(low <= 2**power <= high for power in range(4, 17)) * high for low, high in cheapest_bands(widths)
    )
    assert padded + bands.BAND_COSTS * len(cheapest_bands(widths)) <= 2 * sum(widths) + 13 * bands.BAND_COSTS


def test_resumed_it_goes_on_to_the_same_numbers_whatever_the_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mixed()
    with StabilityMonitor(whole, "full") as straight:
        run(whole, straight, range(12))
    net = mixed()
    with StabilityMonitor(net, "full") as first:
        run(net, first, range(7))
        state = stored(first.state_dict())
    monkeypatch.setattr(bands, "BAND_COSTS", 10**9)
    with StabilityMonitor(net, "full") as second:
        assert len(second._accumulators.bands) == 1
        second.load_state_dict(state)
        run(net, second, range(7, 12))
    for name, values in straight.history().items():
        torch.testing.assert_close(second.history()[name], values, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_a_padded_checkpoint_of_an_older_version_is_read() -> None:
    net = mixed()
    with StabilityMonitor(net, "full") as monitor:
        run(net, monitor, range(7))
        new = monitor.state_dict()
    old = {**new, "version": 2, "past": padded(new["past"], new["channels"])}
    with StabilityMonitor(net, "full") as again:
        again.load_state_dict(old)
        state = again.state_dict()
    assert set(state["past"]) == set(new["past"])
    for name, value in new["past"].items():
        torch.testing.assert_close(state["past"][name], value, rtol=0, atol=0, equal_nan=True)


def padded(past: dict[str, Tensor], channels: list[int]) -> dict[str, Tensor]:
    """Return a past as version 2 had it."""
    old = {}
    for name, value in past.items():
        if value.shape[1] == len(channels):
            old[name] = value[0] if len(value) == 1 else value.T
            continue
        rows = nn.utils.rnn.pad_sequence([part.T for part in value.split(channels, 1)]).permute(1, 2, 0)
        old[name] = rows[:, 0] if len(value) == 1 else rows.transpose(0, 1) if name == "window" else rows
    return old
