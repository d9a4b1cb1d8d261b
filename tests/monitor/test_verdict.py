"""What is known of a step before the optimizer applies it."""

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor


class Wide(nn.Module):
    """Norms of very different widths, which are measured apart from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.last = nn.LayerNorm(8), nn.LayerNorm(9000), nn.RMSNorm(8)

    def forward(self, x: Tensor, at: int) -> Tensor:
        for number, norm in enumerate((self.first, self.wide, self.last)):
            width = 9000 if norm is self.wide else 8
            norm(torch.full((2, width), torch.nan if number == at else 1.0))
        return x.sum()


@pytest.mark.parametrize(("at", "name"), [(0, "first"), (1, "wide"), (2, "last"), (9, "")])
def test_the_layer_that_is_not_finite_is_named_whatever_its_width(at: int, name: str) -> None:
    model = Wide()
    with StabilityMonitor(model, ["amax"]) as monitor:
        model(torch.ones(1), at)
        verdict = monitor.verdict_before_step()
        assert (verdict.layer, verdict.bad, verdict.here) == (name, at < 3, at < 3)
        monitor.step()  # which the question has not changed
        assert monitor.history()["amax"].isfinite().sum() == (2 if at < 3 else 3)


def test_it_is_asked_of_all_micro_batches_and_forgotten_with_the_step() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["amax"]) as monitor:
        for value in (torch.inf, 1.0):
            model(torch.full((4, 8), value))
        assert monitor.verdict_before_step().layer == "0"
        monitor.step()
        model(torch.ones(4, 8))
        assert not monitor.verdict_before_step().bad
        assert monitor.verdict_before_step(loss=torch.nan).reason == (
            "the loss is not finite, and the input of each norm is"
        )


def test_a_gradient_is_looked_at_where_its_optimizer_is_given() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    optimizer = torch.optim.SGD(model.parameters())
    with StabilityMonitor(model, ["amax"]) as monitor:
        (model(torch.randn(4, 4)).sum() * torch.inf).backward()
        assert not monitor.verdict_before_step().bad
        assert monitor.verdict_before_step(optimizer).reason == (
            "gradients are not finite, and the input of each norm is"
        )
        optimizer.zero_grad()
        assert not monitor.verdict_before_step(optimizer).bad
