"""However a model is run in one process, the history is the one it has when run plainly, to 1e-6 of natural scale."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from stabnorm import StabilityMonitor, convert_norms
from stabnorm.nn import PRepBN
from tests.monitor.one_history import STEPS, History, Net, assert_same, train
from tests.versions import needs_stable_hook_guards

RECOMPUTE = ["reentrant", "non-reentrant"]


@pytest.fixture(scope="module")
def plain() -> dict[bool, History]:
    """With norms without a gain, and without them: of those a compiled model has no gradients."""
    return {bare: train(Net(bare=bare)) for bare in (True, False)}


@pytest.fixture
def counter() -> Iterator[Any]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_activation_checkpointing(recompute: str, plain: dict[bool, History]) -> None:
    assert_same(train(Net(recompute)), plain[True])


@pytest.mark.parametrize("recompute", ["off", *RECOMPUTE])
def test_accumulation_and_a_loss_scale(recompute: str, plain: dict[bool, History]) -> None:
    assert_same(train(Net(recompute), parts=4, scale=1024.0), plain[True])


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["off", "non-reentrant"])
def test_compiled_whole(recompute: str, plain: dict[bool, History], counter: Any) -> None:
    net = Net(recompute, bare=False)
    assert_same(train(net, torch.compile(net, backend=counter, fullgraph=True)), plain[False])
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at it
@pytest.mark.parametrize("recompute", ["off", *RECOMPUTE])
def test_compiled_blocks_inside_of_checkpoints(recompute: str, plain: dict[bool, History], counter: Any) -> None:
    net = Net(recompute, bare=False)
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True)
    assert_same(train(net), plain[False])
    assert counter.frame_count >= 1


# -- a graph that was made without hooks -------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x))
        return y


def tokens(monitor: StabilityMonitor) -> list[float]:
    values: list[float] = monitor.history()["tokens"][:, 0].tolist()
    return values


def test_twenty_steps_are_one_graph(counter: Any) -> None:
    net = Small()
    run = torch.compile(net, backend=counter, fullgraph=True)
    with StabilityMonitor(net) as monitor:
        for _ in range(20):
            run(torch.randn(5, 8)).backward(torch.randn(5, 8))
            monitor.step()
    assert tokens(monitor) == [5] * 20
    assert counter.frame_count == 1


def test_a_monitor_that_comes_after_the_first_compiled_call_sees_all(counter: Any) -> None:
    net = Small()
    run = torch.compile(net, backend=counter, fullgraph=True)
    run(torch.randn(5, 8))
    with StabilityMonitor(net, ["amax"]) as monitor:
        run(torch.randn(5, 8))
        monitor.step()
    assert tokens(monitor) == [5]


def test_a_compiled_function_that_only_closes_over_the_norm_is_seen(counter: Any) -> None:
    norm = nn.LayerNorm(8)
    run = torch.compile(lambda x: norm(x), backend=counter, fullgraph=True)
    run(torch.randn(5, 8))
    with StabilityMonitor(nn.Sequential(norm), ["amax"]) as monitor:
        run(torch.randn(5, 8))
        monitor.step()
    assert tokens(monitor) == [5]


@pytest.mark.parametrize("watched_first", [False, True])
def test_a_second_instance_of_a_compiled_class_is_told_from_the_first(watched_first: bool, counter: Any) -> None:
    watched, other = Small(), Small()
    with StabilityMonitor(watched, ["amax"]) as monitor:
        for net in (watched, other) if watched_first else (other, watched):
            torch.compile(net, backend=counter, fullgraph=True)(torch.randn(5, 8))
        monitor.step()
    assert tokens(monitor) == [5]
    assert counter.frame_count == 2


@pytest.mark.slow
def test_two_watched_instances_each_see_their_own(counter: Any) -> None:
    nets = Small(), Small()
    with StabilityMonitor(nets[0], ["amax"]) as first, StabilityMonitor(nets[1], ["amax"]) as second:
        for net, count in zip(nets, (5, 7), strict=True):
            torch.compile(net, backend=counter, fullgraph=True)(torch.randn(count, 8))
        first.step()
        second.step()
    assert (tokens(first), tokens(second)) == ([5], [7])


@needs_stable_hook_guards
def test_watching_now_and_then_costs_one_graph_in_all(counter: Any) -> None:
    net = Small()
    run = torch.compile(net, backend=counter, fullgraph=True)
    monitor = StabilityMonitor(net, ["amax"])
    for _ in range(12):
        with monitor:
            run(torch.randn(5, 8))
            monitor.step()
        run(torch.randn(5, 8))
    assert tokens(monitor) == [5] * 12
    assert counter.frame_count == 2


def test_a_watched_norm_is_of_its_own_class_again_afterwards_whoever_goes_first() -> None:
    net = Small()
    first, second = (StabilityMonitor(net, ["amax"]) for _ in range(2))
    first.attach()
    second.attach()
    assert isinstance(net.norm, nn.LayerNorm)
    assert repr(net.norm) == repr(Small().norm)
    first.detach()
    first.detach()
    net(torch.randn(5, 8))
    second.step()
    second.detach()
    assert type(net.norm) is nn.LayerNorm
    assert tokens(second) == [5]


def test_a_norm_that_is_converted_while_it_is_watched_is_seen_on_and_can_be_saved() -> None:
    net = Small()
    with StabilityMonitor(net, ["amax"]) as monitor:
        convert_norms(net)
        pickle.loads(pickle.dumps(net))(torch.randn(5, 8))
        net(torch.randn(5, 8))
        monitor.step()
    assert tokens(monitor) == [5]
    converted: nn.Module = net.norm
    assert type(converted) is type(PRepBN(8))


def test_the_number_of_steps_is_that_of_the_optimizer(plain: dict[bool, History]) -> None:
    assert all(len(values) == STEPS for values in plain[True].values())
