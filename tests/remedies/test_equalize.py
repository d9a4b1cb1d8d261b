"""`equalize_channels`: the outputs stay, the channels of a norm get one range, and the readers take the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabNormError, fold_gains
from stabnorm.remedies import equalize_channels, undo
from tests.remedies.family import check_autocast, check_copies, check_outputs, check_undo, largest, net, tokens

IDS = tokens(8, 6)


def with_outliers() -> Any:
    model = net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter[2] *= 60
    return model


def equalize(model: Any, **options: Any) -> Any:
    return equalize_channels(model, IDS, **options)


def ranges_of(model: Any, name: str) -> tuple[Tensor, Tensor]:
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2].detach().flatten(0, 1)))
    model.eval()(IDS)
    handle.remove()
    return seen[0].amin(0), seen[0].amax(0)


@pytest.mark.parametrize("shift", [False, True])
def test_the_outputs_stay_and_all_channels_have_one_range(shift: bool) -> None:
    """T21: equal outputs to 1e-5 (here 1e-6 of the largest); the spread of the channels becomes 1."""
    model = with_outliers().eval()
    before = model(IDS)
    report = equalize(model, shift=shift)
    assert largest(model(IDS), before) < 5e-6
    assert report.changed == [f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)] + ["norm"]
    for name in report.changed:
        low, high = ranges_of(model, name)
        size = high - low if shift else low.abs().maximum(high.abs())
        assert float(size.max() / size.min()) == pytest.approx(1, rel=1e-3)
        if shift:
            assert float(low.max() - low.min()) < 1e-3 * float(size.max())


def test_in_float64_it_is_exact() -> None:
    model = with_outliers().double().eval()
    before = model(IDS)
    equalize(model, shift=True)
    assert largest(model(IDS), before) < 1e-12


def test_one_scale_for_all_channels_loses_less() -> None:
    """What it is for: eight bits with one scale round the equalised outputs better."""

    def error(model: Any) -> float:
        y = ranges_and_values(model)
        step = float(y.abs().max()) / 127
        usual = (y / step).round() * step
        return float(((usual - y) / y.abs().amax(0)).square().mean())

    def ranges_and_values(model: Any) -> Tensor:
        seen = []
        handle = model.blocks[0].norm1.register_forward_hook(lambda *call: seen.append(call[2].detach().flatten(0, 1)))
        model.eval()(IDS)
        handle.remove()
        values: Tensor = seen[0]
        return values

    model = with_outliers()
    before = error(model)
    equalize(model)
    assert error(model) < before / 100


def test_what_holds_for_every_remedy() -> None:
    check_outputs(with_outliers, IDS, equalize)
    check_undo(with_outliers, equalize)
    check_undo(with_outliers, lambda model: equalize(model, shift=True))
    check_copies(with_outliers, IDS, equalize)
    check_autocast(with_outliers, IDS, equalize)


def test_a_checkpoint_of_the_equalised_model_loads_and_its_gains_still_fold() -> None:
    model, fresh = with_outliers().eval(), net().eval()
    equalize(model)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(IDS), model(IDS))
    assert largest(fold_gains(model, IDS).model(IDS), model(IDS)) < 1e-5


def test_your_own_scales_are_taken() -> None:
    model = with_outliers().eval()
    before, gain = model(IDS), model.norm.weight.detach().clone()
    r = torch.linspace(0.5, 2, 8)
    equalize(model, include="^norm", scales={"norm": r})
    torch.testing.assert_close(model.norm.weight.detach(), gain / r)
    assert largest(model(IDS), before) < 5e-6


def test_a_norm_that_something_else_reads_is_left_with_the_reason() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other, self.fc = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.other(x)) + self.norm(x)  # type: ignore[no-any-return]

    model, x = Both(), torch.randn(32, 8)
    report = equalize_channels(model, x)
    assert report.changed == ["other"]
    assert report.left["norm"]
    with pytest.raises(StabNormError, match="nothing to change"):
        equalize_channels(model, x, include="^norm")


def test_norms_with_one_reader_are_changed_together_and_a_new_bias_is_taken_back() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.cat([self.one(x[:, :4]), self.two(x[:, 4:])], -1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Two(), torch.randn(32, 8)
    before = model(x)
    report = equalize_channels(model, x, shift=True)
    assert report.changed == ["one", "two"]
    assert model.fc.bias is not None
    assert largest(model(x), before) < 5e-6
    undo(report)
    assert model.fc.bias is None
    assert torch.equal(model(x), before)


def test_wrong_arguments_are_refused_and_change_nothing() -> None:
    model = with_outliers()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"scales\['norm'\] must have shape \(8,\)"):
        equalize(model, scales={"norm": torch.zeros(8)})
    with pytest.raises(TypeError, match="no option 'nrom'"):
        equalize(model, scales={"nrom": torch.ones(8)})
    with pytest.raises(ValueError, match="does not run on the example"):
        equalize_channels(model, torch.randn(2, 3))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
