"""The short way of a hook, for an input like the one before, gives what the formulas give, whatever changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stabnorm
from stabnorm import StabilityMonitor
from stabnorm.ops.dispatch import use_kernels


class Net(nn.Module):
    """Two norms around a layer; the input of the first one is the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.second = nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.linear(x) + self.first(x))
        return out


def plain(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


def masked(model: nn.Module, x: Tensor) -> Tensor:
    with stabnorm.valid_tokens(torch.arange(x.shape[1]).expand(x.shape[:2]) < 2):
        return plain(model, x)


def by_keyword(model: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(model, Net)
    return plain(model.second, model.linear(x) + model.first(input=x))


def in_eval(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    out = plain(model, x)
    model.train()
    return out


def under_vmap(model: nn.Module, x: Tensor) -> Tensor:
    torch.func.vmap(model)(x)
    return plain(model, x)


def recomputed(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(model, x, use_reentrant=False)
    return out


CHANGES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "nothing": plain,
    "another length": lambda model, x: plain(model, x[:, :2]),
    "the same tokens in other axes": lambda model, x: plain(model, x.reshape(2, 2, 3, 6)),
    "no tokens": lambda model, x: plain(model, x[:0]),
    "another memory layout": lambda model, x: plain(model, x.transpose(0, 1).contiguous().transpose(0, 1)),
    "float64 beside it": lambda model, x: plain(model, x.double().float()),
    "a mask": masked,
    "by keyword": by_keyword,
    "eval mode": in_eval,
    "a vmap": under_vmap,
    "a recompute": recomputed,
    "a subclass of tensors": lambda model, x: plain(model, x.as_subclass(Other)).as_subclass(Tensor),
}


class Other(Tensor):
    """A subclass that does nothing."""


def histories(change: Callable[[nn.Module, Tensor], Tensor], kernels: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model, batch = Net(), torch.randn(4, 3, 6)
    with use_kernels(kernels), StabilityMonitor(model) as monitor:
        for step in range(6):
            for micro in range(1 + step % 2):
                x = batch * (1 + step + micro)
                out = (change if step in (2, 3) else plain)(model, x)
                out.square().sum().backward()
            monitor.step()
            model.zero_grad()
        return monitor.history()


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_forwards_is_seen(change: str) -> None:
    got, want = (histories(CHANGES[change], kernels) for kernels in ("cpp", "reference"))
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


def test_another_setting_of_kernels_is_followed_at_once() -> None:
    x, model = torch.randn(4, 3, 6), Net()
    with StabilityMonitor(model) as monitor:
        for kernels in ("cpp", "reference", "cpp", "aten"):
            with use_kernels(kernels):
                for _ in range(2):
                    model(x)
                monitor.step()
        values = monitor.history()
    assert values["tokens"].unique().tolist() == [24]
    torch.testing.assert_close(values["token_std_mean"], values["token_std_mean"][:1].expand(4, 2))


def test_a_model_that_changes_its_dtype_is_followed() -> None:
    x, model = torch.randn(4, 3, 6), Net()
    with StabilityMonitor(model, gradients=False) as monitor:
        for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float64):
            model.to(dtype)
            for _ in range(2):
                model(x.to(dtype))
            monitor.step()
        values = monitor.history()
    assert values["tokens"].unique().tolist() == [24]
    torch.testing.assert_close(
        values["token_std_mean"][:, 0], values["token_std_mean"][:1, 0].expand(4), rtol=1e-2, atol=0
    )


def test_a_gain_that_becomes_computed_is_read_as_the_module_reads_it() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 6)
    nn.init.constant_(model.first.weight, 2.0)
    with StabilityMonitor(model) as monitor:
        for _ in range(2):
            model(x).square().sum().backward()
            monitor.step()
            model.zero_grad()
        nn.utils.parametrize.register_parametrization(model.first, "weight", nn.Identity())
        for _ in range(2):
            model(x).square().sum().backward()
            monitor.step()
            model.zero_grad()
        values = monitor.history()["grad_gain"]
    torch.testing.assert_close(values, values[:1].expand(4, 2), rtol=1e-5, atol=0)
