"""What "full" gathers counts once, changes nothing, survives a resume, and costs the other presets nothing."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabnorm import StabilityMonitor, valid_tokens
from stabnorm.examples.digits import DigitsViT, augment, digits_loaders
from stabnorm.monitor import observe
from stabnorm.monitor.statistics import PRESETS
from stabnorm.nn import PRepBN
from stabnorm.ops.dispatch import use_kernels
from tests.monitor.test_monitor import Net, NoReads, train


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.RMSNorm(8))


def figures(monitor: StabilityMonitor) -> dict[str, Tensor]:
    return monitor.history() | monitor.companions["switch"].history()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        scale = max(1.0, float(values.nan_to_num(0).abs().max()))
        assert values.isnan().equal(b[name].isnan()), name
        assert (values - b[name]).nan_to_num(0).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_history(reentrant: bool) -> None:
    def history(wrapped: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = block()
        with StabilityMonitor(model, "full", companions=["switch"]) as monitor:
            for _ in range(12):
                x = torch.randn(5, 8, requires_grad=True)
                y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
                y.backward(torch.randn(5, 8))
                monitor.step()
        return figures(monitor)

    assert_same(history(False), history(True))


def test_compiled_with_hooks_on_it_is_one_graph_and_the_same_history() -> None:
    from torch._dynamo.testing import CompileCounter

    def histories(compiled: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(3)
        model, counter = block(), CompileCounter()
        torch._dynamo.reset()
        optimizer = torch.optim.Adam(model.parameters())
        with StabilityMonitor(model, "full", companions=["switch"]) as monitor:
            run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
            for _ in range(20):
                optimizer.zero_grad()
                run(3 * torch.randn(5, 4, 8)).backward(torch.randn(5, 4, 8))
                optimizer.step()
                monitor.step(optimizer=optimizer)
        return figures(monitor), counter.frame_count

    eager, _ = histories(False)
    graph, frames = histories(True)
    assert frames == 1
    assert_same(eager, graph)


def test_watching_changes_no_bit_of_losses_weights_and_random_state() -> None:
    bare, watched = Net(), Net()
    watched.load_state_dict(bare.state_dict())
    losses, _ = train(bare)
    state = torch.get_rng_state()
    watched_losses, history = train(watched, monitor=True, preset="full")
    assert all(torch.equal(a, b) for a, b in zip(losses, watched_losses, strict=True))
    for a, b in zip(bare.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert set(history) == {*PRESETS["full"], "tokens"}


def test_twenty_monitored_steps_read_nothing_back() -> None:
    model = nn.ModuleDict({"net": Net(), "switched": PRepBN(4)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mask = torch.rand(8, 6) < 0.8
    with StabilityMonitor(model, "full", flush_every=50, companions=["switch"]) as monitor:
        for _ in range(20):
            x = torch.randn(8, 6, 4)
            # A CPU's own body of PRepBN reads lam, which is in the host's memory there.
            with valid_tokens(mask), use_kernels("reference"), NoReads():  # type: ignore[no-untyped-call]
                loss = model["net"](model["switched"](x)).square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()  # which reads its own step counters
            with NoReads():  # type: ignore[no-untyped-call]
                monitor.step(loss=loss, optimizer=optimizer)
        history = figures(monitor)
        assert history["switch_gap"][::4, -1].isfinite().all()
        assert history["adam_staleness"][:, :2].isfinite().all()


def test_saved_loaded_into_a_new_monitor_and_continued_it_gives_the_same_history() -> None:
    def part(monitor: StabilityMonitor, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        with monitor:
            for step in steps:
                torch.manual_seed(step)
                optimizer.zero_grad()
                model(torch.randn(8, 6, 4)).square().mean().backward()
                optimizer.step()
                monitor.step(optimizer=optimizer)

    torch.manual_seed(0)
    model = Net().train()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, twin)]
    whole, first, second = (
        StabilityMonitor(m, "full", flush_every=4, companions=["switch"]) for m in (model, twin, twin)
    )
    part(whole, model, optimizers[0], range(27))
    part(first, twin, optimizers[1], range(14))
    second.load_state_dict(first.state_dict())
    part(second, twin, optimizers[1], range(14, 27))
    assert_same({name: values[14:] for name, values in figures(whole).items()}, figures(second))
    assert whole.history()["bias_drift"].nan_to_num(0).max() > 0


def test_a_checkpoint_of_standard_loads_into_standard_as_before() -> None:
    with StabilityMonitor(nn.Sequential(nn.LayerNorm(8)), gradients=False) as monitor:
        monitor.step()
    assert "gradient_size" not in monitor.state_dict()["past"]


@pytest.mark.parametrize("preset", ["economy", "standard"])
def test_the_cheaper_presets_gather_and_compute_what_they_did(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, full = train(Net(), monitor=True, preset="full")
    torch.manual_seed(0)

    def refuse(*_: Any) -> None:
        raise AssertionError("a detail op ran")

    monkeypatch.setattr(observe, "accumulate_detail_", refuse)
    monkeypatch.setattr(observe, "count_outliers_", refuse)
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    _, cheap = train(models[0], monitor=True, preset=preset)
    monkeypatch.undo()
    _, full = train(models[1], monitor=True, preset="full")
    assert tuple(cheap) == (*PRESETS[preset], "tokens")
    for name, values in cheap.items():
        torch.testing.assert_close(values, full[name], rtol=0, atol=0, equal_nan=True)


def test_padding_never_counts_in_any_statistic() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), PRepBN(8), nn.LayerNorm(8))
    x, mask = 4 * torch.randn(4, 6, 8), torch.rand(4, 6) < 0.5
    mask[:, 0] = True
    histories = []
    for padding in (1e9, -3.0, torch.nan):
        with StabilityMonitor(model, "full", gradients=False) as monitor:
            for step in range(3):
                with valid_tokens(mask):
                    model(torch.where(mask[..., None], x * (1 + step), padding))
                monitor.step()
        histories.append(monitor.history())
    assert_same(histories[0], histories[1])
    assert_same(histories[0], histories[2])
    with StabilityMonitor(model, "full", gradients=False) as monitor:
        for step in range(3):  # packed: the same tokens with no sequences, which only that one statistic knows of
            model((x * (1 + step))[mask])
            monitor.step()
    packed = monitor.history()
    del histories[0]["effective_samples"], packed["effective_samples"]
    assert_same(histories[0], packed)


def test_one_row_an_empty_batch_and_a_step_of_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, "full") as monitor:
        model(torch.randn(1, 8)).backward(torch.randn(1, 8))
        monitor.step()
        model(torch.randn(0, 8))
        monitor.step()
        monitor.step()
    history = monitor.history()
    assert history["tokens"][:, 0].tolist() == [1, 0, 0]
    assert torch.isnan(history["effective_samples"]).all()  # one token has no certainty
    assert all(torch.isnan(values[1:]).all() for name, values in history.items() if name != "tokens")
    assert history["token_kurtosis"][0, 0] > 1


def test_a_non_finite_step_spoils_only_itself() -> None:
    def history(poisoned: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))
        with StabilityMonitor(model, "full") as monitor:
            for step in range(16):
                x = torch.randn(4, 8)
                if step == 12 and poisoned:
                    model(torch.full((4, 8), torch.nan)).square().mean().backward()
                    monitor.step()
                    model.zero_grad()
                model(x).square().mean().backward()
                monitor.step()
                model.zero_grad()
        return monitor.history()

    clean, spoilt = history(False), history(True)
    rest = [step for step in range(17) if step != 12]
    assert_same(clean, {name: values[rest] for name, values in spoilt.items()})
    assert spoilt["nonfinite_count"][12, 0] == 32


@pytest.mark.slow
def test_a_healthy_training_raises_no_alert() -> None:
    torch.manual_seed(0)
    model = DigitsViT(dim=24, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = itertools.cycle(digits_loaders()[0])
    with StabilityMonitor(model, "full") as monitor:
        for step in range(120):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1, (step + 1) / 30)
            images, digits = next(batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(augment(images)), digits).backward()
            optimizer.step()
            monitor.step(optimizer=optimizer)
    history = monitor.history()
    assert monitor.alerts == []
    assert history["new_outlier_share"][1:].max() < 0.2
    assert history["massive_activation"].max() < 0.1
    assert history["headroom"].min() > 100
    assert history["adam_staleness"].nanmedian() < 2.3
    assert history["gradient_to_eps"].min() > 10


def test_forwards_in_eval_mode_and_discarded_ones_do_not_count() -> None:
    model = nn.Sequential(nn.LayerNorm(8), PRepBN(8))
    statistics = ["nonfinite_count", "outlier_dims", "max_to_median"]
    with StabilityMonitor(model, statistics, companions=["switch"]) as monitor:
        model(torch.full((4, 8), torch.nan))
        monitor.discard()
        model.eval()(torch.full((4, 8), torch.nan))
        model.train()(torch.randn(4, 8))
        monitor.step()
    history = figures(monitor)
    assert history["tokens"].tolist() == [[4, 4]]
    assert history["nonfinite_count"].tolist() == [[0, 0]]
    assert history["max_to_median"].isfinite().all()
    assert history["switch_gap"][0, 1].isfinite()


def test_a_norm_whose_output_is_no_tensor_has_no_outliers_and_runs() -> None:
    class Pair(nn.LayerNorm):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    from stabnorm import register_norm

    register_norm(Pair, "layer", num_features="normalized_shape")
    model = nn.Sequential(Pair(8))
    with StabilityMonitor(model, "full", gradients=False) as monitor:
        model(torch.randn(4, 8))
        monitor.step()
    assert torch.isnan(monitor.history()["outlier_dims"]).all()
    assert monitor.history()["max_to_median"].isfinite().all()
