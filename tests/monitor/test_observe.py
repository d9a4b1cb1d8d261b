"""Looking must not stop, change or outlive what is looked at, whatever a model does with its norms."""

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, StabNormError, register_norm, valid_tokens
from stabnorm.nn import PRepBN


class ScaleFirst(nn.Module):
    """A norm whose input is not the first keyword of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(input=x)
        return out


class PairNorm(nn.Module):
    """Takes a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] * self.weight + pair[1]


register_norm(PairNorm, "rms", num_features=8, eps=1e-6, bias=None)


def tokens(monitor: StabilityMonitor) -> list[float]:
    values: list[float] = monitor.history()["tokens"][:, 0].tolist()
    return values


def test_a_compiled_model_may_be_given_itself() -> None:
    plain: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model: Any = torch.compile(plain, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with StabilityMonitor(model, ["amax"]) as monitor:
        model(torch.randn(5, 8))
        monitor.step()
        model.eval()
        model(torch.randn(7, 8))
        monitor.step()
    assert monitor.layers == ("1",)
    assert tokens(monitor) == [5, 0]


def test_a_compiled_and_an_eager_call_of_one_norm_both_count() -> None:
    norm = nn.LayerNorm(8)
    model = nn.Sequential(norm)
    torch._dynamo.reset()
    with StabilityMonitor(model, ["amax"]) as monitor:
        compiled = torch.compile(lambda x: norm(x), backend="eager")
        for _ in range(3):
            compiled(torch.full((4, 8), 100.0))
            norm(torch.randn(5, 8))
            monitor.step()
    assert tokens(monitor) == [9, 9, 9]
    assert monitor.history()["amax"][:, 0].tolist() == [100, 100, 100]


def test_an_input_given_by_keyword_is_found() -> None:
    model = ScaleFirst()
    with StabilityMonitor(model, ["amax"]) as monitor:
        model(torch.randn(5, 8))
        monitor.step()
    assert tokens(monitor) == [5]


def test_a_converted_norm_is_seen_under_every_name_its_input_has() -> None:
    norm = PRepBN(8)
    with StabilityMonitor(nn.Sequential(norm), ["amax"]) as monitor:
        norm(input=torch.randn(5, 8))
        norm(x=torch.randn(4, 8))
        monitor.step()
    assert tokens(monitor) == [9]


@pytest.mark.parametrize("preset", ["economy", "standard"])
def test_an_input_of_another_width_is_left_to_the_norm_and_named(preset: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.LayerNorm(4))
    with StabilityMonitor(model, preset, gradients=False) as monitor, caplog.at_level(logging.WARNING):
        with pytest.warns(UserWarning, match="input's size at dim=1 does not match num_features"):
            model(torch.randn(2, 5, 4, 4))
        monitor.step()
    assert monitor.history()["tokens"].tolist() == [[0, 40]]
    assert "norm 0 is not counted: its input has 5 channels and it was built for 3" in caplog.text


def test_torchs_own_error_for_a_wrong_width_comes_through() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model), pytest.raises(RuntimeError, match="normalized_shape"):
        model(torch.randn(2, 7))


def test_an_input_that_is_no_tensor_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(PairNorm())
    with StabilityMonitor(model, ["amax"]) as monitor, caplog.at_level(logging.WARNING):
        model((torch.randn(3, 8), torch.randn(3, 8)))
        monitor.step()
    assert tokens(monitor) == [0]
    assert "its input is tuple" in caplog.text


def test_torch_func_transforms_run_and_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["amax"]) as monitor, caplog.at_level(logging.WARNING):
        torch.func.vmap(model)(torch.randn(3, 5, 8))
        torch.func.grad(lambda x: model(x).square().mean())(torch.randn(5, 8))
        monitor.step()
    assert tokens(monitor) == [0]
    assert "torch.func" in caplog.text


def test_a_watched_model_can_be_copied_pickled_and_saved_and_the_copy_is_not_watched() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False))
    with StabilityMonitor(model, ["amax", "grad_gain"]) as monitor:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies: list[Any] = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ]
        for twin in copies:
            twin(torch.randn(5, 8)).backward(torch.randn(5, 8))
            assert torch.equal(twin[0].weight, model.state_dict()["0.weight"])
        monitor.step()
    assert tokens(monitor) == [0]


def test_a_gain_replaced_frozen_or_freed_in_the_middle_is_followed() -> None:
    norm = nn.LayerNorm(8)
    model = nn.Sequential(norm)
    with StabilityMonitor(model, ["grad_gain"]) as monitor:
        for change in range(4):
            if change == 1:
                norm.weight = nn.Parameter(torch.rand(8) + 0.5)
            if change == 2:
                norm.weight.requires_grad_(False)
            if change == 3:
                norm.weight.requires_grad_(True)
            monitor.discard()
            x, g = torch.randn(6, 8), torch.randn(6, 8)
            model.zero_grad()
            model(x.requires_grad_()).backward(g)
            monitor.step()
            n = nn.functional.layer_norm(x.detach().double(), (8,))
            expected = ((g * n).mean(0) * norm.weight.detach()).abs().mean()
            got = monitor.history()["grad_gain"][-1, 0].double()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_what_was_gathered_before_a_detach_is_forgotten_at_the_next_attach() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    monitor = StabilityMonitor(model, ["amax"])
    with monitor:
        model(torch.randn(4, 8))
    with monitor:
        model(torch.randn(3, 8))
        monitor.step()
    assert tokens(monitor) == [3]


def test_a_step_without_hooks_is_refused() -> None:
    monitor = StabilityMonitor(nn.Sequential(nn.LayerNorm(8)))
    with pytest.raises(StabNormError, match=r"whose hooks are off; use `with monitor:` or call attach\(\) first"):
        monitor.step()


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    with (
        StabilityMonitor(nn.Sequential(nn.LayerNorm(8))) as monitor,
        pytest.raises(ValueError, match=r"got a tensor of shape \(4,\); use loss.mean"),
    ):
        monitor.step(loss=torch.rand(4))


def test_a_model_in_eval_mode_is_told_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.LayerNorm(8)).eval()
    with StabilityMonitor(model, flush_every=2) as monitor, caplog.at_level(logging.WARNING):
        for _ in range(6):
            model(torch.randn(4, 8))
            monitor.step()
    assert caplog.text.count("no monitored norm ran in training mode in 2 steps") == 1


def test_reading_the_history_often_loses_nothing() -> None:
    model = nn.Sequential(*(nn.LayerNorm(8) for _ in range(50)))
    with StabilityMonitor(model, flush_every=5000) as monitor:
        for step in range(60):
            model(torch.randn(2, 8))
            monitor.step()
            assert len(monitor.history()["amax"]) == step + 1


def test_a_state_of_the_same_names_and_other_widths_starts_afresh(caplog: pytest.LogCaptureFixture) -> None:
    narrow, wide = (StabilityMonitor(nn.Sequential(nn.LayerNorm(width))) for width in (8, 16))
    with narrow:
        narrow.step()
    with caplog.at_level(logging.WARNING):
        wide.load_state_dict(narrow.state_dict())
    assert wide.steps_done == 1
    assert "baselines start afresh" in caplog.text


def test_a_finite_input_whose_variance_overflows_is_not_called_non_finite() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["amax"]) as monitor:
        model(1e25 * torch.randn(40, 8))
        monitor.step()
    monitor.flush()
    assert monitor.alerts == []


def test_top_channels_are_channels_that_exist() -> None:
    class Keep:
        blocks: list[Any] = []  # noqa: RUF012

        def write_block(self, block: Any) -> None:
            self.blocks.append(block)

        def write_event(self, *_: Any) -> None: ...

        def close(self) -> None: ...

    model = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(8)])
    with StabilityMonitor(model, ["amax"]) as monitor:
        monitor.records.append(Keep())
        model[0](torch.tensor([[1.0, -2.0]]))
        monitor.step()
    (block,) = Keep.blocks
    assert block.series["top_channel_ids"][0, 0].tolist()[:2] == [1, 0]
    assert torch.isnan(torch.from_numpy(block.series["top_channel_ids"])[0, 0, 2])


MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("mask", "shape", "valid"),
    [
        (MASK, (2, 3, 8), 3),
        (MASK[:, None, None], (2, 3, 8), 3),
        (MASK, (2, 3, 5, 8), 15),
        (MASK, (2, 5, 3, 8), 15),
        (MASK, (6, 8), 3),
        (MASK, (2, 8), 2),
        (MASK.T, (3, 2, 8), 3),
    ],
)
@pytest.mark.filterwarnings("ignore:no monitored layer has tokens")
def test_a_mask_fits_tokens_heads_in_either_order_and_flattened_tokens(
    mask: Tensor, shape: tuple[int, ...], valid: int
) -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["amax"]) as monitor:
        with valid_tokens(mask):
            model(torch.randn(shape))
        monitor.step()
    assert tokens(monitor) == [valid]


def test_a_transposed_mask_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model), valid_tokens(MASK), pytest.raises(ValueError, match="Give its transpose"):
        model(torch.randn(3, 2, 8))


def test_a_mask_that_no_layer_took_is_said_to_be_useless() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with (
        StabilityMonitor(model),
        pytest.warns(UserWarning, match=r"no monitored layer has tokens that a mask of shape \(2, 3\) fits"),
        valid_tokens(MASK),
    ):
        model(torch.randn(5, 8))


def test_eps_share_alone_is_measured_for_group_norms() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 8))
    with StabilityMonitor(model, ["eps_share"]) as monitor:
        model(1e-4 * torch.randn(4, 8, 5))
        monitor.step()
    assert monitor.history()["eps_share"].tolist() == [[1]]


def test_running_buffers_that_became_nan_are_not_hidden() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8))
    with StabilityMonitor(model, ["mean_discrepancy"]) as monitor:
        for step in range(4):
            model(torch.randn(16, 8) * (float("nan") if step == 1 else 1))
            monitor.step()
    assert torch.isnan(monitor.history()["mean_discrepancy"][2:]).all()
