"""An attention that does not say how many heads it has: its forward shows them, or a warning names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from stabnorm import StabilityMonitor
from stabnorm.companions import AttentionCompanion
from stabnorm.dashboard.table import layers_worth_a_look
from stabnorm.monitor.record import FileRecord, read_record
from tests.processes import one_after_the_other, run_ranks

DIM = 12


class Silent(nn.Module):
    """Knows `dim`; the number of heads is a constant of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = DIM
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Saying(Silent):
    """The same with an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3


class Grouped(nn.Module):
    """Four heads of queries share two of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


class Flattened(nn.Module):
    """Hands over batch and heads as one axis, which shows no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        mixed: Tensor = F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, 3)).transpose(1, 2).flatten(2)
        return mixed


class Net(nn.Module):
    """A norm and attentions, of which each runs from a step on."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.norm, self.attentions = nn.LayerNorm(DIM), nn.ModuleList(attentions)
        self.running = len(attentions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for attention in self.attentions[: self.running]:
            x = x + attention(x)
        return x


def _with_heads(module: nn.Module, heads: int) -> nn.Module:
    setattr(module, "num_heads", heads)  # noqa: B010  # mypy knows no such attribute of a module
    return module


def net(*kinds: Callable[[], nn.Module]) -> Net:
    torch.manual_seed(3)
    return Net(*(kind() for kind in kinds))


def inputs(step: int, size: int = 4) -> Tensor:
    return torch.randn(size, 5, DIM, generator=torch.Generator().manual_seed(step))


def shares(monitor: StabilityMonitor) -> Tensor:
    return monitor.companions["attention"].history()["attention_entropy_share"]


def watched(model: Net, steps: int = 3, **options: Any) -> StabilityMonitor:
    with StabilityMonitor(model, companions=["attention"], **options) as monitor:
        for step in range(steps):
            model(inputs(step)).sum().backward()
            model(inputs(step + 100)).sum().backward()
            monitor.step()
    return monitor


def test_a_forward_shows_the_heads_and_counts_itself() -> None:
    silent, saying = watched(net(Silent)), watched(net(Saying))
    assert silent.companions["attention"].rows == tuple(f"attentions.0.head{i}" for i in range(3))
    for name, values in saying.companions["attention"].history().items():
        assert not values.isnan().any()
        assert torch.equal(silent.companions["attention"].history()[name], values)


def test_grouped_queries_have_a_row_for_each_head_of_the_queries() -> None:
    monitor = watched(net(Grouped))
    assert monitor.companions["attention"].rows == tuple(f"attentions.0.head{i}" for i in range(4))
    assert not shares(monitor).isnan().any()


def test_each_of_several_attentions_shows_its_own_and_rows_keep_the_order_of_the_model() -> None:
    monitor = watched(net(Silent, Saying, Grouped))
    assert monitor.companions["attention"].rows == tuple(
        f"attentions.{i}.head{head}" for i, heads in enumerate((3, 3, 4)) for head in range(heads)
    )
    assert torch.equal(shares(monitor), shares(watched(net(Saying, Saying, lambda: _with_heads(Grouped(), 4)))))


def test_two_calls_in_one_module_add_to_the_same_heads() -> None:
    class Twice(Silent):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(2 * x)

    assert torch.equal(shares(watched(net(Twice))), shares(watched(net(lambda: _with_heads(Twice(), 3)))))


def test_queries_that_are_flattened_into_the_batch_are_named_and_no_heads_guessed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = watched(net(Flattened, Saying))
    assert monitor.companions["attention"].rows == tuple(f"attentions.1.head{i}" for i in range(3))
    assert caplog.text.count("attention attentions.0 is not counted: it has no attribute num_heads") == 1
    assert caplog.text.count("cannot tell how many heads these attentions have") == 1
    assert "not watched: attentions.0 (Flattened). They have no" in caplog.text
    assert "Set num_heads on the module, or give AttentionCompanion(heads=...)" in caplog.text


def test_a_model_that_never_shows_a_head_has_an_empty_history_and_no_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = net(Flattened)
    with StabilityMonitor(model, flush_every=1, companions=["attention"]) as monitor:
        monitor.records.append(FileRecord(tmp_path))
        for step in range(40):  # long enough for the detector to learn
            model(inputs(step)).sum().backward()
            monitor.step()
    assert shares(monitor).shape == (40, 0)
    assert read_record(tmp_path).steps.tolist() == list(range(40))
    assert len(caplog.records) == 2, caplog.text  # both name the attention; no detector and no record has failed
    measured = {name: values.numpy() for name, values in monitor.companions["attention"].history().items()}
    assert layers_worth_a_look((), measured, [], thresholds={"attention_logit_max": (1.0, "")}) == []


@pytest.mark.parametrize("flush_every", [1, 2, 50])
def test_steps_before_the_first_forward_are_nan_in_history_and_record(tmp_path: Path, flush_every: int) -> None:
    def run(model: Net, folder: Path) -> StabilityMonitor:
        model.running = 1
        with StabilityMonitor(model, flush_every=flush_every, companions=["attention"]) as monitor:
            monitor.records.append(FileRecord(folder))
            for step in range(6):
                model.running = 1 if step < 3 else 2
                model(inputs(step)).sum().backward()
                monitor.step()
        monitor.records[0].close()
        return monitor

    late, known = run(net(Saying, Silent), tmp_path / "late"), run(net(Saying, Saying), tmp_path / "known")
    values = shares(late)
    assert values[:3, 3:].isnan().all()
    assert not values[3:].isnan().any()
    torch.testing.assert_close(values, shares(known), rtol=0, atol=0, equal_nan=True)
    record = read_record(tmp_path / "late", companion="attention")
    order = [record.layers.index(row) for row in late.companions["attention"].rows]
    written = torch.from_numpy(record.series["attention_entropy_share"])[:, order]
    torch.testing.assert_close(written, values, rtol=0, atol=0, equal_nan=True)
    states = [monitor.companions["attention"].detector.state_dict() for monitor in (late, known)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():  # a row that was known keeps its past
        torch.testing.assert_close(states[0][name], value, rtol=0, atol=0, equal_nan=True)


def test_a_forward_that_does_not_count_shows_nothing_and_a_discarded_one_only_the_heads() -> None:
    model = net(Silent)
    with StabilityMonitor(model, companions=["attention"]) as monitor:
        with monitor.paused():
            model(inputs(0))
        model.eval()(inputs(0))
        model.train()
        monitor.step()
        assert monitor.companions["attention"].rows == ()
        model(inputs(9))
        monitor.discard()
        assert shares(monitor).shape == (1, 3)
        model(inputs(1))
        monitor.step()
    values = shares(monitor)
    assert values[0].isnan().all()
    model = net(Saying)
    with StabilityMonitor(model, companions=["attention"]) as known:
        model(inputs(1))
        known.step()
    assert torch.equal(values[1:], shares(known))


@pytest.mark.parametrize("attached", [False, True])
def test_a_resumed_run_knows_the_heads_before_its_first_forward(
    attached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, whole = net(Silent, Saying), net(Silent, Saying)
    with StabilityMonitor(model, flush_every=2, companions=["attention"]) as first:
        for step in range(3):
            model(inputs(step)).sum().backward()
            first.step()
        state = first.state_dict()  # the third step is not flushed
    caplog.clear()
    resumed = StabilityMonitor(model, flush_every=2, companions=["attention"])
    if attached:
        resumed.attach()
    resumed.load_state_dict(state)
    assert resumed.companions["attention"].rows == tuple(f"attentions.{i}.head{j}" for i in (0, 1) for j in range(3))
    assert "afresh" not in caplog.text
    with resumed, StabilityMonitor(whole, companions=["attention"]) as unbroken:
        for step in range(6):
            whole(inputs(step)).sum().backward()
            unbroken.step()
            if step >= 3:
                model(inputs(step)).sum().backward()
                resumed.step()
    assert torch.equal(shares(resumed), shares(unbroken)[2:])
    continued, expected = (run.companions["attention"].detector.state_dict() for run in (resumed, unbroken))
    torch.testing.assert_close(continued["fast"]["seen"], expected["fast"]["seen"])


def test_heads_that_are_given_count_before_what_a_forward_shows() -> None:
    companion = AttentionCompanion(heads=3)
    monitor = StabilityMonitor(net(Flattened, Silent), companions=[companion])
    assert len(monitor.companions["attention"].rows) == 6


@pytest.mark.slow
def test_a_compiled_model_is_traced_once_more_and_counts_from_the_next_step() -> None:
    def run(model: Net, counter: Any) -> Tensor:
        torch.compiler.reset()
        with StabilityMonitor(model, companions=["attention"]) as monitor:
            compiled = torch.compile(model, backend=counter, fullgraph=True)
            for step in range(4):
                compiled(inputs(step)).sum().backward()
                monitor.step()
        return shares(monitor)

    counter = CompileCounterWithBackend("aot_eager")
    values, known = run(net(Silent, Grouped), counter), run(net(Saying, lambda: _with_heads(Grouped(), 4)), "aot_eager")
    assert counter.frame_count == 2
    assert values[0].isnan().all()
    torch.testing.assert_close(values[1:], known[1:])


def one_rank(rank: int, folder: Path) -> None:
    model = net(Silent, Silent)
    model.running = 1
    replicated = DistributedDataParallel(model, find_unused_parameters=True)
    with StabilityMonitor(replicated, flush_every=2, companions=["attention"]) as monitor:
        for step in range(5):
            model.running = 2 if step >= 1 + rank else 1  # the ranks see the second attention at different steps
            replicated(inputs(step)[2 * rank :][:2]).sum().backward()
            monitor.step()
    rows = monitor.companions["attention"].rows
    torch.save((rows, shares(monitor), monitor.history()["amax"]), f"{folder}/{rank}.pt")


@one_after_the_other
@pytest.mark.slow
def test_ranks_that_meet_an_attention_at_different_steps_stay_together(tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert ranks[0][0] == ranks[1][0] == tuple(f"attentions.{i}.head{j}" for i in (0, 1) for j in range(3))
    assert torch.equal(ranks[0][2], ranks[1][2])
    for rank, (_, values, _) in enumerate(ranks):
        assert values[: 1 + rank, 3:].isnan().all()
        assert not values[1 + rank :].isnan().any()
        assert not values[:, :3].isnan().any()
