"""Companions as a part of the monitor: by name, in its record, through its checkpoints and merges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabnorm import StabilityMonitor
from stabnorm.companions.attention import AttentionCompanion
from stabnorm.companions.names import companions_table, known_companions
from stabnorm.monitor.record import FileRecord, TensorBoardRecord, read_record
from tests.companions.nets import Fused, Text, batch, loss
from tests.versions import needs_quantiles_on_the_device

ALL = ("attention", "weights", "embedding", "output")


def figures(monitor: StabilityMonitor) -> dict[str, Tensor]:
    return {name: v for track in monitor.companions.values() for name, v in track.history().items()}


def train(model: nn.Module, optimizer: Any, monitor: StabilityMonitor, batches: list[Tensor]) -> None:
    for tokens in batches:
        optimizer.zero_grad()
        loss(model, tokens).backward()
        optimizer.step()
        monitor.step()


def test_unknown_companions_are_refused_with_the_nearest_name() -> None:
    for wrong, message in (
        (["atention"], "unknown companion 'atention'; did you mean 'attention'"),
        (["norms"], "unknown companion 'norms'.*known ones are attention, weights, embedding, output"),
        (["weights", "weights"], "companion 'weights' is given 2 times"),
    ):
        with pytest.raises(ValueError, match=message):
            StabilityMonitor(Text(), companions=wrong)
    refused = "a companion is a name or an object of class Companion, got 3; names: attention, "
    with pytest.raises(TypeError, match=refused):
        StabilityMonitor(Text(), companions=[3])  # type: ignore[list-item]


def test_every_measure_has_a_value_for_each_row_and_step() -> None:
    model = Text(Fused(), Fused())
    optimizer = torch.optim.AdamW(model.parameters())
    with StabilityMonitor(model, flush_every=4, companions=ALL) as monitor:
        train(model, optimizer, monitor, [batch() for _ in range(6)])
        assert list(monitor.companions) == list(ALL)
        for track in monitor.companions.values():
            assert track.history_steps().tolist() == list(range(6))
    for name, values in figures(monitor).items():
        assert not values.isnan().any(), name
    rows = {name: track.rows for name, track in monitor.companions.items()}
    assert rows["embedding"] == ("tokens.weight",)
    assert rows["attention"][3] == "attentions.1.head0"
    assert [len(values.shape) for values in figures(monitor).values()] == [2] * 17


def test_what_ran_between_steps_is_discarded() -> None:
    model = Text()
    with StabilityMonitor(model, companions=ALL) as monitor:
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        model(batch())
        monitor.discard()
        monitor.step()
    measured = figures(monitor)
    for name in ("attention_entropy", "attention_logit_max", "output_log_z", "update_ratio"):
        assert measured[name].isnan().all()


class NoReads(TorchDispatchMode):
    """Fails on whatever brings a value from the device to the host."""

    READS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero", "aten::nonzero"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().split(".")[0] not in self.READS, f"{func.name()} reads from the device"
        return func(*args, **(kwargs or {}))


class Idle(torch.optim.Optimizer):
    """Changes nothing, and so reads nothing; its learning rate is a tensor."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


@needs_quantiles_on_the_device
def test_no_value_is_read_from_the_device() -> None:
    model = Text(Fused(), Fused(written_out=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    idle = Idle(model.head.parameters(), {"lr": torch.tensor(0.5)})
    batches = [batch() for _ in range(5)]
    with StabilityMonitor(model, flush_every=50, companions=ALL) as monitor:
        with NoReads():  # type: ignore[no-untyped-call]
            train(model, optimizer, monitor, batches)
            idle.step()
            monitor.step()
        assert not figures(monitor)["attention_entropy"][:5].isnan().any()
        rates = figures(monitor)["effective_learning_rate"] * figures(monitor)["weight_norm"].square()
        torch.testing.assert_close(rates[:, -1], torch.tensor([0.01] * 5 + [0.5]))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped() -> None:
    batches = [batch() for _ in range(9)]

    def parts(split: int) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model = Text()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with StabilityMonitor(model, flush_every=4, companions=ALL) as monitor:
            train(model, optimizer, monitor, batches[:split])
            state = monitor.state_dict()
        if split == len(batches):
            return figures(monitor)
        torch.manual_seed(7)
        other = Text()
        other.load_state_dict(model.state_dict())
        again = torch.optim.AdamW(other.parameters(), lr=0.01)
        again.load_state_dict(optimizer.state_dict())
        resumed = StabilityMonitor(other, flush_every=4, companions=ALL)
        resumed.load_state_dict(state)
        with resumed:
            train(other, again, resumed, batches[split:])
        # The fifth step was not flushed when the state was taken.
        assert resumed.companions["weights"].history_steps().tolist() == list(range(split - 1, len(batches)))
        return figures(resumed)

    whole = parts(9)
    for name, values in parts(5).items():
        torch.testing.assert_close(values, whole[name][4:], rtol=1e-6, atol=1e-7, msg=name)


def test_state_is_plain_and_other_rows_start_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StabilityMonitor(Text(Fused(), Fused()), companions=ALL) as monitor:
        monitor.step()
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    caplog.clear()
    smaller = StabilityMonitor(Text(), companions=["attention", "output"])
    smaller.load_state_dict(state)
    assert "companion 'attention' watched other rows: it starts afresh" in caplog.text
    assert "'output'" not in caplog.text
    bare = StabilityMonitor(Text())
    bare.load_state_dict(state)
    state.pop("companions")  # of a version that had none
    smaller.load_state_dict(state)


@pytest.mark.parametrize("kind", ["files", "tensorboard"])
def test_a_record_keeps_companions_beside_the_norms(tmp_path: Path, kind: str) -> None:
    from torch.utils.tensorboard import SummaryWriter

    model = Text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer: Any = SummaryWriter(tmp_path) if kind == "tensorboard" else None
    with StabilityMonitor(model, flush_every=2, companions=ALL) as monitor:
        monitor.records.append(FileRecord(tmp_path) if writer is None else TensorBoardRecord(writer))
        train(model, optimizer, monitor, [batch() for _ in range(5)])
        monitor.flush()
        monitor.records[0].close()
    norms = read_record(tmp_path)
    assert norms.layers == monitor.layers
    assert norms.steps.tolist() == list(range(5))
    assert not set(norms.series) & set(figures(monitor))
    for name, track in monitor.companions.items():
        record = read_record(tmp_path, companion=name)
        assert record.layers == track.rows
        assert set(record.series) == set(track.history())
        for measure, values in track.history().items():
            torch.testing.assert_close(torch.from_numpy(record.series[measure]), values, equal_nan=True)
    assert read_record(tmp_path, ["update_ratio"], "weights").series.keys() == {"update_ratio"}
    if writer is not None:
        writer.close()


def test_history_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stabnorm.monitor.track._HISTORY_BYTES", 100)
    model = Text()
    with StabilityMonitor(model, flush_every=2, companions=[AttentionCompanion()]) as monitor:
        for _ in range(9):
            model(batch())
            monitor.step()
    assert monitor.companions["attention"].history_steps().tolist() == [7, 8]


def test_the_cost_of_companions_is_in_the_monitors() -> None:
    model = Text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StabilityMonitor(model, companions=ALL) as monitor:
        train(model, optimizer, monitor, [batch() for _ in range(4)])
    assert 0 < monitor.companions.hook_seconds < monitor.companions.seconds < monitor.seconds
    assert monitor.cost.hooks > 0


def test_sums_of_two_processes_merge() -> None:
    torch.manual_seed(1)
    model, tokens = Text(), batch(6)

    def sums(part: Tensor, name: str) -> Any:
        with StabilityMonitor(model, companions=[name]) as monitor:
            model(part)
            return monitor.companions[name].watch.take()

    for name in ("attention", "output"):
        together, (a, b) = sums(tokens, name), (sums(part, name) for part in tokens.split(3))
        for merged, whole in zip(a.merge(b), together, strict=True):
            torch.testing.assert_close(merged, whole, rtol=1e-6, atol=1e-6)


def test_the_documentation_shows_the_companions_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert companions_table() in page


@pytest.mark.parametrize("name", sorted(known_companions()))
def test_a_companion_is_settings_that_can_be_copied_and_compared(name: str) -> None:
    import copy
    import pickle

    companion = known_companions()[name]()
    assert companion == copy.deepcopy(companion) == pickle.loads(pickle.dumps(companion))
    assert repr(companion).startswith(type(companion).__name__)
