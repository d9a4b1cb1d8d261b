"""Figures do not depend on torch's default dtype, the number of forwards, or what rounding leaves of zero."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor


def model_of() -> Any:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    norms = nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8), nn.BatchNorm1d(8)
    return nn.Sequential(nn.Embedding(20, 8), encoder, *norms[:2], nn.Flatten(0, 1), norms[2], nn.Linear(8, 20))


def everything(dtype: torch.dtype) -> dict[str, Tensor]:
    model, x = model_of(), torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    companions = ["attention", "embedding", "output", "switch", "weights"]
    torch.set_default_dtype(dtype)
    try:
        with StabilityMonitor(model, "full", companions=companions) as monitor:
            for _ in range(15):
                optimizer.zero_grad()
                loss = 1e7 * model(x).square().mean()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss, learning_rate=1e-3, grad_scale=2.0, optimizer=optimizer)
            state = monitor.state_dict()
            parts = [monitor.history(), *(track.history() for track in monitor.companions.values())]
    finally:
        torch.set_default_dtype(torch.float32)
    return {"rows": state["rows"], **{name: values for part in parts for name, values in part.items()}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_figures_are_the_same_under_another_default_dtype(dtype: torch.dtype) -> None:
    expected, found = everything(torch.float32), everything(dtype)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)


@pytest.mark.parametrize("preset", ["economy", "full"])
def test_figures_are_the_same_under_another_default_device(preset: str) -> None:
    histories = []
    for device in ("cpu", "meta"):
        model, x = model_of(), torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))
        with torch.device(device):
            monitor = StabilityMonitor(model, preset, flush_every=2, companions=["output", "weights"])
            monitor.attach()
            for _ in range(3):
                model(x).square().mean().backward()
                monitor.step()
            monitor.detach()
            histories.append(monitor.history())
    for name, values in histories[0].items():
        assert values.isfinite().any() or preset == "full", name
        assert torch.equal(histories[1][name].nan_to_num(-1), values.nan_to_num(-1)), name


@pytest.mark.parametrize("first_inside", [True, False])
def test_forwards_in_inference_mode_change_no_later_step(first_inside: bool) -> None:
    model, x = model_of(), torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))
    monitor = StabilityMonitor(model, "full", companions=["output", "weights"])
    for step in range(4):
        with torch.inference_mode(first_inside == (step % 2 == 0)):
            if not step:
                monitor.attach()
            loss = model(x).square().mean()
            if not loss.is_inference():
                loss.backward()
            monitor.step(loss=loss)
    monitor.detach()
    means, gradients = (monitor.history()[name] for name in ("token_std_mean", "grad_gain"))
    assert torch.equal(means, means[:1].expand(4, -1))
    assert gradients.isfinite().any(1).tolist() == [first_inside == (step % 2 == 1) for step in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_figures_of_thousands_of_forwards_are_those_of_one(mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    calls = 3000
    x = mean + torch.randn(calls, 2, 6, generator=generator) * torch.linspace(0.5, 2, calls)[:, None, None]
    model, histories = nn.Sequential(nn.LayerNorm(6)), []
    for parts in (calls, 1):
        with StabilityMonitor(model, "standard", gradients=False) as monitor:
            for part in x.view(parts, -1, 6):
                model(part)
            monitor.step()
        histories.append(monitor.history())
    exact = x.double().view(-1, 6)
    scale = exact.square().mean().sqrt()
    for name, value in {
        "token_mean_mean": exact.mean(),
        "token_std_mean": exact.std(-1, correction=0).mean(),
        "token_mean_max": exact.mean(-1).max(),
    }.items():
        for history in histories:
            assert abs(history[name].item() - value) / scale < 1e-6, name
    for name in histories[0]:
        torch.testing.assert_close(
            histories[0][name], histories[1][name], rtol=2e-6, atol=2e-6, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("jitter", [0.0, 1e-7])
def test_what_does_not_change_does_not_fluctuate(jitter: float) -> None:
    generator = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(32)), 7 * torch.randn(64, 32, generator=generator)
    with StabilityMonitor(model, "full") as monitor:
        for step in range(12):
            model(x * (1 + jitter * (step % 2))).square().mean().backward()
            model.zero_grad()
            monitor.step()
    history = monitor.history()
    for name in ("am_gm_ratio", "grad_fluctuation", "var_fluctuation", "absmax_fluctuation", "scale_jump"):
        assert history[name][4:].abs().max() < 0.1, name
    for name, values in history.items():
        assert not values.isinf().any(), name


@pytest.mark.parametrize("bias", [False, True])
def test_a_gradient_that_is_zero_but_for_rounding_does_not_fluctuate(bias: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(8, bias=bias))
    generator = torch.Generator().manual_seed(0)
    with StabilityMonitor(model) as monitor:
        for step in range(8):
            x = torch.randn(16, 8, generator=generator)
            (model(x) * (0.0 if step == 0 else 1.0)).mean().backward()
            model.zero_grad()
            monitor.step()
    values = monitor.history()["grad_fluctuation"]
    assert not values.isinf().any()


def test_a_burst_after_calm_steps_is_still_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32))
    with StabilityMonitor(model, ["am_gm_ratio"]) as monitor:
        for step in range(12):
            model(torch.randn(64, 32, generator=generator) * (30 if step == 10 else 1))
            monitor.step()
    values = monitor.history()["am_gm_ratio"][:, 0]
    assert values[10] > 1
    assert values[4:10].max() < 1
