"""Two processes whose data have means of 3 and -3 are one process with the whole batch; and so are more."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stabnorm import StabilityMonitor, StabNormError
from stabnorm.functional import RawMoments, empty_moments, merge_moments_, raw_moments
from stabnorm.monitor import ranks
from stabnorm.monitor.ranks import gather_slabs, merge_stacked_, variance_between
from stabnorm.monitor.record import Block
from tests.monitor.one_history import STEPS, History, Net, assert_same, train
from tests.processes import one_after_the_other, run_ranks
from tests.versions import needs_fsdp_on_cpu

pytestmark = [pytest.mark.slow, one_after_the_other]

# -- in two processes --------------------------------------------------------------------------------------------------


def sharded(net: Net) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    return net


def compiled(net: Net) -> Net:
    for block in net.blocks:
        block.compile(backend="aot_eager")
    return net


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddp": (lambda: DistributedDataParallel(Net()), {}),
    "ddp, recomputed": (lambda: DistributedDataParallel(Net("non-reentrant")), {}),
    "ddp, accumulated": (lambda: DistributedDataParallel(Net()), {"parts": 2, "scale": 1024.0}),
}
SHARDED_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fsdp": (lambda: sharded(Net()), {}),
    "fsdp, recomputed": (lambda: sharded(Net("non-reentrant")), {}),
    "fsdp, accumulated": (lambda: sharded(Net()), {"parts": 2, "scale": 1024.0}),
    "fsdp, compiled blocks": (lambda: sharded(compiled(Net("non-reentrant", bare=False))), {}),
}
HAS_SHARDING = not needs_fsdp_on_cpu.args[0]
EVERY_CASE = [*CASES, *(pytest.param(case, marks=needs_fsdp_on_cpu) for case in SHARDED_CASES)]


class Sayings(logging.Handler):
    """Keeps all log messages."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.said = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Memory:
    """A record that is kept."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.events: list[str] = []

    def write_block(self, block: Block) -> None:
        self.blocks.append(block)

    def write_event(self, kind: str, step: int, data: Any) -> None:
        self.events.append(f"{kind} {step}")

    def close(self) -> None: ...


def now_and_then(rank: int, ranks_: int) -> History:
    """The second of two norms runs on the first share of the data only; and one step has a NaN in the other share."""
    norms = nn.ModuleDict({"both": nn.LayerNorm(6), "one": nn.LayerNorm(6), "batch": nn.BatchNorm1d(6)})
    norms["wide"] = nn.LayerNorm(6000)  # it is merged in a band of its own
    generator = torch.Generator().manual_seed(3)
    with StabilityMonitor(norms, flush_every=2) as monitor:
        for step in range(5):
            x, dy = (torch.randn(2, 7, 6, generator=generator) for _ in range(2))
            x[0] += 3
            x[1] -= 3
            if step == 3:
                x[1, 2] = torch.nan
            parts = range(2) if ranks_ == 1 else [rank]
            for share in parts:
                y = norms["both"](x[share]) + (norms["one"](2 * x[share]) if share == 0 else 0)
                y.backward(dy[share] / len(parts))  # the loss is a mean over shares, as over ranks
                (norms["wide"](x[share].repeat(1, 1000)).mean() / len(parts)).backward()
            norms["batch"](x[parts].flatten(0, 1))
            monitor.step()
            norms.zero_grad()
    return monitor.history()


def one_rank(rank: int, folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, (make, options) in (CASES | SHARDED_CASES if HAS_SHARDING else CASES).items():
        calls = counted_gathers()
        results[name] = train(make(), rank=rank, ranks=2, **options)
        assert next(calls) == STEPS, name
    results["now and then"] = now_and_then(rank, 2)
    alone = StabilityMonitor(net := Net(), ["amax"], sync=False)
    results["alone"] = train(net, rank=rank, ranks=2, monitor=alone)
    pairs: list[Any] = [dist.new_group([member]) for member in range(2)]
    of_one = StabilityMonitor(net := Net(), ["amax"], sync=pairs[rank])
    results["group of one"] = train(net, rank=rank, ranks=2, monitor=of_one)
    if HAS_SHARDING:
        monitor = StabilityMonitor(net := sharded(Net()), ["amax", "grad_gain"], sync=False)  # type: ignore[assignment]
        results["sharded, alone"] = train(net, rank=rank, ranks=2, monitor=monitor)
    results["record"] = recorded(rank)
    with pytest.raises(StabNormError) as refused:
        StabilityMonitor(Net(), include="norm1" if rank else "norm2").attach()
    results["refused"] = str(refused.value)
    torch.save(results, f"{folder}/{rank}.pt")


def counted_gathers() -> Any:
    """An iterator whose next value is how many collectives there were until then."""
    owner: Any = ranks
    before: Callable[..., Tensor] = owner.gather_in_group
    count = 0

    @functools.wraps(before)
    def counting(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return before(*args)

    owner.gather_in_group = counting

    def counted() -> Any:
        owner.gather_in_group = before
        yield count

    return counted()


def recorded(rank: int) -> Any:
    model, record = nn.Sequential(nn.LayerNorm(8)), Memory()
    lines: list[str] = []
    logging.getLogger("stabnorm").addHandler(Sayings(lines))
    with StabilityMonitor(model, ["amax"], flush_every=4) as monitor:
        monitor.records.append(record)
        for step in range(10):
            x = torch.ones(4, 8)
            if (rank, step) == (1, 6):
                x[1, 1] = torch.nan
            model(x)
            monitor.step(loss=float(10 * step + rank))
    losses = [loss for block in record.blocks for loss in block.series["loss"].tolist()]
    return losses, record.events, [alert.as_dict() for alert in monitor.alerts], lines


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What two processes found, in all cases: they take seconds to start."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(one_rank, folder)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def plain() -> dict[bool, History]:
    return {bare: train(Net(bare=bare)) for bare in (True, False)}


@pytest.mark.parametrize("case", EVERY_CASE)
def test_two_processes_have_the_history_of_one(case: str, both: tuple[Any, Any], plain: dict[bool, History]) -> None:
    assert_same(both[0][case], plain["compiled" not in case])


@pytest.mark.parametrize("case", [*EVERY_CASE, "now and then"])
def test_both_hold_the_same_bits(case: str, both: tuple[Any, Any]) -> None:
    for name, values in both[0][case].items():
        assert torch.equal(values.view(torch.int32), both[1][case][name].view(torch.int32)), name


def test_layers_that_ran_on_one_rank_only_and_a_nan_on_one_rank(both: tuple[Any, Any]) -> None:
    want, got = now_and_then(0, 1), both[0]["now and then"]
    assert got["tokens"].tolist() == [[14, 7, 14, 14]] * 5
    for history in (want, got):
        # A batch norm's own running variance is that of one rank's batch: here the data differ, and so do they.
        for name in ("running_mean_distance", "running_var_distance", "mean_discrepancy", "var_discrepancy"):
            history[name] = history[name][:, [0, 1, 3]]
        for name in ("grad_gain", "grad_shift", "grad_fluctuation"):
            history[name] = history[name][:, [0, 1, 3]]  # nobody went back through it
    for name in want.keys() - {"rank_share"}:
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=1e-6, equal_nan=True, msg=name)
    assert torch.isnan(got["grad_gain"][3, 0])
    assert torch.isfinite(got["grad_gain"][[0, 1, 2, 4]]).all()


def test_the_share_of_variance_between_ranks(both: tuple[Any, Any], plain: dict[bool, History]) -> None:
    share = both[0]["now and then"]["rank_share"]
    assert share[0, 0] > 0.8  # means of 3 and -3, standard deviation 1
    assert share[0, 1] == 0  # ran on one
    assert torch.isnan(plain[True]["rank_share"]).all()


def test_without_sync_or_in_a_group_of_one_a_rank_sees_its_share(both: tuple[Any, Any]) -> None:
    for case in ("alone", "group of one"):
        tokens = [of_rank[case]["tokens"] for of_rank in both]
        assert not torch.equal(*tokens)
        assert torch.equal(sum(tokens, torch.zeros(())), both[0]["ddp"]["tokens"])


@needs_fsdp_on_cpu
def test_the_gradient_of_a_sharded_parameter_is_not_known_to_one_rank(both: tuple[Any, Any]) -> None:
    assert torch.isnan(both[0]["sharded, alone"]["grad_gain"][:, 0]).all()
    assert torch.isfinite(both[0]["sharded, alone"]["amax"]).all()


def test_only_the_first_rank_writes_and_speaks_and_the_loss_is_the_mean(both: tuple[Any, Any]) -> None:
    losses, events, alerts, lines = both[0]["record"]
    assert losses == [10 * step + 0.5 for step in range(10)]
    assert events == ["alert 6", "onset 6"]
    assert len(lines) == 1
    assert str(both[1]["record"]) == str(([], [], alerts, []))  # a NaN is not equal to itself
    assert [alert["statistic"] for alert in alerts] == ["nonfinite"]


def test_ranks_that_watch_different_layers_are_refused_on_each(both: tuple[Any, Any]) -> None:
    for of_rank in both:
        assert "rank 1 watches other layers or statistics than rank 0" in of_rank["refused"]
        assert "blocks.0.norm1" in of_rank["refused"]


# -- the rules, for any number of ranks --------------------------------------------------------------------------------


def exact(rows: Tensor) -> RawMoments:
    """Return float32 moments of rows, computed in float64; without rows, those of an empty accumulator."""
    if not len(rows):
        return RawMoments(*(part[0] for part in empty_moments(1, rows.shape[1])))
    whole = raw_moments(rows.double(), "layer", 1e-5)
    channel = whole.channel.float()
    channel[2:4] += (whole.channel[:2] - channel[:2].double()).float()
    return RawMoments(whole.seen, channel, whole.token.float())


def shares(count: int) -> tuple[list[Tensor], RawMoments]:
    """Uneven shares of data with a mean of 1e4 and ranks some apart, one of them empty; and their moments, stacked."""
    rows = [torch.randn(n, 11) + 1e4 + 3 * n for n in (5, 0, 9, 1, 4)[:count]]
    stacked = [torch.stack(parts)[:, None] for parts in zip(*map(exact, rows), strict=True)]
    return rows, RawMoments(*stacked)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_number_of_ranks_merges_to_the_whole(count: int) -> None:
    rows, stacked = shares(count)
    between = variance_between(stacked)
    merged = merge_stacked_(stacked, merge_moments_)
    whole = raw_moments(torch.cat(rows).double(), "layer", 1e-5)
    assert merged.seen.tolist() == [sum(map(len, rows))]
    means = merged.channel[0, :2].double() + merged.channel[0, 2:4].double()
    torch.testing.assert_close(means, whole.channel[:2] + whole.channel[2:4], rtol=0, atol=2e-6)
    torch.testing.assert_close(merged.channel[0, 4:7].double(), whole.channel[4:7], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.channel[0, 7:].double(), whole.channel[7:], rtol=0, atol=0)
    torch.testing.assert_close(merged.token[0].double(), whole.token, rtol=1e-6, atol=1e-6)
    center = torch.cat(rows).double().mean(0)
    truth = sum(len(r) * (r.double().mean(0) - center).square() for r in rows if len(r)) / sum(map(len, rows))
    torch.testing.assert_close(between[0], torch.as_tensor(truth), rtol=1e-5, atol=1e-6)


def test_slabs_of_any_dtype_and_shape_come_back_as_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    def slabs(rank: int) -> list[RawMoments]:
        generator = torch.Generator().manual_seed(rank)
        return [
            RawMoments(
                torch.tensor(rank), torch.randn(3, 5, generator=generator).half(), torch.tensor([True, False, True])
            ),
            RawMoments(
                torch.zeros(0), torch.randn(2, generator=generator), torch.randn(1, generator=generator).double()
            ),
        ]

    sent: list[Tensor] = []

    def send(flat: Tensor, group: None) -> Tensor:
        sent.append(flat)
        return flat[None]

    monkeypatch.setattr(ranks, "gather_in_group", send)
    for rank in range(3):
        gather_slabs(slabs(rank))
    monkeypatch.setattr(ranks, "gather_in_group", lambda flat, group: torch.stack(sent))
    everyone = gather_slabs(slabs(0))
    for rank in range(3):
        for got, want in zip(everyone, slabs(rank), strict=True):
            assert type(got) is RawMoments
            for a, b in zip(got, want, strict=True):
                assert a[rank].dtype == b.dtype
                assert torch.equal(a[rank], b)
