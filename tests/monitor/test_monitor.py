"""The monitor in a plain loop: it changes nothing, reads nothing back, and counts every training forward once."""

import copy
import logging
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import stabnorm
from stabnorm import StabilityMonitor, valid_tokens
from stabnorm.monitor.record import Block
from stabnorm.ops import use_kernels
from tests.watchers import watchers


class Net(nn.Module):
    """Two transformer-like blocks with dropout, an in-place activation, and a norm that is used twice."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.RMSNorm(dim)
        self.frozen = nn.LayerNorm(dim, elementwise_affine=False)
        self.mix, self.mlp, self.drop = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Dropout(0.2)
        self.act = nn.ReLU(inplace=True)
        self.head_norm, self.head = nn.BatchNorm1d(dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.drop(self.mix(self.norm1(h)))
        h = h + self.mlp(self.act(self.frozen(h)))
        h = self.norm2(h) + self.norm2(2 * h)
        out: Tensor = self.head(self.head_norm(h.mean(1)))
        return out


def train(
    model: nn.Module, steps: int = 12, *, monitor: bool = False, **options: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch = StabilityMonitor(model, flush_every=5, **options) if monitor else None
    losses = []
    if watch is not None:
        watch.attach()
    for _ in range(steps):
        x, y = torch.randn(8, 6, 4), torch.randint(3, (8,))
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if watch is not None:
            watch.step(loss=loss)
    if watch is None:
        return losses, {}
    watch.detach()
    return losses, watch.history()


def test_watching_changes_no_bit_of_losses_weights_and_random_state() -> None:
    bare, watched = Net(), Net()
    watched.load_state_dict(bare.state_dict())
    losses, _ = train(bare)
    state = torch.get_rng_state()
    watched_losses, history = train(watched, monitor=True)
    assert all(torch.equal(a, b) for a, b in zip(losses, watched_losses, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(bare.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert history["amax"].shape == (12, 4)


class NoReads(TorchDispatchMode):
    """Fails on whatever brings a value from the device to the host."""

    READS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero", "aten::nonzero"})

    seen: ClassVar[set[str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        self.seen.add(name)
        assert name not in self.READS, f"{name} reads from the device"
        return func(*args, **(kwargs or {}))


def test_twenty_monitored_steps_read_nothing_back() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    mask = torch.rand(8, 6) < 0.8
    with use_kernels("aten"), StabilityMonitor(model, flush_every=50) as monitor:
        with NoReads(), valid_tokens(mask):  # type: ignore[no-untyped-call]
            for _ in range(20):
                loss = model(torch.randn(8, 6, 4)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss, grad_scale=torch.tensor(2.0))
        assert "aten::batch_norm_update_stats" in NoReads.seen  # the hooks ran under the mode
        assert monitor.history()["amax"].shape[0] == 20


def test_forwards_in_eval_mode_do_not_count() -> None:
    model = Net()
    with StabilityMonitor(model) as monitor:
        for _ in range(3):
            model.train()
            model(torch.randn(8, 6, 4)).square().mean().backward()
            model.eval()
            model(1e6 * torch.randn(8, 6, 4))
            monitor.step()
    assert monitor.history()["amax"].max() < 1e3
    assert monitor.history()["tokens"].tolist() == [[48, 96, 48, 8]] * 3


def test_a_norm_called_twice_counts_both_calls() -> None:
    model = Net()
    with StabilityMonitor(model) as monitor:
        model(torch.randn(8, 6, 4))
        monitor.step()
    tokens = dict(zip(monitor.layers, monitor.history()["tokens"][0].tolist(), strict=True))
    assert tokens == {"norm1": 48, "norm2": 96, "frozen": 48, "head_norm": 8}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_history(reentrant: bool) -> None:
    def histories(wrapped: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.RMSNorm(8))
        with StabilityMonitor(block) as monitor:
            for _ in range(4):
                x = torch.randn(5, 8, requires_grad=True)
                y = checkpoint(block, x, use_reentrant=reentrant) if wrapped else block(x)
                y.backward(torch.randn(5, 8))
                monitor.step()
        return monitor.history()

    plain, wrapped = histories(False), histories(True)
    for name in plain:
        torch.testing.assert_close(plain[name], wrapped[name], rtol=0, atol=1e-6, equal_nan=True)


def test_compiled_with_hooks_on_it_is_one_graph_and_the_same_history() -> None:
    from torch._dynamo.testing import CompileCounter

    def histories(compiled: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.RMSNorm(8))
        counter = CompileCounter()
        torch._dynamo.reset()
        with StabilityMonitor(model) as monitor:
            run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
            for _ in range(20):
                run(torch.randn(5, 8)).backward(torch.randn(5, 8))
                monitor.step()
        return monitor.history(), counter.frame_count

    eager, _ = histories(False)
    graph, frames = histories(True)
    assert frames == 1
    for name in eager:
        torch.testing.assert_close(eager[name], graph[name], rtol=0, atol=1e-6, equal_nan=True)


def test_a_spike_between_two_flushes_is_kept() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["amax"], flush_every=50, gradients=False) as monitor:
        for step in range(120):
            model(torch.randn(10, 8) * (1000 if step == 77 else 1))
            monitor.step()
    amax = monitor.history()["amax"][:, 0]
    assert amax.shape == (120,)
    assert int(amax.argmax()) == 77
    assert monitor.history_steps().tolist() == list(range(120))


def test_history_is_bounded_in_memory_and_says_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stabnorm.monitor.track._HISTORY_BYTES", 4 * (1 + 2 + 6) * 10 * 3)  # three flushes of ten
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["amax"], flush_every=10) as monitor:
        for _ in range(100):
            model(torch.randn(2, 8))
            monitor.step()
        assert monitor.history()["amax"].shape == (30, 1)
        assert monitor.history_steps().tolist() == list(range(70, 100))


def test_history_before_any_step_is_empty() -> None:
    with StabilityMonitor(nn.Sequential(nn.LayerNorm(8))) as monitor:
        assert monitor.history()["amax"].shape == (0, 1)


def test_history_is_nan_where_a_layer_did_not_run() -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(8), "b": nn.LayerNorm(8)})
    with StabilityMonitor(model) as monitor:
        for step in range(4):
            model["a"](torch.randn(4, 8))
            if step % 2:
                model["b"](torch.randn(4, 8))
            monitor.step()
    history = monitor.history()
    assert torch.isnan(history["token_std_mean"][:, 1]).tolist() == [True, False, True, False]
    assert history["tokens"][:, 1].tolist() == [0, 4, 0, 4]


def test_a_non_finite_batch_enters_no_baseline() -> None:
    def past(poisoned: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))
        with StabilityMonitor(model) as monitor:
            for step in range(6):
                x = torch.randn(4, 8)
                if step == 3 and poisoned:
                    model(torch.full((4, 8), torch.nan)).square().mean().backward()
                    monitor.step()
                    model.zero_grad()
                model(x).square().mean().backward()
                monitor.step()
                model.zero_grad()
        assert [a.statistic for a in monitor.alerts] == (["nonfinite"] if poisoned else [])
        state: dict[str, Tensor] = monitor.state_dict()["past"]
        return state

    for clean, after in zip(past(False).values(), past(True).values(), strict=True):
        assert torch.equal(clean.nan_to_num(-1), after.nan_to_num(-1))


def test_the_loss_scale_is_divided_out_of_the_gradients() -> None:
    def gains(scale: float) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(8))
        with StabilityMonitor(model, ["grad_gain", "grad_shift"]) as monitor:
            model(torch.randn(6, 8)).backward(scale * torch.randn(6, 8))
            monitor.step(grad_scale=torch.tensor(scale))
        return torch.stack(list(monitor.history().values()))

    torch.testing.assert_close(gains(1.0), gains(65536.0), rtol=1e-6, atol=0)


def test_an_activation_in_place_behind_a_norm_without_gain_still_trains_and_is_seen() -> None:
    model = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.ReLU(inplace=True), nn.Linear(8, 3))
    x, g = torch.randn(7, 8), torch.randn(7, 3)
    with StabilityMonitor(model, ["grad_gain"]) as monitor:
        leaf = x.clone().requires_grad_()
        model(leaf).backward(g)
        monitor.step()
    n = nn.functional.layer_norm(x.double(), (8,)).requires_grad_()
    (gz,) = torch.autograd.grad(model[2].double()(n.relu()), n, g.double())
    expected = (gz * n).mean(0).abs().mean()
    torch.testing.assert_close(monitor.history()["grad_gain"][0, 0].double(), expected.detach(), rtol=1e-5, atol=0)


def test_no_hook_is_left_behind_not_even_by_an_exception() -> None:
    model = Net()
    with StabilityMonitor(model):
        assert watchers(model) > 0
    assert watchers(model) == 0
    with pytest.raises(RuntimeError), StabilityMonitor(model):
        model(torch.randn(1, 2, 3))
    assert watchers(model) == 0


def test_attaching_twice_counts_once() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["amax"]) as monitor:
        monitor.attach()
        model(torch.randn(5, 8))
        monitor.step()
    assert monitor.history()["tokens"].tolist() == [[5]]


def test_discarded_forwards_do_not_count() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["amax", "token_std_max"]) as monitor:
        model(1e6 * torch.randn(5, 8))
        monitor.discard()
        model(torch.ones(3, 8))
        monitor.step()
    assert monitor.history()["tokens"].tolist() == [[3]]
    assert monitor.history()["amax"].tolist() == [[1]]
    assert monitor.history()["token_std_max"].tolist() == [[0]]


class Memory:
    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.events: list[tuple[str, int]] = []

    def write_block(self, block: Block) -> None:
        self.blocks.append(block)

    def write_event(self, kind: str, step: int, data: object) -> None:
        self.events.append((kind, step))

    def close(self) -> None: ...


def test_the_record_gets_every_step_once_with_loss_and_top_channels(caplog: pytest.LogCaptureFixture) -> None:
    model, record = nn.Sequential(nn.LayerNorm(8)), Memory()
    monitor = StabilityMonitor(model, ["amax"], flush_every=10)
    monitor.records.append(record)
    with monitor, caplog.at_level(logging.WARNING, logger="stabnorm"):
        for step in range(25):
            x = torch.rand(4, 8)
            x[2, 5], x[0, 1] = 9.0, (-7.0 if step != 13 else torch.inf)
            model(x)
            monitor.step(loss=torch.tensor(float(step)), learning_rate=0.1)
    assert [(b.first_step, b.num_steps) for b in record.blocks] == [(0, 10), (10, 10), (20, 5)]
    assert record.blocks[2].series["loss"].tolist() == [20, 21, 22, 23, 24]
    assert record.blocks[0].series["top_channel_ids"][0, 0, :2].tolist() == [5, 1]
    assert record.blocks[0].series["top_channel_values"][0, 0, :2].tolist() == [9, 7]
    assert record.events == [("alert", 13), ("onset", 13)]
    assert "step 13, 0: nonfinite" in caplog.text


def test_saved_loaded_into_a_new_monitor_and_continued_it_gives_the_same_history() -> None:
    def part(monitor: StabilityMonitor, model: nn.Module, steps: range) -> None:
        with monitor:
            for step in steps:
                torch.manual_seed(step)
                model.zero_grad()
                model(torch.randn(8, 6, 4)).square().mean().backward()
                monitor.step()

    torch.manual_seed(0)
    model = Net().train()
    twin = copy.deepcopy(model)
    whole = StabilityMonitor(model, flush_every=4)
    part(whole, model, range(18))
    first = StabilityMonitor(twin, flush_every=4)
    part(first, twin, range(7))
    saved = first.state_dict()
    second = StabilityMonitor(twin, flush_every=4)
    second.load_state_dict(torch.load(_stored(saved), weights_only=True))
    part(second, twin, range(7, 18))
    assert second.history_steps().tolist() == list(range(7, 18))
    for name, values in whole.history().items():
        torch.testing.assert_close(values[7:], second.history()[name], rtol=1e-6, atol=1e-7, equal_nan=True)


def _stored(state: dict[str, Any]) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_state_of_another_model_keeps_the_step_and_starts_baselines_afresh(caplog: pytest.LogCaptureFixture) -> None:
    with StabilityMonitor(nn.Sequential(nn.LayerNorm(4))) as monitor:
        monitor.step()
    other = StabilityMonitor(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)))
    with caplog.at_level(logging.WARNING, logger="stabnorm"):
        other.load_state_dict(monitor.state_dict())
    assert other.steps_done == 1
    assert "baselines start afresh" in caplog.text


def test_include_and_exclude_choose_layers() -> None:
    model = Net()
    assert StabilityMonitor(model, include="norm[12]").layers == ("norm1", "norm2")
    assert "head_norm" not in StabilityMonitor(model, exclude=["head"]).layers


def test_errors_come_before_training_and_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no normalization layer found in Linear: .*register_norm"):
        StabilityMonitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no normalization layer found in Net with include='nothing'"):
        StabilityMonitor(Net(), include="nothing")
    with pytest.raises(ValueError, match=r"flush_every=0 is out of range. Give a whole number of 1 or more"):
        StabilityMonitor(Net(), flush_every=0)
    with pytest.raises(ValueError, match="did you mean 'affine_residual'"):
        StabilityMonitor(Net(), ["affine_residuum"])
    with pytest.raises(ValueError, match="holds gradient statistics only"):
        StabilityMonitor(Net(), ["grad_gain"], gradients=False)


def test_the_package_offers_what_it_promises() -> None:
    assert stabnorm.StabilityMonitor is StabilityMonitor
